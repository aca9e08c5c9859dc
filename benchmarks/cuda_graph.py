"""Whether the losses wait for a GPU, and whether a CUDA graph can hold them: forward, backward, and new data in place.

    python -m benchmarks.cuda_graph --device cuda
    python -m benchmarks.cuda_graph --device cpu     # the same steps without a graph, to test this file

Each function runs where every synchronization is an error, then is captured. The graph is replayed on other inputs, and
loss and gradients have to equal those of a plain call.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from srpo_core import LossOptions, OutputLayer, SRPOConfig, fused_linear_grpo_loss, group_advantages, srpo_loss
from srpo_core.losses import grpo_loss
from srpo_core.surrogates import Surrogate

BATCH, TIME, WIDTH = 8, 128, 256


def make_inputs(vocabulary: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a step, in the place where a graph finds them again."""

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, device=device)

    rows = BATCH, TIME
    return {
        "hidden": (0.1 * torch.randn(*rows, WIDTH, device=device)).to(dtype).requires_grad_(),
        "weight": (0.1 * torch.randn(vocabulary, WIDTH, device=device)).to(dtype).requires_grad_(),
        "log_probs": (-rand(*rows)).requires_grad_(),
        "token_ids": torch.randint(vocabulary, rows, device=device),
        "old": -rand(*rows),
        "corrupted": -rand(*rows),
        "roles": torch.randint(3, rows, device=device),
        "mask": rand(*rows) < 0.9,
        "rewards": rand(BATCH).round(),
        "groups": torch.arange(BATCH, device=device) // 4,
    }


def refill(inputs: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in inputs.items():
            value.copy_(others[name])


def functions(inputs: dict[str, Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """Loss and gradients of a step, by name."""
    advantages, fixed = inputs["old"] * 2 + 1, (inputs["mask"],)

    def fused(surrogate: str) -> list[Tensor]:
        output = OutputLayer(inputs["weight"])
        loss, _ = fused_linear_grpo_loss(
            inputs["hidden"],
            output,
            inputs["token_ids"],
            inputs["rewards"][:, None].expand(BATCH, TIME),
            *fixed,
            LossOptions(surrogate=Surrogate.named(surrogate)),
            old_log_probs=inputs["old"],
        )
        return [loss.detach(), *torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])]

    def plain(surrogate: str) -> list[Tensor]:
        given = inputs["rewards"][:, None].expand(BATCH, TIME) if surrogate == "gspo" else advantages
        options = LossOptions(surrogate=Surrogate.named(surrogate))
        loss, _ = grpo_loss(inputs["log_probs"], given, *fixed, options, old_log_probs=inputs["old"])
        return [loss.detach(), *torch.autograd.grad(loss, [inputs["log_probs"]])]

    def srpo() -> list[Tensor]:
        # Without the check of rewards, which reads them: as in a step that is captured or compiled.
        found = group_advantages.__wrapped__(inputs["rewards"], inputs["groups"])  # type: ignore[attr-defined]
        others = {"old_log_probs": inputs["old"], "corrupted_log_probs": inputs["corrupted"]}
        loss, _ = srpo_loss(inputs["log_probs"], found, inputs["roles"], *fixed, SRPOConfig(), **others)
        return [loss.detach(), *torch.autograd.grad(loss, [inputs["log_probs"]])]

    made: dict[str, Callable[[], list[Tensor]]] = {"srpo_loss": srpo}
    for name in Surrogate.known():
        made[f"grpo_loss, {name}"] = lambda name=name: plain(name)
        made[f"fused_linear_grpo_loss, {name}"] = lambda name=name: fused(name)
    return made


def verdict(
    function: Callable[[], list[Tensor]], inputs: dict[str, Tensor], others: dict[str, Tensor], device: str
) -> str:
    """What happened, in a few words."""
    function()
    if device == "cpu":
        refill(inputs, others)
        return "ran" if all(value.isfinite().all() for value in function()) else "not finite"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        return f"waits: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = function()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return f"not captured: {error}"
    refill(inputs, others)
    graph.replay()
    equal = all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-6 + 1e-3 * float(b.abs().max()))
        for a, b in zip(captured, function(), strict=True)
    )
    return "captured" if equal else "captured, and wrong"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    vocabulary: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32_000,
) -> None:
    """Print the table; the exit status is 1 if a function waits, is not captured, or is wrong."""
    torch.manual_seed(0)
    table, good = Table("function", "dtype", "verdict", title=f"CUDA graphs, {device}"), True
    for dtype in (torch.float32, torch.bfloat16):
        inputs, others = (make_inputs(vocabulary, device, dtype) for _ in range(2))
        for name, function in functions(inputs).items():
            found = verdict(function, inputs, others, device)
            good &= found in ("ran", "captured")
            table.add_row(name, str(dtype).removeprefix("torch."), found)
    Console(width=120).print(table)
    raise typer.Exit(not good)


if __name__ == "__main__":
    typer.run(main)
