"""What ``srpo doctor`` checks. It needs nothing but the core, so that it also serves a bare installation."""

import importlib
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

import torch

from srpo_core.roles import Role
from srpo_core.srpo import srpo_loss

__all__ = ["Check", "checks", "loss_is_right", "plain_doctor"]

#: What is missing from the command itself, and how to add it; the package is on no index.
COMMAND_HINT = "pip install '.[cli]' in a checkout of srpo_core"

# What an extra is for, or how it is installed from a checkout.
_HINTS = {
    "": "pip install .",
    "cli": "pip install '.[cli]'",
    "trl": "for TRL",
    "verl": "for verl",
    "openrlhf": "for OpenRLHF",
    "hf": "for srpo score: pip install '.[hf]'",
    "plot": "for plots: pip install '.[plot]'",
}


class Check(NamedTuple):
    """One package, or Python itself.

    Attributes:
        name: Its name.
        installed: Its version; ``-`` if it is not installed.
        supported: The versions that are supported.
        verdict: ``ok``, ``not supported``, or what it is needed for.
        good: Whether its version is supported; None where it is not installed or not compared.
    """

    name: str
    installed: str
    supported: str
    verdict: str
    good: bool | None


def checks() -> list[Check]:
    """Python and every package that the core and its extras name, compared with what is installed.

    Raises:
        PackageNotFoundError: If srpo-core is imported from a folder and not installed.

    Example:
        >>> checks()[0].name, "torch" in [check.name for check in checks()]
        ('python', True)
    """
    found = [_check("python", platform.python_version(), ">=3.11")]
    by_extra: dict[str, list[tuple[str, str]]] = {}
    for line in requires("srpo-core") or []:
        requirement, _, marker = line.partition(";")
        match = re.match(r"\s*([\w.-]+)(?:\[[^]]*\])?\s*(.*)", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)", marker)
        if match:
            by_extra.setdefault(extra[1] if extra else "", []).append((match[1], match[2].strip(" ()")))
    for extra, hint in _HINTS.items():
        for name, supported in by_extra.get(extra, []):
            if any((check.name, check.supported) == (name, supported) for check in found):
                continue  # several extras need it
            try:
                found.append(_check(name, version(name), supported))
            except PackageNotFoundError:
                found.append(Check(name, "-", supported, f"not installed ({hint})", None))
    return found


def _check(name: str, installed: str, supported: str) -> Check:
    try:
        specifiers = importlib.import_module("packaging.specifiers")
    except ImportError:  # versions cannot be compared without it
        return Check(name, installed, supported, "installed; not compared, because packaging is missing", None)
    good = specifiers.SpecifierSet(supported).contains(installed, prereleases=True)
    return Check(name, installed, supported, "ok" if good else "not supported", good)


def loss_is_right() -> tuple[str, bool]:
    """The device that was tried, and whether one step of the loss on it has the gradient that was computed by hand.

    Example:
        >>> loss_is_right()[1]
        True
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old = torch.tensor([[-0.1, -1.0, -0.5]], device=device)
    roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]], device=device)
    log_probs, corrupted = old.clone().requires_grad_(), old - torch.tensor([[2.0, 0.0, 0.0]], device=device)
    mask, advantages = torch.ones_like(roles, dtype=torch.bool), torch.tensor([3.0], device=device)
    output = srpo_loss(log_probs, advantages, roles, mask, old_log_probs=old, corrupted_log_probs=corrupted)
    output.loss.backward()
    expected = torch.tensor([[-1.8585, -0.5707, -0.5707]], device=device)
    return device, log_probs.grad is not None and torch.allclose(log_probs.grad, expected, atol=1e-4)


def accelerator() -> str:
    """The accelerator of this machine, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none, which is fine: the CPU is enough"


#: Where srpo_core is imported from a folder.
NOT_INSTALLED = "srpo-core is imported but not installed: pip install -e . in the checkout"
EXCLUSIVE = "The three trainers exclude one another: use one environment for each."


def plain_doctor(missing: str) -> int:
    """Print the checks without the packages of the command; the exit status, which is 0 if the loss is right."""
    try:
        rows = [check[:4] for check in checks()]
    except PackageNotFoundError:
        sys.stderr.write(f"Error: {NOT_INSTALLED}\n")
        return 1
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    device, good = loss_is_right()
    print(f"\naccelerator: {accelerator()}\nthe loss on {device}: {'ok' if good else 'not supported'}\n{EXCLUSIVE}")
    print(f"The other commands need {missing}, which is not installed: {COMMAND_HINT}.")
    return 0 if good else 1
