"""``srpo doctor``: what is installed, and whether the loss works on this machine."""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

import torch
import typer
from packaging.requirements import Requirement
from rich.text import Text

from srpo_core.cli.terminal import out, stop, table
from srpo_core.roles import Role
from srpo_core.srpo import srpo_loss

__all__ = ["doctor"]

# How to install what an extra needs.
_HINTS = {
    "": "pip install srpo-core",
    "cli": "pip install 'srpo-core[cli]'",
    "trl": "for TRL",
    "verl": "for verl",
    "openrlhf": "for OpenRLHF",
    "plot": "for plots",
}


def doctor() -> None:
    """Say which frameworks are installed, which versions are supported, and what is missing."""
    rows = table("", "installed", "supported", "", left=4)
    rows.add_row("python", platform.python_version(), ">=3.11", _verdict(sys.version_info >= (3, 11)))
    extras: dict[str, list[Requirement]] = {}
    try:
        needed = [Requirement(line) for line in requires("srpo-core") or []]
    except PackageNotFoundError:
        stop("srpo-core is not installed, only imported: pip install -e . in the checkout")
    for requirement in needed:
        match = re.search(r"extra == ['\"]([\w-]+)", str(requirement.marker or ""))
        extras.setdefault(match[1] if match else "", []).append(requirement)
    for name, hint in _HINTS.items():
        for requirement in extras.get(name, []):
            rows.add_row(*_checked(requirement, hint))
    out.print(rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, which is fine: the CPU will do"
    out.print(Text(f"\naccelerator: {device}"))
    _check_core()
    out.print(Text("The three trainers exclude one another: use one environment for each."))


def _verdict(good: bool) -> Text:
    return Text("ok", style="green") if good else Text("not supported", style="red")


def _checked(requirement: Requirement, hint: str) -> tuple[str, str, str, Text]:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return requirement.name, "-", str(requirement.specifier), Text(f"not installed ({hint})", style="dim")
    good = requirement.specifier.contains(installed, prereleases=True)
    return requirement.name, installed, str(requirement.specifier), _verdict(good)


def _check_core() -> None:
    """Compare one step of the loss on this machine's best device with its value computed by hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old = torch.tensor([[-0.1, -1.0, -0.5]], device=device)
    roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]], device=device)
    log_probs, corrupted = old.clone().requires_grad_(), old - torch.tensor([[2.0, 0.0, 0.0]], device=device)
    mask, advantages = torch.ones_like(roles, dtype=torch.bool), torch.tensor([3.0], device=device)
    output = srpo_loss(log_probs, advantages, roles, mask, old_log_probs=old, corrupted_log_probs=corrupted)
    output.loss.backward()
    expected = torch.tensor([[-1.8585, -0.5707, -0.5707]], device=device)
    good = log_probs.grad is not None and torch.allclose(log_probs.grad, expected, atol=1e-4)
    out.print(Text(f"the loss on {device}: ").append_text(_verdict(good)))
    if not good:
        raise typer.Exit(1)
