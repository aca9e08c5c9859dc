"""The house: public names, layering, what a wheel holds, what importing costs, no host sync on the step path."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import srpo_core
from srpo_core.entropy import fused_linear_entropy
from srpo_core.fused import fused_linear_divergence, fused_linear_log_probs_and_entropy
from srpo_core.options import SRPOConfig
from srpo_core.surrogates import Clip, Surrogate

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
ADAPTERS = sorted(path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py"))
FRAMEWORKS = [name.removeprefix("srpo_") for name in ADAPTERS]
FORBIDDEN = ("transformers", "triton", *FRAMEWORKS, *ADAPTERS)
SOURCES = sorted((ROOT / "srpo_core").rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "srpo_core")))

# Callers may rely on these from the first release.
PROMISED = """
    Role RoleTags Segmentation segment_roles segment_responses corrupt_images corrupt_pixel_values
    counterfactual_responses token_log_probs token_divergence visual_dependency perception_consistency
    group_advantages role_advantages shared_baseline_weights srpo_advantages Credit ScaleState RolloutBatch plan credit
    grpo_loss srpo_loss LossOutput aggregate kl_penalty OutputLayer fused_linear_log_probs fused_linear_grpo_loss
    SRPOConfig ContextOptions CreditOptions LossOptions
""".split()

# A module imports from rooms to the left of its own.
ROOMS = """
    typechecking masking checked modes grammar tags formats prompting token_text special_tokens roles surrogates options
    processor_values corruption pixel_layouts pixel_values counterfactuals log_probs contrasts reliance weights
    advantages losses products output_layer vocabulary entropy fused diagnostics engine_gap srpo batch watch rollouts
    report cli
""".split()


def made_in(module):
    """The names of a module's ``__all__`` that it does not have from elsewhere."""
    return [name for name in module.__all__ if getattr(getattr(module, name), "__module__", "") == module.__name__]


