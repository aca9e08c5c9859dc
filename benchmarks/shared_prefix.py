"""Time and memory of scoring SRPO's views with shared prefixes, against plain log-prob passes of the same model.

    .venv-hf/bin/python -m benchmarks.shared_prefix run                 # about half an hour on one CPU core
    .venv-hf/bin/python -m benchmarks.shared_prefix run --device cuda   # a model of 3B parameters
    .venv-hf/bin/python -m benchmarks.shared_prefix page

Protocol: a Qwen2.5-VL architecture with random weights; one group of G responses to one prompt, three quarters of which
are image tokens; perceptions of different lengths. The plain pass is what GRPO makes for its old log-probs: every
response with its whole prompt and image, eight in a pass, log-probs from hidden states without logits in memory. Each
measurement runs in a process of its own, so that the peak of its memory is its own; a round has one of each kind, and
medians are taken over rounds. On a CPU: one thread, process time. A view's time is that of scoring with it, minus that
of scoring without it.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time as clock
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from srpo_core import Role, RolloutBatch, Segmentation, SRPOConfig, plan

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 8
VOCABULARY = 16_384
IMAGE, VISION_START, VISION_END, VIDEO = 16_000, 16_001, 16_002, 16_003
#: Rows and columns of image tokens, three quarters of a prompt.
GRIDS = {256: (16, 12), 1024: (32, 24), 4096: (64, 48)}
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=150)


class Cell(NamedTuple):
    """One group: how many responses, and how long everything is in tokens."""

    group: int
    prompt: int
    response: int
    perception: int


ACCEPTANCE = Cell(8, 1024, 256, 100)
#: The cheap ones first.
CELLS = sorted(
    [
        Cell(group, prompt, response, int(0.4 * response))
        for prompt in (256, 1024, 4096)
        for response in (128, 512)
        for group in (4, 8, 16)
    ],
    key=lambda each: each.group * (each.prompt + each.response),
)
CELLS.insert(0, ACCEPTANCE)


def make_model(device: str) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    # A model of 35M parameters for a CPU, the sizes of Qwen2.5-VL-3B for a card.
    small = device == "cpu"
    width, layers, heads, wide = (512, 6, 8, 1408) if small else (2048, 36, 16, 11_008)
    vision, depth, wide_vision = (256, 4, 704) if small else (1280, 32, 3420)
    head = width // heads
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY if small else 151_936, "hidden_size": width, "intermediate_size": wide,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 2,
            "max_position_embeddings": 32_768, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6,
                "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
            },
        },
        vision_config={
            "depth": depth, "hidden_size": vision, "intermediate_size": wide_vision, "num_heads": vision // 64 or 1,
            "out_hidden_size": width, "fullatt_block_indexes": [depth - 1] if small else [7, 15, 23, 31],
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return model.to(torch.float32 if small else torch.bfloat16).eval()


class Inputs(NamedTuple):
    """A group of responses and everything that scoring them takes."""

    prompts: list[Any]
    batch: Any
    planned: Any
    scorer: Any


def make_inputs(cell: Cell, device: str) -> Inputs:
    from srpo_hf import EncodedPrompt, Scorer

    g = torch.Generator().manual_seed(0)

    def words(count: int) -> torch.Tensor:
        return torch.randint(10, 15_000, (count,), generator=g)

    rows, columns = GRIDS[cell.prompt]
    image = torch.tensor([VISION_START, *[IMAGE] * (rows * columns), VISION_END])
    ids = torch.cat([words(8), image, words(cell.prompt - len(image) - 8)])
    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    pixels = torch.randn(4 * rows * columns, 3 * 2 * 14 * 14, generator=g)
    types = {"mm_token_type_ids": (ids == IMAGE).long()}
    prompt = EncodedPrompt(ids, types, {"pixel_values": pixels, "image_grid_thw": grid}, 1)

    token_ids = words(cell.group * cell.response).view(cell.group, cell.response)
    token_ids[:, 0] = 2  # all begin with the same tag, so that contexts of perceptions are equal
    roles = torch.full_like(token_ids, int(Role.REASONING))
    for row in range(cell.group):  # opening tag, perception, closing tag, opening tag, reasoning, closing tag, end
        length = int(cell.perception * (0.9 + 0.2 * row / (cell.group - 1)))
        roles[row, 1 : 1 + length] = int(Role.PERCEPTION)
        roles[row, [0, 1 + length, 2 + length, -2, -1]] = int(Role.OTHER)
        token_ids[row, 1 + length : 3 + length] = torch.tensor([3, 4])
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    nothing = torch.zeros(cell.group, dtype=torch.long)
    token_ids, mask, roles, nothing = (each.to(device) for each in (token_ids, mask, roles, nothing))
    batch = RolloutBatch(token_ids, mask, Segmentation(roles, nothing, torch.zeros_like(mask)), nothing)
    options = SRPOConfig()
    images = SimpleNamespace(do_normalize=True, image_mean=0.5, image_std=0.5, merge_size=2, temporal_patch_size=2)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), image_processor=images)
    scorer = Scorer(make_model(device), processor, options, batch_size=BATCH_SIZE)
    planned = plan(batch, options, has_images=True, pad_token_id=0)
    return Inputs([prompt] * cell.group, batch, planned, scorer)


def first_row(batch: Any) -> Any:
    parts = (batch.token_ids[:1], batch.mask[:1], type(batch.segmentation)(*(each[:1] for each in batch.segmentation)))
    return type(batch)(*parts, batch.group_ids[:1])


def plain_pass(inputs: Inputs, *, cut: bool = False) -> torch.Tensor:
    """Log-probs of every token; if `cut`, of perceptions alone, and no token behind them is read."""
    parts = [slice(at, at + BATCH_SIZE) for at in range(0, len(inputs.prompts), BATCH_SIZE)]
    batch, found = inputs.batch, []
    mask = batch.mask & (batch.segmentation.roles == int(Role.PERCEPTION)) if cut else batch.mask
    with torch.no_grad():
        for part in parts:
            rows = slice(part.start, min(part.stop, len(inputs.prompts)))
            found.append(inputs.scorer.log_probs(inputs.prompts[rows], None, batch.token_ids[rows], mask[rows]))
    return torch.cat(found)


def seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = clock.process_time()
        function()
        return clock.process_time() - start
    torch.cuda.synchronize()
    start = clock.perf_counter()
    function()
    torch.cuda.synchronize()
    return clock.perf_counter() - start


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@app.command()
def cell(
    way: Annotated[
        str, typer.Argument(help="plain or cut, or what is scored with shared prefixes: original, corrupted, all.")
    ],
    sizes: Annotated[str, typer.Argument(help="Group, prompt, response and perception, comma-separated.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure one cell in one way, in this process, and print JSON."""
    torch.set_num_threads(1)
    inputs = make_inputs(Cell(*map(int, sizes.split(","))), device)
    views = inputs.planned.views[: {"corrupted": 1, "all": 2}.get(way, 0)]
    planned, one = inputs.planned._replace(views=views), slice(1)
    before = resident_bytes(device)
    made: dict[str, Any] = {}
    if way in ("plain", "cut"):
        plain_pass(inputs._replace(prompts=inputs.prompts[one]))  # warm-up
        made["seconds"] = seconds(lambda: plain_pass(inputs, cut=way == "cut"), device)
    else:
        inputs.scorer.score(  # warm-up, in which the scorer compares itself with a plain pass
            inputs.prompts[one], None, first_row(inputs.batch), planned._replace(views=())
        )
        found: list[Any] = []
        made["seconds"] = seconds(
            lambda: found.append(inputs.scorer.score(inputs.prompts, None, inputs.batch, planned)), device
        )
        made["model_tokens"] = {name: work.model_tokens for name, work in found[0].work.items()}
        made["output_tokens"] = {name: work.output_tokens for name, work in found[0].work.items()}
    made["bytes"] = peak_bytes(device) - before
    print(json.dumps(made))


