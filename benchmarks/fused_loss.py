"""Time and memory of the fused loss, against the arithmetic floor and against its peers.

    sh benchmarks/install_peers.sh
    .venv-peers/bin/python -m benchmarks.fused_loss time
    .venv-peers/bin/python -m benchmarks.fused_loss memory
    .venv-peers/bin/python -m benchmarks.fused_loss liger
    .venv-peers/bin/python -m benchmarks.fused_loss page

Protocol: one process and the same inputs for all. In a warm-up the loss and the norms of both gradients are compared
with those of the full float32 logits; a contestant that is wrong is out. Then interleaved rounds: every contestant, and
the matrix products that nobody can do without, once each a round. Reported is the median of the ratios to the products
of the same round. On a CPU: one thread, process time. On CUDA: events. A peer that is not installed is left out.
"""

import ctypes
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time as clock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from srpo_core import (
    LossOptions,
    OutputLayer,
    fused_linear_grpo_loss,
    fused_linear_log_probs,
    grpo_loss,
    token_log_probs,
)
from srpo_core.fused import fused_linear_divergence
from srpo_core.options import DivergenceKind, Reduction
from srpo_core.surrogates import CISPO, GSPO, SAPO, Clip, Surrogate

RESULTS = Path(__file__).parent / "results"
BATCH = 8  # responses a batch, all equally long
SIZES = {
    "fp32 512 x 896 x 32k": (512, 896, 32_000, torch.float32),
    "fp32 2048 x 256 x 32k": (2048, 256, 32_000, torch.float32),
    "fp32 256 x 1536 x 152k": (256, 1536, 151_936, torch.float32),
    "bf16 1024 x 896 x 32k": (1024, 896, 32_000, torch.bfloat16),
    "bf16 512 x 896 x 152k": (512, 896, 151_936, torch.bfloat16),
    "fp32 4096 x 256 x 32k": (4096, 256, 32_000, torch.float32),
    "bf16 16384 x 3584 x 152k": (16_384, 3584, 152_064, torch.bfloat16),
}
CPU_SIZES = list(SIZES)[:5]
WARM_UP = "fp32 16 x 64 x 256"
SIZES[WARM_UP] = (16, 64, 256, torch.float32)
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=160)


@dataclass
class Case:
    """The last layer of a model and one batch for it."""

    hidden: Tensor
    other_hidden: Tensor
    lm_head: Tensor
    token_ids: Tensor
    old_log_probs: Tensor
    advantages: Tensor  # one per response: Liger takes no others
    mask: Tensor

    @classmethod
    def of(cls, size: str, device: str, *, active: float = 1.0, frozen: bool = False) -> "Case":
        tokens, width, vocab, dtype = SIZES[size]
        g = torch.Generator(device).manual_seed(0)
        shape = (BATCH, tokens // BATCH)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device)

        hidden, other = (randn(*shape, width).to(dtype) for _ in range(2))
        lm_head = (randn(vocab, width) * (2.0 / width**0.5)).to(dtype)
        token_ids = torch.randint(vocab, shape, generator=g, device=device)
        mask = torch.rand(shape, generator=g, device=device) < active
        with torch.no_grad():
            old = fused_linear_log_probs(hidden, OutputLayer(lm_head), token_ids, mask) + 0.1 * randn(*shape)
        return cls(
            hidden.requires_grad_(),
            other,
            lm_head.requires_grad_(not frozen),
            token_ids,
            old,
            randn(BATCH),
            mask,
        )

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages[:, None].expand_as(self.old_log_probs)

    def loss_of(self, log_probs: Tensor) -> Tensor:
        """For contestants that end at the log-probs; a few vectors, the same for all."""
        log_probs = log_probs.view(self.mask.shape)
        return grpo_loss(log_probs, self.token_advantages, self.mask, old_log_probs=self.old_log_probs).loss


# Contestants. A training step returns its loss after backward; a scorer returns its values.


def full_logits(case: Case) -> Tensor:
    return case.loss_of(token_log_probs(case.hidden @ case.lm_head.t(), case.token_ids))


def trl_selective(case: Case) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return case.loss_of(selective_log_softmax(case.hidden @ case.lm_head.t(), case.token_ids))


def trl_chunked_log_probs(case: Case) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    args = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    return ChunkedLogProbFunction.apply(case.hidden.flatten(0, 1), case.lm_head, None, case.token_ids.flatten(), *args)[
        0
    ]


def liger_loss(**options: Any) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        **{"beta": 0.0, "use_ref_model": False, "loss_type": "dapo", "compiled": False} | options
    )


