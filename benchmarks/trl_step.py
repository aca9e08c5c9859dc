"""What an optimizer step of SRPOTrainer costs over one of TRL's GRPOTrainer, and where the time goes.

    .venv-trl/bin/python -m benchmarks.trl_step run     # some ten minutes on a CPU
    .venv-trl/bin/python -m benchmarks.trl_step page

Protocol: the model of benchmarks/shared_prefix.py, a Qwen2.5-VL architecture with random weights, and one group of
responses to one prompt, three quarters of which are image tokens. The model generates as many tokens as a response
has. A random model writes no perception, so that responses with the structure then take the place of what it wrote. The
trainers run by turns, one step each, and their first steps are left out. On a CPU: one thread, process time, so that
what else the machine does weighs less. *Over GRPO* is the step over GRPO's of the same round; *over the rest* is the
step over the same step without SRPO's part, which no noise between two steps can move.
"""

import json
import platform
import random
import statistics
import tempfile
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.shared_prefix import GRIDS, IMAGE, VIDEO, VISION_END, VISION_START, VOCABULARY, make_model

RESULTS = Path(__file__).parent / "results"
TAGS = ["<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>"]
NAMED = {"<|endoftext|>": 0, "<|im_end|>": 1, "<|im_start|>": 2, "user": 3, "assistant": 4}
NAMED |= {tag: 5 + index for index, tag in enumerate(TAGS)}
NAMED |= {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
NAMED |= {"<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END}
CELL = 28  # pixels along what one token of the language model sees
WAYS = ("GRPO", "SRPO, prefixes shared", "SRPO, plain passes")
PARTS = ("generation", "SRPO", "loss and update", "rest")
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=120)


def now() -> float:
    """Seconds of this process on a CPU; where a GPU is in use, of the clock, once its work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return clock.perf_counter()
    return clock.process_time()


def make_processor(prompt_tokens: int) -> Any:
    """A tokenizer of words and Qwen's image processor, without videos, which would need torchvision."""
    from srpo_trl.example import TEMPLATE, ImageProcessor
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    taken = {index: name for name, index in NAMED.items()}
    vocabulary = {taken.get(index, f"w{index}"): index for index in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w100"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMED if "|" in name])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    rows, columns = GRIDS[prompt_tokens]
    pixels = rows * columns * CELL**2
    images = Qwen2VLImageProcessorPil(patch_size=CELL // 2, merge_size=2, min_pixels=pixels, max_pixels=pixels)
    return ImageProcessor(images, tokenizer, chat_template=TEMPLATE)


class Rollouts:
    """TRL's `rollout_func`: the model generates, and structured responses of the same length take its place."""

    def __init__(self, response: int, perception: int) -> None:
        self.response, self.perception = response, perception
        self.seconds = 0.0
        self._draw = random.Random(0)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        started = now()
        processor, model = trainer.processing_class, trainer.model
        images = [
            part["image"] for chat in prompts for message in chat for part in message["content"] if "image" in part
        ]
        texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
        model.eval()
        with torch.no_grad():
            length = {"min_new_tokens": self.response, "max_new_tokens": self.response}
            model.generate(**inputs.to(model.device), do_sample=True, use_cache=True, **length)
        model.train()
        ids = [
            row[real.bool()].tolist() for row, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        completions = [self._write() for _ in prompts]
        self.seconds = now() - started
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def _write(self) -> list[int]:
        def words(count: int) -> list[int]:
            return [self._draw.randrange(100, 15_000) for _ in range(count)]

        opened, closed, think, thought, answer, answered = (NAMED[tag] for tag in TAGS)
        # Perceptions differ in length, as those of a group do.
        seen = self.perception + self._draw.randrange(-self.perception // 4, self.perception // 4 + 1)
        end = [thought, answer, *words(1), answered, NAMED["<|im_end|>"]]
        rest = self.response - seen - 3 - len(end)
        return [opened, *words(seen), closed, think, *words(rest), *end]


def make_trainer(
    way: str, *, prompt: int, response: int, perception: int, group: int, device: str = "cpu"
) -> tuple[Any, Rollouts]:
    from datasets import Dataset
    from PIL import Image
    from srpo_trl import SRPOConfig, SRPOTrainer
    from trl import GRPOConfig, GRPOTrainer

    rows, columns = GRIDS[prompt]
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 255, (rows * CELL, columns * CELL, 3), dtype=np.uint8) for _ in range(4)]
    question = " ".join(f"w{100 + index}" for index in range(prompt - rows * columns - 12))
    problems = [{"prompt": [{"role": "user", "content": question}], "image": Image.fromarray(each)} for each in noise]
    rollouts, is_grpo = Rollouts(response, perception), way == "GRPO"
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": group,
        "num_generations": group,
        "max_completion_length": response,
        "learning_rate": 1e-6,
        "max_steps": 10**6,
        "report_to": [],
        "use_cpu": device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = (GRPOTrainer if is_grpo else SRPOTrainer)(
        model=make_model(device),
        reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
        args=(GRPOConfig if is_grpo else SRPOConfig)(**options),
        train_dataset=Dataset.from_list(problems),
        processing_class=make_processor(prompt),
        rollout_func=rollouts,
    )
    if way == "SRPO, plain passes":
        trainer._srpo_scorer = None
    return trainer, rollouts


def stepper(trainer: Any, rollouts: Rollouts) -> Callable[[], dict[str, float]]:
    """Makes one optimizer step, by the trainer's own functions, and returns the seconds of each part."""
    trainer.create_optimizer_and_scheduler(10**6)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as Trainer.train sets it
    batches = iter(trainer.get_train_dataloader())
    scoring: list[float] = []
    if hasattr(trainer, "_srpo_rollouts"):  # all that SRPO adds to a step is from here to its log
        began, told = trainer._srpo_rollouts, trainer._srpo_write

        def begin(*args: Any) -> Any:
            scoring.append(-now())
            return began(*args)

        def end(*args: Any) -> None:
            told(*args)
            scoring[-1] += now()

        trainer._srpo_rollouts, trainer._srpo_write = begin, end

    def step() -> dict[str, float]:
        rows = next(batches)
        started = now()
        made = trainer._generate_and_score_completions(rows)
        prepared = now()
        loss = trainer.compute_loss(trainer.model, made)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer._step += 1
        ended = now()
        ours = scoring[-1] if scoring else 0.0
        parts = {"generation": rollouts.seconds, "SRPO": ours, "loss and update": ended - prepared}
        return parts | {"rest": ended - started - sum(parts.values()), "step": ended - started}

    return step


@app.command()
def run(
    prompt: int = 1024,
    response: int = 256,
    perception: int = 100,
    group: int = 8,
    rounds: int = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Where the numbers go.")] = RESULTS / "trl_step.json",
) -> None:
    """Measure, and write the numbers and the page."""
    sizes = {"prompt": prompt, "response": response, "perception": perception, "group": group}
    torch.set_num_threads(1)
    steppers = {way: stepper(*make_trainer(way, device=device, **sizes)) for way in WAYS}
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, step in steppers.items():
            seconds = step()
            console.print(f"round {number}, {way}: {seconds['step']:.1f} s")
            if number:
                measured[way].append(seconds)
    from importlib.metadata import version

    about = {name: version(name) for name in ("torch", "transformers", "trl", "srpo-core")}
    about |= {"threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}
    about |= {} if device == "cpu" else {"device": torch.cuda.get_device_name()}
    output.write_text(json.dumps({"sizes": sizes, "about": about, "rounds": measured}, indent=1) + "\n")
    page(output)


@app.command()
def page(source: Annotated[Path, typer.Argument()] = RESULTS / "trl_step.json") -> None:
    """Print the table and write it beside the numbers."""
    found = json.loads(source.read_text())
    base = statistics.median(each["step"] for each in found["rounds"]["GRPO"])
    head = ["trainer", *PARTS, "step, s", "over GRPO", "over the rest"]
    rows = []
    for way, rounds in found["rounds"].items():
        middle = {name: statistics.median(each[name] for each in rounds) for name in (*PARTS, "step")}
        shares = [f"{middle[name]:.1f} s ({middle[name] / middle['step']:.0%})" for name in PARTS]
        # Of the same round: what else the machine does then weighs on both.
        ratios = [own["step"] / its["step"] for own, its in zip(rounds, found["rounds"]["GRPO"], strict=True)]
        alone = statistics.median(own["step"] / (own["step"] - own["SRPO"]) for own in rounds)
        rows.append([way, *shares, f"{middle['step']:.1f}", f"{statistics.median(ratios):.2f}", f"{alone:.2f}"])
    table = Table(title="an optimizer step")
    for name in head:
        table.add_column(name, justify="left" if name == "trainer" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    sizes, about = found["sizes"], " · ".join(f"{name} {value}" for name, value in found["about"].items())
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    source.with_suffix(".md").write_text(
        f"{about}\n\nA group of {sizes['group']} responses of {sizes['response']} tokens, about {sizes['perception']} "
        f"of them perception, to a prompt of {sizes['prompt']} tokens; GRPO's step of {base:.1f} s is 1.\n\n"
        + "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])
        + "\n"
    )


if __name__ == "__main__":
    app()