@app.command()
def run(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Of which the median is taken, in each cell.")] = 3,
    cells: Annotated[str, typer.Option(help="Comma-separated places in the list of cells, or all.")] = "all",
    out: Annotated[Path, typer.Option(help="JSON; a row of the same cell and device is replaced.")] = RESULTS
    / "shared_prefix.json",
) -> None:
    """Measure every cell, write the JSON and print the table."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    for chosen in CELLS if cells == "all" else [CELLS[int(at)] for at in cells.split(",")]:
        row = measured(chosen, device, rounds)
        same = ("device", *Cell._fields)
        results["rows"] = [r for r in results["rows"] if any(r[key] != row[key] for key in same)] + [row]
        out.write_text(json.dumps(results, indent=1) + "\n")
        console.print(*chosen, {name: round(value, 3) for name, value in ratios(row).items()})
    console.print(table(results["rows"]))


WAYS = ("plain", "cut", "original", "corrupted", "all")


def measured(chosen: Cell, device: str, rounds: int) -> dict[str, Any]:
    """One cell in every way, each measurement in a process of its own."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.shared_prefix", "cell", way]
            command += [",".join(map(str, chosen)), "--device", device]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found[way].append(json.loads(done.stdout.strip().splitlines()[-1]))

    def median(way: str, what: str) -> float:
        return statistics.median(each[what] for each in found[way])

    tokens = {key: found["all"][0][key] for key in ("model_tokens", "output_tokens")}
    return {
        "device": device,
        **chosen._asdict(),
        "rounds": rounds,
        "machine": machine(device),
        "seconds": {way: median(way, "seconds") for way in WAYS},
        "bytes": {way: median(way, "bytes") for way in WAYS},
        **tokens,
    }


