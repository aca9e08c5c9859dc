"""The trainer of the documentation, run on a tiny model: it trains, writes what it did, and at strength 0 is GRPO."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from rollout_folder import make_image, make_model

from srpo_core import SRPOConfig, group_advantages, token_log_probs
from srpo_core.rollouts import read_rollouts

PATH = Path(__file__).parents[3] / "docs/examples/own_trainer_hf.py"
SIZES = ["--steps", "2", "--prompts", "2", "--group", "4", "--micro-batch", "3", "--max-tokens", "12", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def trainer():
    spec = importlib.util.spec_from_file_location("own_trainer_hf", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def problems(tmp_path):
    lines = []
    for number in range(3):
        make_image(number).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": f"how many? {number}", "answer": number})
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Rewarded:
    """Every second response is right, and has the structure: a random model would have neither."""

    def __init__(self, trainer, monkeypatch, processor):
        self.batches = []
        generate = trainer.generate
        texts = [
            f"<perception>a{n}</perception><think>b{n}</think><answer>{n % 2}</answer><|im_end|>" for n in range(8)
        ]
        rows = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, rows))
        token_ids = torch.tensor([row + [processor.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < torch.tensor(list(map(len, rows)))[:, None]

        def answer(model, processor, prompts, images, ending, args):
            own, own_mask = generate(model, processor, prompts, images, ending, args)
            assert own.shape == own_mask.shape
            assert own.shape[1] <= args.max_tokens
            for row, real in zip(own, own_mask, strict=True):  # all up to the token that ends it
                ends = [place for place, token in enumerate(row.tolist()) if token in ending]
                assert real.tolist() == [place <= min(ends, default=len(row)) for place in range(len(row))]
            self.batches.append((prompts, images, token_ids, mask))
            return token_ids, mask

        monkeypatch.setattr(trainer, "generate", answer)
        read = trainer.read_problems
        monkeypatch.setattr(trainer, "read_problems", lambda path: [each | {"answer": 1} for each in read(path)])


def run(trainer, problems, tmp_path, *, strength, name="run"):
    model, processor = make_model()
    torch.manual_seed(0)
    rollouts = tmp_path / f"{name}.jsonl"
    args = trainer.arguments(["--model", "-", "--data", str(problems), "--rollouts", str(rollouts), *SIZES])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = list(trainer.train(model, processor, trainer.read_problems(problems), SRPOConfig(strength=strength), args))
    moved = [bool((old != new).any()) for old, new in zip(before, model.parameters(), strict=True)]
    return losses, model, moved, rollouts


def test_it_trains_and_says_what_it_did(trainer, problems, tmp_path, monkeypatch, capsys):
    Rewarded(trainer, monkeypatch, make_model()[1])
    losses, _, moved, rollouts = run(trainer, problems, tmp_path, strength=1.0)
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert sum(moved) > len(moved) / 2
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["step 0", "step 1"]
    assert "8 of 8 responses are well-formed" in said[0]
    assert "50 % of the answers are right" in said[0]
    assert "gradient norm" in said[0]
    lines = list(read_rollouts(rollouts))
    assert [line.step for line in lines] == [0] * 8 + [1] * 8
    assert [line.correct for line in lines[:8]] == [False, True] * 4
    assert all((rollouts.parent / line.image).is_file() and line.corrupted_log_probs is not None for line in lines)
    assert any((line.weights != 1).any() for line in lines)


def test_without_strength_it_is_grpo_written_by_hand(trainer, problems, tmp_path, monkeypatch):
    rewarded = Rewarded(trainer, monkeypatch, make_model()[1])
    losses, trained, _, _ = run(trainer, problems, tmp_path, strength=0.0)

    model, processor = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for loss, (prompts, images, token_ids, mask) in zip(losses, rewarded.batches, strict=True):
        rewards = torch.tensor([0.0, 1.0] * 4)
        advantages = group_advantages(rewards, torch.tensor([0] * 4 + [1] * 4))
        total = 0.0
        for row in range(8):
            inputs = dict(processor(text=[prompts[row]], images=[images[row]], return_tensors="pt"))
            ids, prompt_time = token_ids[row][mask[row]][None], inputs["input_ids"].shape[1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
            log_probs = token_log_probs(model(**inputs).logits[:, prompt_time - 1 : -1], ids)
            ratio = (log_probs - log_probs.detach()).exp()  # on-policy: GRPO's ratio is 1
            total = total - (ratio * advantages[row]).sum() / mask.sum()
        total.backward()
        assert loss == pytest.approx(total.item(), abs=1e-5)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for own, other in zip(trained.parameters(), model.parameters(), strict=True):
        # Adam divides a gradient by its own size: where that is rounding, so is the step.
        torch.testing.assert_close(own, other, atol=2.1e-3, rtol=0)
    apart = torch.cat(
        [(a - b).detach().abs().flatten() for a, b in zip(trained.parameters(), model.parameters(), strict=True)]
    )
    assert (apart > 1e-4).float().mean() < 0.01


def test_with_strength_it_is_another_run(trainer, problems, tmp_path, monkeypatch):
    Rewarded(trainer, monkeypatch, make_model()[1])
    (first, _), grpo, *_ = run(trainer, problems, tmp_path, strength=0.0, name="grpo")
    (again, _), weighted, *_ = run(trainer, problems, tmp_path, strength=1.0, name="srpo")
    same, *_ = run(trainer, problems, tmp_path, strength=0.0, name="again")
    assert same[0] == first
    assert again != first
    assert any((a != b).any() for a, b in zip(grpo.parameters(), weighted.parameters(), strict=True))


def test_it_is_short_enough_to_be_read():
    assert len(PATH.read_text().splitlines()) <= 150
