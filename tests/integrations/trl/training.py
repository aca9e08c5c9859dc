"""A training run in a second: tiny model, image prompts, structured completions that need no sampling."""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from srpo_trl import SRPOConfig, SRPOTrainer
from tiny_vlm import make_image, make_model
from trl import GRPOConfig, GRPOTrainer

import srpo_core

QUESTIONS = ["count?", "count it?", "count it it?", "what is it?"]


def make_dataset(rows: int = 8, *, images_per_row: Callable[[int], int] = lambda row: 1, start: int = 0) -> Dataset:
    """Prompts of different lengths and images of different sizes; rows without images if `images_per_row` says 0."""
    table = []
    for row in range(start, start + rows):
        sizes = [(56, 56), (84, 56), (56, 84)]
        images = [make_image(10 * row + n, sizes[(row + n) % 3]) for n in range(images_per_row(row))]
        prompt = [{"role": "user", "content": f"{QUESTIONS[row % 4]} {row}"}]
        table.append({"prompt": prompt} | ({"images": images} if images else {}))
    return Dataset.from_list(table)


def reward_vowels(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in completion[0]["content"])) for completion in completions]


class Rollouts:
    """TRL's public `rollout_func`: completions from a generator keyed on the call, one in four cut off at its end."""

    def __init__(self, seed: int = 0, calls: int = 0, log_prob: float = 0.0):
        self.seed, self.calls, self.log_prob = seed, calls, log_prob
        self.completions: list[list[int]] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        everyone = self.draw(len(prompts) * processes, trainer.processing_class.tokenizer)
        self.completions = everyone[process * len(prompts) : (process + 1) * len(prompts)]
        prompt_ids = trainer.processing_class.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        log_probs = [[self.log_prob] * len(completion) for completion in self.completions]
        return {"prompt_ids": prompt_ids, "completion_ids": self.completions, "logprobs": log_probs}

    def draw(self, rows: int, tokenizer: Any) -> list[list[int]]:
        generator = random.Random(1000 * self.seed + self.calls)
        self.calls += 1

        def words(least: int, most: int) -> str:
            return "".join(generator.choice("abcdefghio ") for _ in range(generator.randint(least, most)))

        completions = []
        for row in range(rows):
            text = f"<perception>x{words(3, 9)}</perception><think>{words(3, 9)}</think><answer>{words(1, 1)}</answer>"
            ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
            completions.append(ids[: len(ids) - 3] if row % 4 == 3 else ids)
        return completions


def make_trainer(
    trainer_class: type = SRPOTrainer,
    *,
    family: str = "qwen2_5_vl",
    model: Any = None,
    dataset: Dataset | None = None,
    rollouts: Any = None,
    reward: Any = reward_vowels,
    callbacks: list[Any] | None = None,
    tags_as_tokens: bool = True,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer with options that suit these tests; `srpo_*` options are dropped where the trainer is TRL's own."""
    is_srpo = trainer_class is not GRPOTrainer
    built, processor = make_model(family, tags_as_tokens=tags_as_tokens)
    model = built if model is None else model
    if options.get("beta"):  # the reference is loaded from where the model came from
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        model.config._name_or_path = folder
    defaults = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 64,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    options = {name: value for name, value in options.items() if is_srpo or not name.startswith("srpo_")}
    args = (SRPOConfig if is_srpo else GRPOConfig)(**defaults | options)
    rollouts = Rollouts() if rollouts is None else rollouts
    return trainer_class(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=make_dataset() if dataset is None else dataset,
        processing_class=processor,
        callbacks=callbacks,
        **({"rollout_func": rollouts} if rollouts else {}),
        **(trainer_options or {}),
    )


def train(trainer: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Logged losses and final parameters."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def rollout_batch(trainer: Any, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What the overridden hook returns for one generation batch."""
    rows = rows or next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    return trainer._generate_and_score_completions(rows)


class Made(NamedTuple):
    """A rollout batch as the core was given it, and what the core made of it."""

    batch: srpo_core.RolloutBatch
    passes: list[torch.Tensor]  # the responses as they are, then each view of the plan
    advantages: torch.Tensor
    credit: srpo_core.Credit


@contextmanager
def watching() -> Iterator[list[Made]]:
    """Every call of :func:`srpo_core.credit` by a trainer: all weights come from there."""
    found: list[Made] = []

    def watch(batch: Any, planned: Any, scored: Any, options: Any, **rest: Any) -> srpo_core.Credit:
        credit = srpo_core.credit(batch, planned, scored, options, **rest)
        passes = [rest["old_log_probs"], *(scored[view.name] for view in planned.views)]
        found.append(Made(batch, passes, rest["advantages"], credit))
        return credit

    with mock.patch("srpo_trl.trainer.credit", watch):
        yield found
