"""What corrupting a batch of images costs, in copies of its pixels.

    .venv/bin/python -m benchmarks.corruption
    .venv/bin/python -m benchmarks.corruption --device cuda

64 images of 448 x 448 pixels, 8 rollouts of each of 8 prompts, in three layouts and two dtypes. Interleaved rounds:
every kind, and ``pixel_values.clone()``, once each a round; reported is the median of the ratios to the copy of the
same round. ``patch_mask``, ``black`` and ``gray`` are meant to take at most 2.5 copies. The floor is one, because the
result is a new tensor; by rows it is one copy of each distinct image, and a comparison of the others.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from srpo_core import ContextOptions, corrupt_pixel_values
from srpo_core.options import CorruptionKind
from srpo_core.pixel_values import ImageFacts, corrupt_rows

PROMPTS, ROLLOUTS, SIDE = 8, 8, 448
FACTS = ImageFacts((0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 2, 2)
SHAPES = {
    "flattened": (1024, 1176),  # 32 x 32 patches of 14 pixels, two frames
    "images": (3, SIDE, SIDE),
    "images, padded": (3, SIDE, SIDE),
}
KINDS = [kind for kind in get_args(CorruptionKind) if kind != "none"]


def batch(layout: str, dtype: torch.dtype, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels, and what tells where the images are."""
    images, generator = PROMPTS * ROLLOUTS, torch.Generator().manual_seed(0)
    pixels = torch.randn(PROMPTS, *SHAPES[layout], generator=generator).repeat_interleave(ROLLOUTS, dim=0)
    where = {}
    if layout == "flattened":
        pixels, where["image_grid_thw"] = pixels.flatten(0, 1), torch.tensor([[1, 32, 32]] * images)
    if layout == "images, padded":
        where["image_sizes"] = torch.tensor([[SIDE - 140, SIDE]] * images)
        pixels[:, :, SIDE - 140 :] = 0.0
    return pixels.to(device, dtype), {name: value.to(device) for name, value in where.items()}


def contestants(layout: str, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """The copy, each kind, and the whole path of an adapter whose rows have a copy of the image each."""
    pixels, where = batch(layout, dtype, device)
    prompts = torch.arange(PROMPTS).repeat_interleave(ROLLOUTS)
    found: dict[str, Callable[[], Any]] = {"clone": pixels.clone}
    for kind in KINDS:

        def corrupt(kind: CorruptionKind = kind) -> Tensor:
            return corrupt_pixel_values(pixels, prompt_ids=prompts, kind=kind, **where, **FACTS._asdict())

        found[kind] = corrupt
    rows = [
        {"pixel_values": part, **{name: value[row : row + 1] for name, value in where.items()}}
        for row, part in enumerate(pixels.chunk(PROMPTS * ROLLOUTS))
    ]
    found["patch_mask, by rows"] = lambda: corrupt_rows(rows, prompts.tolist(), ContextOptions(), FACTS, step=0)
    return found


def seconds(function: Callable[[], Any], device: str) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Of each layout and dtype.")] = 5,
) -> None:
    """Print the table."""
    for layout in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            functions = contestants(layout, dtype, device)
            for function in functions.values():  # warm up
                function()
            times = [{name: seconds(each, device) for name, each in functions.items()} for _ in range(rounds)]
            table = Table("kind", "ms", "copies", title=f"{layout}, {dtype}, {device}")
            for name in functions:
                copies = statistics.median(each[name] / each["clone"] for each in times)
                table.add_row(name, f"{1e3 * statistics.median(each[name] for each in times):.1f}", f"{copies:.2f}")
            Console().print(table)


if __name__ == "__main__":
    typer.run(main)