def documented_names():
    """What the ``{api}`` blocks of the reference show, by name: those in the block, or all of its module."""
    found = {}
    for page in (ROOT / "docs/reference").glob("*.md"):
        for name, body in re.findall(r"^```\{api\} (\S+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            if not name.startswith("srpo_core"):
                continue  # an adapter needs its framework; its own tests run where that is installed
            module = importlib.import_module(name)
            found |= {each: getattr(module, each) for each in body.split() or made_in(module)}
    return found


SURROGATES = {name: cls for name, cls in Surrogate.known().items() if cls.__module__ == Surrogate.__module__}
DOCUMENTED = documented_names()
FUNCTIONS = {name: value for name, value in sorted(DOCUMENTED.items()) if inspect.isfunction(value)}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


# Names


def test_promised_names_are_public_and_few_others_are():
    assert set(PROMISED) <= set(srpo_core.__all__)
    assert sorted(srpo_core.__all__) == srpo_core.__all__
    assert len(srpo_core.__all__) <= 36, "import it from its module instead"
    assert all(hasattr(srpo_core, name) for name in srpo_core.__all__)


def test_the_version_is_that_of_the_distribution():
    assert srpo_core.__version__ == PYPROJECT["project"]["version"]


@pytest.mark.parametrize("name", srpo_core.__all__)
def test_every_public_name_is_documented(name):
    """In the reference, in the changelog, and, if it is a function, with an example that doctest runs."""
    assert name in DOCUMENTED, "on no page of docs/reference"
    assert re.search(rf"\b{name}\b", (ROOT / "CHANGELOG.md").read_text()), "missing in CHANGELOG.md"
    value = getattr(srpo_core, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value) and name != "credit":  # plan() has its example, and the README the whole path
        assert ">>> " in value.__doc__


@pytest.mark.parametrize("room", ROOMS[: ROOMS.index("report")])
def test_whatever_has_an_example_is_in_the_reference(room):
    """An example is for users, so what has one is public; a name without one may serve other modules alone."""
    module = importlib.import_module(f"srpo_core.{room}")
    shown = [name for name in made_in(module) if ">>> " in (inspect.getdoc(getattr(module, name)) or "")]
    assert [name for name in shown if name not in DOCUMENTED] == [], "on no page of docs/reference"


@each_function
def test_signatures_are_short_and_every_argument_is_explained(function):
    """What may be positional is in test_signatures.py."""
    parameters = inspect.signature(function).parameters.values()
    # What processors return beside pixels is an argument each, under its own name.
    assert len(parameters) <= (18 if function is srpo_core.corrupt_pixel_values else 14)
    for parameter in parameters:
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
        if "Args:" in function.__doc__:
            assert re.search(rf"^\s+{parameter.name}: ", function.__doc__, re.MULTILINE), parameter.name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_tests_that_pytest_finds_by_its_name(name):
    """``pytest -k name`` runs them: the name of the function is part of the name of a test."""
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    tests = re.findall(r"^ *def (test_\w+)", sources, re.MULTILINE)
    assert any(f"_{name}_" in f"{test}_" for test in tests), f"call a test test_{name}_..."


# Sources


def imports_of(path):
    """The modules that a file imports, anywhere in it, and the names that it takes from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


@each_source
def test_the_core_imports_no_framework(path):
    """Ruff's TID251 says so too; this also sees imports inside functions of whatever spelling."""
    for module, _ in imports_of(path):
        assert module.split(".")[0] not in FORBIDDEN
        assert not module.startswith("torch.distributed")


@each_source
def test_a_module_imports_public_names_from_the_rooms_below(path):
    room = path.relative_to(ROOT / "srpo_core").parts[0].removesuffix(".py")
    assert room in (*ROOMS, "__init__"), "say in ROOMS what it may import, and what may import it"
    for module, names in imports_of(path):
        if not module.startswith("srpo_core."):
            continue
        assert not [name for name in names if name.startswith("_")], "a name with an underscore is its module's own"
        other = module.split(".")[1]
        below = room == "__init__" or ROOMS.index(other) < ROOMS.index(room)
        assert other == room or below, f"{room} imports {other}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_is_public_in_it(room):
    module = importlib.import_module(f"srpo_core.{room}")
    assert all(hasattr(module, name) for name in module.__all__)


@each_source
def test_no_file_is_longer_than_can_be_read_at_once(path):
    assert len(path.read_text().splitlines()) <= 450


def test_few_lines_of_documentation_only_point_elsewhere():
    lines = [line.strip() for path in SOURCES for line in path.read_text().splitlines()]
    pointers = [line for line in lines if re.fullmatch(r"(\w+: )?(See|As in|As for) [^.;,]*(\.\w+)*`?\.?", line)]
    assert len(pointers) <= 10, pointers


@pytest.mark.parametrize("name", SURROGATES)
def test_every_parameter_of_a_surrogate_says_what_it_does(name):
    for field in (field for field in dataclasses.fields(SURROGATES[name]) if field.init):
        assert re.fullmatch(r"[A-Z`].*\.", field.metadata["help"]), field.name


# Adapters


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_adapter_is_registered_where_it_has_to_be(framework):
    assert framework in EXTRAS
    assert f"integrations/srpo_{framework}" in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert f"srpo_{framework}" in PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    page = "tutorial/hugging_face" if framework == "hf" else f"how-to/{framework}"
    assert (ROOT / f"docs/{page}.md").exists()
    assert (ROOT / f"tests/integrations/{framework}/run.sh").exists()
    assert (ROOT / f"integrations/srpo_{framework}/py.typed").exists()


def test_there_are_adapters():
    assert {"srpo_trl", "srpo_verl", "srpo_openrlhf"} <= set(ADAPTERS)


# What importing and stepping cost


def test_importing_the_core_loads_neither_a_framework_nor_what_the_commands_need():
    code = "import sys, torch; before = set(sys.modules); import srpo_core; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    unwanted = {*FORBIDDEN, "typer", "rich", "orjson", "PIL", "matplotlib"}
    assert not unwanted & {name.split(".")[0] for name in loaded}
    assert not {name for name in loaded if re.match(r"srpo_core\.(rollouts|report|cli)\b", name)}


def test_no_host_sync_on_the_step_path():
    """On the meta device a tensor has no values: whatever reads one on the host fails."""
    tokens, roles, mask = (torch.zeros(2, 3, dtype=dtype, device="meta") for dtype in (torch.float32, int, bool))
    advantages = torch.zeros(2, device="meta")
    others = dict.fromkeys(
        ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs", "reliance", "ref_log_probs"), tokens
    )
    for baseline in ("token", "median"):
        log_probs = torch.zeros(2, 3, device="meta", requires_grad=True)
        options = SRPOConfig(
            kl_coef=0.1,
            kl_correction="ratio",
            surrogate=Clip(dual=3.0),
            scale="batch_rms",
            sign="advantage",
            baseline=baseline,
        )
        loss, metrics = srpo_core.srpo_loss(log_probs, advantages, roles, mask, options, broken=roles[:, 0], **others)
        loss.backward()
        assert all(metric.device.type == "meta" for metric in metrics.values())
    for surrogate in SURROGATES:
        options = srpo_core.LossOptions(surrogate=surrogate, off_policy_threshold=0.1)
        srpo_core.grpo_loss(tokens, tokens, mask, options, old_log_probs=tokens)
    with pytest.raises(NotImplementedError):  # the probe works: this one does read values
        srpo_core.srpo_advantages(tokens, advantages, roles, mask)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_host_sync_in_the_fused_functions(frozen):
    tokens, ids, mask = (torch.zeros(2, 3, dtype=dtype, device="meta") for dtype in (torch.float32, int, bool))
    hidden = torch.zeros(2, 3, 4, device="meta", requires_grad=True)
    weight, bias = (torch.zeros(*shape, device="meta", requires_grad=not frozen) for shape in ((7, 4), (7,)))
    output = srpo_core.OutputLayer(weight, bias=bias, logit_softcap=2.0, logit_scale=0.5)
    for surrogate in SURROGATES:
        options = srpo_core.LossOptions(surrogate=surrogate, kl_coef=0.1)
        for chunk, count in ((None, None), (2, 5)):
            loss, _ = srpo_core.fused_linear_grpo_loss(
                hidden,
                output,
                ids,
                tokens,
                mask,
                options,
                old_log_probs=tokens,
                ref_log_probs=tokens,
                chunk_tokens=chunk,
                active_tokens=count,
            )
            loss.backward()
    srpo_core.fused_linear_log_probs(hidden, output, ids, mask).sum().backward()
    fused_linear_log_probs_and_entropy(hidden, output, ids, mask)
    fused_linear_divergence(hidden, output, mask, other_hidden=hidden)
    fused_linear_entropy(hidden, output, mask).sum().backward()


# What is built


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
    for path in (ROOT / "srpo_core").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names


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
        "srpo_core.grpo_loss(z, z, z.bool()[:, :1], old_log_probs=z)\n"  # broadcasts: on trust now
        "for call in (lambda: srpo_core.LossOptions(surrogate='typo'),\n"
        "             lambda: srpo_core.kl_penalty(z, z.bool(), ref_log_probs=z, estimator='typo')):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, env={"JAXTYPING_DISABLE": "1"})
    of_options, of_leaf = out.splitlines()
    assert of_options.startswith("surrogate must be one of 'clip', 'cispo'")
    assert of_leaf.startswith("estimator must be one of 'k1', 'k2', 'k3', 'abs', got 'typo'")
