"""The house: public names, layering, what a wheel holds, what importing costs, no host sync on the step path."""

import ast
import inspect
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import srpo_core

ROOT = Path(__file__).parent.parent
# Callers may rely on these from the first release.
PROMISED = """
    Role RoleTags segment_roles segment_responses corrupt_images corrupt_pixel_values counterfactual_responses
    token_log_probs visual_dependency perception_consistency shared_baseline_weights group_advantages role_advantages
    srpo_advantages clipped_surrogate kl_penalty aggregate grpo_loss srpo_loss LossOutput SRPOConfig
""".split()
ADAPTERS = ("srpo_trl", "srpo_verl", "srpo_openrlhf")
FORBIDDEN = ("transformers", "triton", "trl", "verl", "openrlhf", *ADAPTERS)
functions = [value for value in vars(srpo_core).values() if inspect.isfunction(value)]


def test_promised_names_are_public_and_all_is_sorted():
    assert set(PROMISED) <= set(srpo_core.__all__)
    assert sorted(srpo_core.__all__) == srpo_core.__all__
    assert all(hasattr(srpo_core, name) for name in srpo_core.__all__)


@pytest.mark.parametrize("name", srpo_core.__all__)
def test_every_public_name_is_documented(name):
    """On the reference page, in the changelog, and, if it is a function, with an example that doctest runs."""
    assert re.search(rf"\b{name}\b", (ROOT / "docs/reference.md").read_text()), "missing on docs/reference.md"
    assert re.search(rf"\b{name}\b", (ROOT / "CHANGELOG.md").read_text()), "missing in CHANGELOG.md"
    value = getattr(srpo_core, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        assert ">>> " in value.__doc__


@pytest.mark.parametrize("function", functions, ids=lambda function: function.__name__)
def test_public_signatures_follow_the_house(function):
    """Tensors first, every option keyword-only, no **kwargs; each argument is in the docstring."""
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.default is inspect.Parameter.empty, f"{parameter.name} has a default: make it keyword-only"
        if "Args:" in function.__doc__:
            assert re.search(rf"^\s+{parameter.name}: ", function.__doc__, re.MULTILINE), parameter.name


@pytest.mark.parametrize("path", sorted((ROOT / "srpo_core").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_imports_no_framework(path):
    """Ruff's TID251 says so too; this also sees imports inside functions of whatever spelling."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] not in FORBIDDEN
            assert not name.startswith("torch.distributed")


def test_importing_the_core_loads_no_framework():
    code = f"import sys, srpo_core; print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_no_host_sync_on_the_step_path():
    """On the meta device a tensor has no values: whatever reads one on the host fails."""
    tokens, roles, mask = (torch.zeros(2, 3, dtype=dtype, device="meta") for dtype in (torch.float32, int, bool))
    advantages = torch.zeros(2, device="meta")
    options = {"ref_log_probs": tokens, "kl_coef": 0.1, "dual_clip": 3.0, "scale": "batch_rms", "sign": "advantage"}
    for baseline in ("token", "median"):
        log_probs = torch.zeros(2, 3, device="meta", requires_grad=True)
        loss, metrics = srpo_core.srpo_loss(
            log_probs, tokens, tokens, tokens, roles, advantages, mask, baseline=baseline, broken=roles[:, 0], **options
        )
        loss.backward()
        assert all(metric.device.type == "meta" for metric in metrics.values())
    for surrogate in ("cispo", "sapo", "gspo_token", "gspo"):
        srpo_core.grpo_loss(tokens, tokens, tokens, mask, surrogate=surrogate)
    with pytest.raises(NotImplementedError):  # the probe works: this one does read values
        srpo_core.srpo_advantages(tokens, tokens, tokens, roles, advantages, mask)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel made from it: what an index serves."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True, capture_output=True
    )
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_holds_the_core_and_the_adapters_and_nothing_else(built):
    names = zipfile.ZipFile(built[1]).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"srpo_core", *ADAPTERS}
    for package in top:
        assert f"{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_two_commands_need(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "conftest.py"):
        assert needed in names


def test_the_wheel_works_where_nothing_else_of_the_checkout_is(built, tmp_path):
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import srpo_core, torch; "
        "assert srpo_core.__file__.startswith(sys.path[0]), srpo_core.__file__; "
        "print(srpo_core.group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), normalization='none'))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert out.strip() == "tensor([ 0.5000, -0.5000])"


def test_shape_checks_can_be_switched_off_and_options_are_still_checked():
    code = (
        "import torch, srpo_core; z = torch.zeros(1, 2)\n"
        "srpo_core.grpo_loss(z, z, z, z.bool()[:, :1])\n"  # broadcasts: on trust now
        "try: srpo_core.grpo_loss(z, z, z, z.bool(), surrogate='typo')\n"
        "except ValueError as error: print(error)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, env={"JAXTYPING_DISABLE": "1"})
    assert out.startswith("surrogate must be one of 'clip', 'cispo'")