@app.command()
def page(source: Annotated[Path, typer.Argument(help="What `run` wrote.")] = RESULTS / "shared_prefix.json") -> None:
    """Write the Markdown and the picture of what was measured."""
    rows = json.loads(source.read_text())["rows"]
    source.with_suffix(".md").write_text(markdown(rows))
    picture(rows, source.with_suffix(".png"))
    console.print(table(rows))


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Times over that of one plain log-prob pass; tokens over those that it reads; memory over its peak."""
    taken, tokens = row["seconds"], row["model_tokens"]
    plain = taken["plain"]
    # The last token of a response is predicted, not read.
    all_tokens = row["group"] * (row["prompt"] + row["response"] - 1)
    return {
        "plain, cut": taken["cut"] / plain,
        "original": taken["original"] / plain,
        "corrupted": (taken["corrupted"] - taken["original"]) / plain,
        "swap": (taken["all"] - taken["corrupted"]) / plain,
        "extra views": (taken["all"] - taken["original"]) / plain,
        "all views": taken["all"] / plain,
        "tokens, extra views": (tokens["corrupted"] + tokens["counterfactual"]) / all_tokens,
        "tokens, all views": sum(tokens.values()) / all_tokens,
        "memory": row["bytes"]["all"] / row["bytes"]["plain"],
    }


_COLUMNS = (
    "device", "G", "prompt", "response", "rounds", "plain pass, s", "plain, cut", "original", "corrupted",
    "swap", "extra views", "all views", "tokens, extra views", "tokens, all views", "memory",
)  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    ordered = sorted(rows, key=lambda r: (r["device"], r["prompt"], r["response"], r["group"]))
    return [
        (
            row["device"],
            *(str(row[key]) for key in ("group", "prompt", "response", "rounds")),
            f"{row['seconds']['plain']:.2f}",
            *(f"{value:.2f}" for value in ratios(row).values()),
        )
        for row in ordered
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(*_COLUMNS, title="time, tokens and memory over those of one plain log-prob pass")
    for line in lines(rows):
        made.add_row(*line)
    return made


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """What the cell that was chosen in advance says, beside what it was to say."""
    said = []
    for row in rows:
        if tuple(row[key] for key in Cell._fields) != ACCEPTANCE:
            continue
        found = ratios(row)
        for name, goal in (("extra views", 0.45), ("all views", 0.75), ("memory", 1.0)):
            verdict = "reached" if found[name] <= goal else "missed"
            said.append(f"- {row['device']}: {name} {found[name]:.2f}, goal at most {goal:.2f}: {verdict}")
    return said


def markdown(rows: list[dict[str, Any]]) -> str:
    head = "| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|\n"
    body = "".join("| " + " | ".join(line) + " |\n" for line in lines(rows))
    machines = "".join(f"- {each}\n" for each in sorted({row["machine"] for row in rows}))
    size = ", ".join(f"{key} {value}" for key, value in ACCEPTANCE._asdict().items())
    found = "\n".join(goals(rows))
    return (
        "# Shared prefixes against plain passes\n\n"
        "Made by `python -m benchmarks.shared_prefix`, whose first lines say how. All columns after the seconds are\n"
        "ratios to one plain log-prob pass over the same responses: its time, the tokens that it reads, its peak\n"
        "memory beside the model. *Extra views* are the corrupted and the swapped one; *all views* adds the original.\n"
        "*Plain, cut* is a plain pass that scores perceptions alone and reads nothing behind them.\n"
        f"\n{machines}\nThe cell that was chosen in advance ({size}):\n\n{found}\n\n{head}{body}"
    )


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda r: (r["device"], r["prompt"], r["response"], r["group"]))
    names = [
        f"{r['prompt']} + {r['response']}, G = {r['group']}{'' if r['device'] == 'cpu' else ', GPU'}" for r in rows
    ]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.4))
    left = [0.0] * len(rows)
    for part, color in (("original", "#b8b8b8"), ("corrupted", "#2a78b8"), ("swap", "#e08a1e")):
        widths = [ratios(row)[part] for row in rows]
        axis.barh(names, widths, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("time / time of one plain log-prob pass over the same responses")
    axis.set_title("tokens of prompt + response, G responses", loc="left", fontsize=9)
    axis.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16"
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, one thread, torch {torch.__version__}, float32"


if __name__ == "__main__":
    app()