def liger_chunked(case: Case) -> Tensor:
    mask = case.mask.to(torch.int64)
    args = (case.hidden, case.lm_head, case.token_ids, mask, case.advantages)
    return liger_loss()(*args, old_per_token_logps=case.old_log_probs)[0]


def liger_log_probs(case: Case) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(case.hidden, case.lm_head, case.token_ids)


def verl_log_probs(case: Case) -> Tensor:
    # Its package imports Ray; the file itself needs only torch.
    root = importlib.util.find_spec("verl")
    if root is None or not root.submodule_search_locations:
        raise ImportError("verl")
    path = Path(root.submodule_search_locations[0]) / "utils/experimental/torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.get(spec.name)
    if module is None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[spec.name] = module
    return module.FusedLinearForPPO()(case.hidden, case.lm_head, case.token_ids)[0]


def torch_log_probs(case: Case) -> Tensor:
    # The fastest setting that was found here; the default ("auto") takes five times as long.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)  # pyright: ignore[reportAttributeAccessIssue]
    return -F.linear_cross_entropy(  # pyright: ignore[reportAttributeAccessIssue]
        case.hidden.flatten(0, 1), case.lm_head, case.token_ids.flatten(), reduction="none", options=options
    )


def ours(case: Case) -> Tensor:
    output, advantages = OutputLayer(case.lm_head), case.token_advantages
    return fused_linear_grpo_loss(
        case.hidden, output, case.token_ids, advantages, case.mask, old_log_probs=case.old_log_probs
    ).loss


def ours_log_probs(case: Case) -> Tensor:
    return fused_linear_log_probs(case.hidden, OutputLayer(case.lm_head), case.token_ids, case.mask)


