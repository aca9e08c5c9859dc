"""Supervised warm start: an imperfect teacher's responses, stopped while much is left to learn."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, nn

from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.world import Split, World, evidence, measure


@dataclass(frozen=True)
class WarmStartConfig:
    """What the teacher gets wrong, and when to stop listening."""

    misread: float = 0.3  # share of counts the teacher miscounts by one
    shortcut: float = 0.5  # share of answers that ignore the counts and follow the place
    shortcut_right: float = 0.8  # share of questions whose shortcut is right
    neutral: float = 0.1  # share of questions that suggest nothing
    evidence_weight: float = 1.0  # of the tokens that carry the answer, in the loss
    stop_at_perception: float | None = 0.6  # share of perceptions right, in 256 problems, at which to stop
    watched: Split = "conflict"  # the split of these problems
    max_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3


def warm_start(
    world: World,
    config: WarmStartConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, float], None] | None = None,
) -> TinyVLM:
    """A model that writes well-formed responses, reads part of the counts and follows the shortcut too often."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    model = new_model(world).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0) * (1 - 0.9 * step / config.max_steps)
    )
    biased = replace(world, shortcut_right=config.shortcut_right)
    plain = round(config.neutral * config.batch_size)
    for step in range(1, config.max_steps + 1):
        loss = torch.zeros((), device=device)
        mixture: dict[Split, int] = {"train": config.batch_size - plain, "neutral": plain}
        for split, n in mixture.items():
            if n == 0:
                continue
            problems = biased.sample(n, split, generator)
            responses = world.demonstrate(problems, generator, misread=config.misread, shortcut=config.shortcut).to(
                device
            )
            problems = problems.to(device)
            logits = model(problems.images, problems.questions, responses)
            weights = torch.where(evidence(responses, problems), config.evidence_weight, 1.0).flatten()
            losses = F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none")
            loss = loss + (weights * losses).sum() / weights.sum() * n / config.batch_size
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (100 if config.stop_at_perception is None else 20) == 0:
            perception = evaluate(model, world, config.watched, n=256, seed=step)["perception"]
            if on_progress is not None:
                on_progress(step, perception)
            if config.stop_at_perception is not None and perception >= config.stop_at_perception:
                break
    return model


def new_model(world: World) -> TinyVLM:
    return TinyVLM(patch=world.patch, cells=world.cells, vocabulary=len(world.vocabulary))


def evaluate(model: TinyVLM, world: World, split: Split, *, n: int, seed: int) -> dict[str, float]:
    """The exact rates (:func:`~benchmarks.grounding.world.measure`) of the model's likeliest responses."""
    problems = world.sample(n, split, Generator().manual_seed(seed)).to(model.device)
    rollouts = model.generate(problems.images, problems.questions, max_tokens=world.response_length + 2)
    return measure(rollouts.token_ids, problems)