def compiled(function: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
    return torch.compile(function, fullgraph=True)


def trl_divergence(beta: float) -> Callable[[Case], Tensor]:
    def scores(case: Case) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        first, second = case.hidden.flatten(0, 1), case.other_hidden.flatten(0, 1)
        # Forward KL is KL(teacher || student).
        return ChunkedDivergenceFunction.apply(second, case.lm_head, None, first, case.lm_head, None, beta)[0]

    return scores


def ours_divergence(kind: DivergenceKind) -> Callable[[Case], Tensor]:
    def scores(case: Case) -> Tensor:
        output = OutputLayer(case.lm_head)
        return fused_linear_divergence(case.hidden, output, case.mask, other_hidden=case.other_hidden, kind=kind)

    return scores


def train(function: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
    def step(case: Case) -> Tensor:
        case.hidden.grad = case.lm_head.grad = None
        loss = function(case)
        loss.backward()
        return loss.detach()

    return step


def after(log_probs: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
    return lambda case: case.loss_of(log_probs(case))


TRAINING = {
    "full logits": train(full_logits),
    "TRL selective": train(trl_selective),
    "TRL chunked": train(after(trl_chunked_log_probs)),
    "Liger chunked": train(liger_chunked),
    "verl": train(after(verl_log_probs)),
    "torch": train(after(torch_log_probs)),
    "ours": train(ours),
}
CHUNKED = ["TRL chunked", "Liger chunked", "verl", "torch"]
SCORING = {
    "TRL chunked": trl_chunked_log_probs,
    "Liger chunked": liger_log_probs,
    "verl": verl_log_probs,
    "torch": torch_log_probs,
    "ours": ours_log_probs,
}


@dataclass(frozen=True)
class Task:
    """Something to do with a batch, and the matrix products that it takes at the least."""

    contestants: dict[str, Callable[[Case], Tensor]]
    products: tuple[str, ...]
    goal: dict[torch.dtype, float]
    active: float = 1.0
    frozen: bool = False


TASKS = {
    "train": Task(
        TRAINING | {"ours compiled": train(compiled(ours))},
        ("logits", "hidden", "weight"),
        {torch.float32: 1.05, torch.bfloat16: 1.10},
    ),
    # Against the products of all tokens, the padding included.
    "train, 37 % active": Task(
        TRAINING,
        ("logits", "hidden", "weight"),
        {torch.float32: 0.37 * 1.1 * 1.05, torch.bfloat16: 0.37 * 1.1 * 1.10},
        active=0.37,
    ),
    "train, frozen head": Task(
        TRAINING, ("logits", "hidden", "weight"), {torch.float32: 0.70, torch.bfloat16: 0.70}, frozen=True
    ),
    "log-probs, no gradient": Task(SCORING, ("logits",), {torch.float32: 1.12, torch.bfloat16: 1.40}),
    "KL": Task(
        {"TRL chunked": trl_divergence(0.0), "ours": ours_divergence("full_kl")},
        ("logits",),
        {torch.float32: 2.5, torch.bfloat16: 2.5},
    ),
    "JSD": Task(
        {"TRL chunked": trl_divergence(0.5), "ours": ours_divergence("jsd")},
        ("logits",),
        {torch.float32: 3.4, torch.bfloat16: 3.4},
    ),
}


def floor(case: Case, products: tuple[str, ...], delta: Tensor) -> None:
    """The products alone, over all tokens at once."""
    hidden, weight = case.hidden.detach().flatten(0, 1), case.lm_head.detach()
    for product in products:
        if product == "logits":
            torch.mm(hidden, weight.t())
        elif product == "hidden":
            torch.mm(delta, weight)
        else:
            torch.mm(delta.t(), hidden)


def seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = clock.process_time()
        function()
        return clock.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def answer(result: Tensor, case: Case, learns: bool) -> list[Tensor]:
    if not learns:
        return [torch.where(case.mask, result.view(case.mask.shape).double(), 0.0)]
    gradients = [case.hidden.grad, case.lm_head.grad]
    return [result.double(), *(x.double().norm() for x in gradients if x is not None)]


def agrees(given: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> bool:
    # Peers round the logits to bfloat16: they are not faulted for that here.
    rtol = 1e-3 if dtype == torch.float32 else 5e-2
    return all(torch.allclose(a, b, rtol=rtol, atol=rtol * 0.1) for a, b in zip(given, expected, strict=True))


@app.command()
def time(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, at least 5 for a result.")] = 7,
    sizes: Annotated[str, typer.Option(help="Comma-separated indices into the table of sizes, or all.")] = "all",
    tasks: Annotated[str, typer.Option(help="Comma-separated parts of the names of tasks, or all.")] = "all",
    out: Annotated[Path, typer.Option(help="JSON; a row of the same size and task is replaced.")] = RESULTS
    / "fused_loss.json",
) -> None:
    """Time every contestant."""
    torch.set_num_threads(1)
    names = CPU_SIZES if device == "cpu" else [*CPU_SIZES, list(SIZES)[6]]
    chosen = names if sizes == "all" else [list(SIZES)[int(i)] for i in sizes.split(",")]
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": [], "memory": []}
    results["machine"] = machine(device)
    for task_name, task in TASKS.items():
        if tasks != "all" and not any(part in task_name for part in tasks.split(",")):
            continue
        for size in chosen:
            row: dict[str, Any] = {"task": task_name, "size": size, "device": device}
            row |= measure(task, size, device, rounds)
            results["rows"] = [
                r for r in results["rows"] if (r["task"], r["size"], r["device"]) != (task_name, size, device)
            ]
            results["rows"].append(row)
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
            console.print(
                f"{task_name:24} {size:24}",
                {k: round(v["ratio"], 3) for k, v in row["contestants"].items()},
                row["out"],
            )


def measure(task: Task, size: str, device: str, rounds: int) -> dict[str, Any]:
    case = Case.of(size, device, active=task.active, frozen=task.frozen)
    dtype, learns = SIZES[size][3], task.products != ("logits",)
    delta = torch.randn(case.mask.numel(), SIZES[size][2], device=device).to(dtype)
    running: dict[str, Callable[[], Tensor]] = {}
    excluded: dict[str, str] = {}
    # The reference: float32 logits, which also bfloat16 contestants are held to.
    reference = None
    for name, contestant in {"ours": task.contestants["ours"], **task.contestants}.items():
        try:
            with torch.set_grad_enabled(learns):
                given = answer(contestant(case), case, learns)
        except ImportError as error:
            excluded[name] = f"not installed ({error.name})"
            continue
        if reference is None:
            reference = truth(case, task, learns)
        if agrees(given, reference, dtype):
            running[name] = lambda contestant=contestant: contestant(case)
        else:
            excluded[name] = "wrong: " + ", ".join(
                f"{a.norm():.5g} for {b.norm():.5g}" for a, b in zip(given, reference, strict=True)
            )
    times: dict[str, list[float]] = {name: [] for name in ["floor", *running]}
    with torch.set_grad_enabled(learns):
        for _ in range(rounds):
            with torch.no_grad():
                times["floor"].append(seconds(lambda: floor(case, task.products, delta), device))
            for name, contestant in running.items():
                times[name].append(seconds(contestant, device))
    contestants = {
        name: {
            "ratio": statistics.median(a / b for a, b in zip(taken, times["floor"], strict=True)),
            "minimum_ratio": min(taken) / min(times["floor"]),
            "median_seconds": statistics.median(taken),
            "minimum_seconds": min(taken),
        }
        for name, taken in times.items()
    }
    return {"rounds": rounds, "goal": task.goal[dtype], "contestants": contestants, "out": excluded}


def truth(case: Case, task: Task, learns: bool) -> list[Tensor]:
    """From all logits in at least float32, the plain way."""
    leaves = [x.detach().float().requires_grad_(x.requires_grad) for x in (case.hidden, case.lm_head)]
    if not learns:
        with torch.no_grad():
            log_p = (leaves[0] @ leaves[1].t()).log_softmax(-1)
            if task.contestants["ours"] is ours_log_probs:
                return answer(log_p.gather(-1, case.token_ids[..., None])[..., 0], case, learns)
            log_q = (case.other_hidden.float() @ leaves[1].t()).log_softmax(-1)
            if task is TASKS["KL"]:
                return answer(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1), case, learns)
            middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
            values = [F.kl_div(middle, x, log_target=True, reduction="none").sum(-1) for x in (log_p, log_q)]
            return answer((values[0] + values[1]) / 2, case, learns)
    loss = case.loss_of(token_log_probs(leaves[0] @ leaves[1].t(), case.token_ids))
    gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
    return [loss.detach().double(), *(gradient.double().norm() for gradient in gradients)]


# Memory: a fresh process for each contestant, because what one leaves behind the next would find.


@app.command()
def memory(
    device: str = "cpu",
    sizes: str = "5,3",
    out: Path = RESULTS / "fused_loss.json",
) -> None:
    """Measure the peak memory over the inputs, gradients included."""
    results = json.loads(out.read_text()) if out.exists() else {"rows": [], "memory": []}
    for size in [list(SIZES)[int(i)] for i in sizes.split(",")]:
        row: dict[str, Any] = {"size": size, "device": device, "peak_mib": {}}
        for name in TRAINING:
            command = [sys.executable, "-m", "benchmarks.fused_loss", "memory-of", name, size, device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                row["peak_mib"][name] = float(done.stdout.split()[-1])
        tokens, width, vocab, dtype = SIZES[size]
        row["gradients_mib"] = (tokens + vocab) * width * dtype.itemsize / 2**20
        chunk = 1024 if device != "cpu" else 256 if dtype == torch.float32 else 512
        buffers = min(chunk, tokens) * vocab * 4
        if dtype != torch.float32:
            buffers += min(4 * chunk, tokens) * vocab * dtype.itemsize + (4 * chunk < tokens) * vocab * width * 4
        row["buffers_mib"] = buffers / 2**20
        results["memory"] = [r for r in results["memory"] if (r["size"], r["device"]) != (size, device)] + [row]
        console.print(row)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


@app.command(hidden=True)
def memory_of(name: str, size: str, device: str) -> None:
    torch.set_num_threads(1)
    case = Case.of(size, device)
    # What libraries load on first use is not the contestant's.
    TRAINING[name](Case.of(WARM_UP, device))
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        TRAINING[name](case)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    # What the C library kept from building the case would serve the contestant unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    TRAINING[name](case)
    print((resident("VmHWM") - before) / 2**10)


def resident(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


# Liger's published settings: its own output, at its own tolerances

LIGER_REDUCTIONS: dict[str, Reduction] = {
    # their loss -> our reduction
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "sapo": "sequence_mean",
}


def surrogate_of(loss_type: str, level: str, low: float, high: float, delta: float | None) -> Surrogate:
    """Our surrogate of their loss."""
    if level == "sequence":
        return GSPO(low=low, high=high)
    return {"cispo": CISPO(max_ratio=high), "sapo": SAPO()}.get(loss_type, Clip(low=low, high=high, dual=delta))


@app.command()
def liger(out: Path = RESULTS / "fused_loss_liger.json") -> None:
    """Compare with Liger over its published settings."""
    torch.set_num_threads(1)
    cells = []
    for loss_type in LIGER_REDUCTIONS:
        # CISPO and SAPO have neither a sequence-level ratio nor an upper clip.
        clipped = loss_type not in ("cispo", "sapo")
        settings = itertools.product(
            ("token", "sequence") if clipped else ("token",),
            ((0.2, 0.2), (0.1, 0.4)),
            (0.0, 0.1),  # beta
            (1.0, 20.0),  # temperature
            (False, True),  # bias
            (False, True),  # log-probs of an older policy
            (None, 1.5) if clipped else (None,),
            (torch.float32, torch.bfloat16),
        )
        for level, (low, high), beta, temperature, with_bias, old, delta, dtype in settings:
            setting = (loss_type, level, low, high, beta, temperature, with_bias, old, delta, dtype)
            cells.append([*map(str, setting), against_liger(*setting)])
    worst = max(cell[-1] for cell in cells)
    wrong = [cell for cell in cells if cell[-1] > 1.0]
    console.print(
        f"{len(cells)} settings, {len(cells) - len(wrong)} within Liger's own tolerances; worst {worst:.3g} of them"
    )
    for cell in wrong:
        console.print(cell)
    defects = liger_defects()
    console.print(defects)
    summary = {
        "settings": len(cells),
        "within": len(cells) - len(wrong),
        "worst": worst,
        "outside": wrong,
        "defects": defects,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(summary, indent=1) + "\n")


def small_case(dtype: torch.dtype) -> tuple[Case, Tensor]:
    g = torch.Generator().manual_seed(0)
    batch, length, width, vocab = 3, 47, 31, 123
    hidden, other = (torch.randn(batch, length, width, generator=g).to(dtype) for _ in range(2))
    lm_head = torch.randn(vocab, width, generator=g).to(dtype)
    token_ids = torch.randint(vocab, (batch, length), generator=g)
    mask = torch.rand(batch, length, generator=g) < 0.7
    old = token_log_probs((hidden.float() @ lm_head.float().t()), token_ids) + 0.3 * torch.randn(
        batch, length, generator=g
    )
    return (
        Case(
            hidden.requires_grad_(),
            other,
            lm_head.requires_grad_(),
            token_ids,
            old,
            torch.randn(batch, generator=g),
            mask,
        ),
        torch.randn(vocab, generator=g).to(dtype).requires_grad_(),
    )


def against_liger(
    loss_type: str, level: str, low: float, high: float, beta: float, temperature: float, with_bias: bool, old: bool,
    delta: float | None, dtype: torch.dtype,
) -> float:  # fmt: skip
    """Largest difference of loss and gradients, in units of the tolerance of Liger's own tests."""
    atol, rtol = (1e-5, 5e-4) if dtype == torch.float32 else (5e-2, 5e-1)
    case, bias = small_case(dtype)
    bias = bias if with_bias else None
    length = case.mask.shape[1]
    with torch.no_grad():
        output = OutputLayer(case.lm_head, bias=bias, temperature=temperature)
        fresh = fused_linear_log_probs(case.hidden, output, case.token_ids, torch.ones_like(case.mask))
        g = torch.Generator().manual_seed(1)
        sampled = fresh + 0.3 * torch.randn(fresh.shape, generator=g) if old else fresh
        ref = fresh + 0.2 * torch.randn(fresh.shape, generator=g)
    theirs = liger_loss(
        beta=beta, use_ref_model=True, loss_type=loss_type, epsilon_low=low, epsilon_high=high, temperature=temperature,
        max_completion_length=length if loss_type == "dr_grpo" else None, importance_sampling_level=level, delta=delta,
    )(
        case.hidden, case.lm_head, case.token_ids, case.mask.to(torch.int64), case.advantages, bias,
        ref_per_token_logps=ref, old_per_token_logps=sampled if old else None,
    )[0]  # fmt: skip
    reduction = LIGER_REDUCTIONS[loss_type]
    options = LossOptions(
        surrogate=surrogate_of(loss_type, level, low, high, delta),
        kl_coef=beta,
        reduction=reduction,
    )
    mine = fused_linear_grpo_loss(
        case.hidden, output, case.token_ids, case.token_advantages, case.mask, options, old_log_probs=sampled,
        ref_log_probs=ref, normalizer=float(case.mask.numel()) if reduction == "constant" else None, chunk_tokens=20,
    ).loss  # fmt: skip
    leaves = [x for x in (case.hidden, case.lm_head, bias) if x is not None]
    pairs = [(mine, theirs), *zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True)]
    return max(((a.float() - b.float()).abs() / (atol + rtol * b.float().abs())).max().item() for a, b in pairs)


def liger_defects() -> dict[str, str]:
    """What Liger answers where its answer is not that of the loss it names."""
    case, _ = small_case(torch.float32)
    mask, found = case.mask.to(torch.int64), {}
    args = (case.hidden, case.lm_head, case.token_ids)

    def theirs(mask: Tensor, advantages: Tensor, hidden: Tensor = case.hidden, **options: Any) -> float:
        return liger_loss(chunk_size=3, **options)(
            hidden, *args[1:], mask, advantages, old_per_token_logps=case.old_log_probs
        )[0].item()

    def mine(
        mask: Tensor, advantages: Tensor, hidden: Tensor = case.hidden, reduction: Reduction = "token_mean"
    ) -> float:
        output, options = OutputLayer(case.lm_head), LossOptions(reduction=reduction)
        return fused_linear_grpo_loss(
            hidden, output, case.token_ids, advantages, mask, options, old_log_probs=case.old_log_probs
        ).loss.item()

    tokens = case.token_advantages * torch.linspace(0.5, 1.5, case.mask.shape[1])
    try:
        found["token advantages [batch, time]"] = f"{theirs(mask, tokens):.6f}, right {mine(case.mask, tokens):.6f}"
    except RuntimeError as error:
        found["token advantages [batch, time]"] = f"fails: {error}"
    hidden = torch.where(case.mask[..., None], case.hidden.detach(), torch.nan)
    found["NaN in the padding"] = (
        f"{theirs(mask, case.advantages, hidden):.6f}, right {mine(case.mask, case.token_advantages, hidden):.6f}"
    )
    empty = case.mask.clone()
    empty[1] = False
    found["sequence mean with a response of no tokens"] = (
        f"{theirs(empty.to(torch.int64), case.advantages, loss_type='grpo'):.6f} (divides by all rows), "
        f"{mine(empty, case.token_advantages, reduction='sequence_mean'):.6f} over the responses there are"
    )
    return found


def machine(device: str) -> dict[str, str]:
    versions = {}
    for name in ("torch", "srpo-core", "trl", "liger-kernel", "verl"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        amx = "with" if "amx_bf16" in fields.get("flags", "") else "without"
        processor = f"{fields.get('model name', processor)} (model {fields.get('model')}, {amx} AMX bfloat16)"
    hardware = processor if device == "cpu" else torch.cuda.get_device_name()
    return {"hardware": hardware, "python": platform.python_version(), **versions}


@app.command()
def page(
    source: Path = RESULTS / "fused_loss.json",
) -> None:
    """Print the tables, and write them beside the JSON as Markdown and as a plot."""
    results = json.loads(source.read_text())
    parts = [" · ".join(f"{key} {value}" for key, value in results["machine"].items())]
    for task in TASKS:
        rows = [row for row in results["rows"] if row["task"] == task]
        if not rows:
            continue
        names = [name for name in TASKS[task].contestants if any(name in row["contestants"] for row in rows)]
        table = [["size", *names, "goal", "best chunked peer / ours"]]
        for row in rows:
            ratios = {name: timing["ratio"] for name, timing in row["contestants"].items()}
            cells = [f"{ratios[name]:.2f}" if name in ratios else row["out"][name].split(":")[0] for name in names]
            peers = [ratios[name] for name in CHUNKED if name in ratios]
            lead = f"{min(peers) / ratios['ours']:.2f}" if peers else "-"
            table.append([row["size"], *cells, f"{row['goal']:.2f}", lead])
        parts.append(f"### {task}\n\n" + markdown(table))
        show(task, table)
    for row in results["memory"]:
        names = list(row["peak_mib"])
        table = [["size", *names, "gradients", "gradients + buffers"]]
        table.append([row["size"], *(f"{row['peak_mib'][name]:.0f}" for name in names), f"{row['gradients_mib']:.0f}",
                      f"{row['gradients_mib'] + row['buffers_mib']:.0f}"])  # fmt: skip
        parts.append("### peak memory over the inputs, MiB\n\n" + markdown(table))
        show("memory, MiB", table)
    compared = source.with_name("fused_loss_liger.json")
    if compared.exists():
        found = json.loads(compared.read_text())
        table = [["what is passed", "Liger-Kernel's loss"], *map(list, found["defects"].items())]
        parts.append(
            f"### Liger-Kernel's published settings\n\n{found['within']} of {found['settings']} agree within the "
            f"tolerances of its own tests; the worst uses {found['worst']:.0%} of its tolerance. Where its answer is "
            f"another:\n\n{markdown(table)}"
        )
        show("Liger-Kernel", table)
    source.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    draw(results, source.with_suffix(".png"))


def markdown(table: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def show(title: str, table: list[list[str]]) -> None:
    drawn = Table(title=title)
    for name in table[0]:
        drawn.add_column(name, justify="left" if name == "size" else "right")
    for row in table[1:]:
        drawn.add_row(*row)
    console.print(drawn)


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["task"] == "train"]
    if not rows:
        return
    figure, axes = pyplot.subplots(1, len(rows), figsize=(3 * len(rows), 3.2), sharey=True)
    for axis, row in zip([axes] if len(rows) == 1 else axes, rows, strict=True):
        names = [name for name in TASKS["train"].contestants if name in row["contestants"]]
        ratios = [row["contestants"][name]["ratio"] for name in names]
        bars = axis.barh(names, ratios, color=["#2a78b8" if name.startswith("ours") else "#b8b8b8" for name in names])
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(row["size"], fontsize=9)
        axis.set_xlim(0, max(ratios) * 1.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of loss and gradients / time of the three matrix products", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app()
