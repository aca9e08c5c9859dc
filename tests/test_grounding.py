"""The grounding benchmark: is its world true, are its metrics exact, is its trainer what it claims to be?"""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch import Generator, Tensor

from benchmarks.grounding import train as training
from benchmarks.grounding.arms import with_corrupted_image, with_other_perception
from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.runs import Study, run_all
from benchmarks.grounding.train import (
    METHODS,
    SRPO,
    Batch,
    TrainConfig,
    log_probs_of,
    new_log_probs,
    plan_views,
    roll_out,
    score,
    train,
)
from benchmarks.grounding.warm_start import WarmStartConfig, warm_start
from benchmarks.grounding.world import (
    BACKGROUND,
    COLORS,
    EOS,
    GRID,
    ID,
    PAD,
    PATCH,
    PLACES,
    RGB,
    SPLITS,
    PriorClash,
    Problems,
    measure,
    read,
    reward,
    to_words,
)
from srpo_core import Role, SRPOConfig, grpo_loss, srpo_loss

WORLD = PriorClash(filler=1)
BRIEF = WarmStartConfig(
    max_steps=60, batch_size=16, learning_rate=5e-3
)  # learns the format of a response and little else
TINY = TrainConfig(steps=2, prompts=6, group_size=4)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def writer() -> TinyVLM:
    return warm_start(WORLD, BRIEF, seed=0)


# ---------------------------------------------------------------------------------------------------------------- world


def recount(image: Tensor) -> list[int]:
    """How many cells hold each color, from the pixels: the palette color that the drawn pixels point to."""
    cells = rearrange(image, "c (row down) (column right) -> (row column) (down right) c", row=GRID, column=GRID)
    counts = [0] * len(COLORS)
    for pixels in cells:
        drawn = pixels[(pixels - BACKGROUND).abs().max(1).values > 0.1]
        if len(drawn) > 0:
            tint = drawn.mean(0)
            similarity = torch.nn.functional.cosine_similarity(tint[None], RGB)
            counts[similarity.argmax()] += 1
    return counts


@pytest.mark.parametrize("split", ["train", "aligned", "neutral", "conflict", "swapped", "low_contrast"])
def test_the_image_shows_what_the_truth_says(split):
    problems = PriorClash(pixel_noise=0.0).sample(40, split, seeded())
    assert problems.images.shape == (40, 3, GRID * PATCH, GRID * PATCH)
    for image, colors, counts in zip(problems.images, problems.colors, problems.counts, strict=True):
        image = BACKGROUND + (image - BACKGROUND) / 0.6 if split == "low_contrast" else image
        found = recount(image)
        assert [found[color] for color in colors] == counts.tolist()


def test_a_blind_image_shows_nothing():
    problems = PriorClash(pixel_noise=0.0).sample(8, "blind", seeded())
    assert (problems.images == BACKGROUND).all()
    assert problems.answers.float().mean() > 1


def test_the_shifted_split_draws_other_shapes_and_tints():
    usual, shifted = (PriorClash(pixel_noise=0.0).sample(64, split, seeded()) for split in ("conflict", "shifted"))

    def filled(problems: Problems) -> set[int]:
        drawn = ((problems.images - BACKGROUND).abs() > 1e-3).any(1)
        cells = rearrange(drawn, "n (row down) (column right) -> (n row column) (down right)", down=PATCH, right=PATCH)
        return set(cells.sum(1).tolist()) - {0}

    assert not filled(usual) & filled(shifted)
    assert torch.equal(usual.counts, shifted.counts)


def test_questions_name_what_they_ask_and_suggest_what_the_split_says():
    for split in SPLITS:
        problems = WORLD.sample(60, split, seeded(1))
        shortcuts = problems.shortcut.tolist()
        for question, colors, shortcut in zip(problems.questions, problems.colors.tolist(), shortcuts, strict=True):
            words = to_words(question)
            assert [words[1], words[3]] == [COLORS[color] for color in colors]
            assert words[5] == (PLACES[shortcut] if shortcut >= 0 else "picture")
        if split != "swapped":  # there the suggestion is true of another image
            right = (problems.shortcut == problems.answers).float().mean().item()
            assert right == (1.0 if split == "aligned" else 0.0)
        assert problems.images.min() >= 0
        assert problems.images.max() <= 1
    mixture = WORLD.sample(2000, "train", seeded(2))
    assert (mixture.shortcut == mixture.answers).float().mean() == pytest.approx(WORLD.shortcut_right, abs=0.04)


# -------------------------------------------------------------------------------------------------- reading and metrics

RIGHT = "<perception> so red 3 well blue 2 </perception> <think> 3 plus 2 is 5 </think> <answer> 5 </answer> <eos>"


def responses(*texts: str) -> Tensor:
    rows = [[ID[word] for word in text.split()] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def red_and_blue(n: int, *, shortcut: int = 4) -> Problems:
    """Questions about three red and two blue shapes."""
    return Problems(
        images=torch.zeros(n, 3, 32, 32),
        questions=torch.zeros(n, 7, dtype=torch.long),
        colors=torch.tensor([[0, 2]] * n),
        counts=torch.tensor([[3, 2]] * n),
        shortcut=torch.full((n,), shortcut),
        readings=torch.tensor([[3, 0, 2, 0]] * n),
        hints=torch.full((n, 4), -1),
    )


@pytest.mark.parametrize(
    ("text", "well_formed", "counts", "answer"),
    [
        (RIGHT, True, [3, 2], 5),
        (RIGHT.replace("red 3 well blue 2", "blue 2 red 3"), True, [3, 2], 5),
        (RIGHT.replace("<answer> 5", "<answer> 4"), True, [3, 2], 4),
        (RIGHT.replace("red 3", "red so"), True, [-1, 2], 5),
        (RIGHT.replace("red 3", "green 3"), True, [-1, 2], 5),
        (RIGHT.replace("<answer> 5", "<answer> red"), False, [3, 2], -1),
        (RIGHT.replace("<answer> 5 </answer>", "<answer> 5 5 </answer>"), False, [3, 2], -1),
        (RIGHT.replace(" </think>", ""), False, [3, 2], -1),
        (RIGHT.replace(" <eos>", " so"), False, [3, 2], -1),
        ("so " + RIGHT, False, [3, 2], -1),
        ("<perception> red 3 </perception> <think> blue 2 </think> <answer> 5 </answer> <eos>", True, [3, -1], 5),
    ],
)
def test_reading_hand_written_responses(text, well_formed, counts, answer):
    reading = read(responses(text), torch.tensor([[0, 2]]))
    assert reading.well_formed.tolist() == [well_formed]
    assert reading.counts.tolist() == [counts]
    assert reading.answer.tolist() == [answer]


def test_metrics_tell_grounded_from_lucky():
    grounded, lucky = RIGHT, RIGHT.replace("red 3", "red 2")
    bad_thinking, both_wrong = RIGHT.replace("<answer> 5", "<answer> 4"), lucky.replace("<answer> 5", "<answer> 1")
    rates = measure(responses(grounded, grounded, lucky, bad_thinking, both_wrong), red_and_blue(5))
    assert rates["grounded"] == pytest.approx(0.4)
    assert [rates[kind] for kind in ("lucky", "bad_thinking", "both_wrong")] == pytest.approx([0.2] * 3)
    assert rates["answer"] == pytest.approx(0.6)
    assert rates["perception"] == pytest.approx(0.6)
    assert rates["count"] == pytest.approx(0.8)
    assert rates["bias"] == pytest.approx(0.2)  # the bad thinking, which says 4
    assert rates["consistent"] == pytest.approx(0.4)  # 2 + 2 is neither 5 nor 1
    assert rates["well_formed"] == 1.0


def test_the_reward_is_for_the_answer_alone():
    texts = RIGHT, RIGHT.replace("red 3", "red 0"), RIGHT.replace("<answer> 5", "<answer> 4"), RIGHT[:-6]
    assert reward(responses(*texts), red_and_blue(4)).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_demonstrations_err_as_often_as_told():
    problems = WORLD.sample(1500, "conflict", seeded())
    perfect = measure(WORLD.demonstrate(problems, seeded(), misread=0.0, shortcut=0.0), problems)
    assert perfect["grounded"] == perfect["well_formed"] == 1.0
    lazy = measure(WORLD.demonstrate(problems, seeded(), misread=0.0, shortcut=0.5), problems)
    assert lazy["bias"] == pytest.approx(0.5, abs=0.05)
    assert lazy["perception"] == 1.0
    # A slip off the end of the scale is no slip, hence 1 - 0.3 * (1 - 1/5).
    careless = measure(WORLD.demonstrate(problems, seeded(), misread=0.3, shortcut=0.0), problems)
    assert careless["count"] == pytest.approx(0.76, abs=0.04)
    assert careless["consistent"] == 1.0


# ---------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("generator", [seeded(3), None], ids=["sampled", "greedy"])
def test_generated_log_probs_are_those_of_a_full_pass(generator):
    torch.manual_seed(0)
    model, problems = TinyVLM(), WORLD.sample(5, "train", seeded())
    rollouts = model.generate(problems.images, problems.questions, max_tokens=20, group_size=3, generator=generator)
    full = log_probs_of(model, problems.repeat(3), rollouts.token_ids)
    torch.testing.assert_close(rollouts.log_probs[rollouts.mask], full[rollouts.mask], atol=1e-5, rtol=0)


def test_generation_stops_at_the_end(writer):
    problems = WORLD.sample(16, "train", seeded())
    token_ids, mask, _ = writer.generate(
        problems.images, problems.questions, max_tokens=40, group_size=2, generator=seeded(4)
    )
    ended = (token_ids == EOS) & mask
    assert ended.any(1).float().mean() > 0.5
    assert (ended.sum(1) <= 1).all()
    assert (token_ids[~mask] == PAD).all()
    assert torch.equal(mask, ended.int().cumsum(1) - ended.int() == 0)


def test_hidden_tokens_cannot_be_attended():
    torch.manual_seed(0)
    model, problems = TinyVLM(), WORLD.sample(2, "train", seeded())
    token_ids = WORLD.demonstrate(problems, seeded(), misread=0.0, shortcut=0.0)
    visible = torch.ones_like(token_ids, dtype=torch.bool)
    everything = model(problems.images, problems.questions, token_ids, visible)
    torch.testing.assert_close(everything, model(problems.images, problems.questions, token_ids))
    visible[:, 5] = False
    changed = token_ids.clone()
    changed[:, 5] = ID["?"]
    hidden, hidden_changed = (model(problems.images, problems.questions, ids, visible) for ids in (token_ids, changed))
    # The logits at a place are predicted from the tokens before it: place 6 is the hidden token's own prediction.
    torch.testing.assert_close(hidden[:, 7:], hidden_changed[:, 7:])
    assert not torch.allclose(hidden[:, 7:], everything[:, 7:])


# ---------------------------------------------------------------------------------------------------------------- loop


def plain_grpo(model: TinyVLM, batch: Batch):
    """GRPO as one would write it without this package's weights: the same credit for every token."""

    def loss_of(rows: Tensor):
        log_probs = new_log_probs(model, batch, rows)
        advantages = batch.advantages[rows][:, None].expand_as(log_probs)
        return grpo_loss(
            log_probs,
            advantages,
            batch.mask[rows],
            old_log_probs=batch.old_log_probs[rows],
            normalizer=batch.normalizer,
        )

    return loss_of


def by_hand(options: SRPOConfig):
    """SRPO without plan or credit: each pass on its own, then the weights and the loss of every update in one call."""

    def method(model: TinyVLM, batch: Batch):
        corrupted, replaced = with_corrupted_image(model, batch), with_other_perception(model, batch)
        assert not torch.equal(corrupted, batch.old_log_probs)
        assert not torch.equal(replaced, batch.old_log_probs)

        def loss_of(rows: Tensor):
            return srpo_loss(
                new_log_probs(model, batch, rows),
                batch.advantages[rows],
                batch.segmentation.roles[rows],
                batch.mask[rows],
                options,
                old_log_probs=batch.old_log_probs[rows],
                corrupted_log_probs=corrupted[rows],
                counterfactual_log_probs=replaced[rows],
                normalizer=batch.normalizer,
            )

        return loss_of

    return method


def trace(start: TinyVLM, method) -> list[Tensor]:
    """Every loss and gradient of two steps, and the parameters after them."""
    model = TinyVLM()
    model.load_state_dict(start.state_dict())
    seen: list[Tensor] = []

    def listening(model: TinyVLM, batch: Batch):
        loss_of = method(model, batch)

        def heard(rows: Tensor):
            output = loss_of(rows)
            gradients = torch.autograd.grad(output.loss, list(model.parameters()))
            seen.extend([output.loss.detach(), *gradients])
            return loss_of(rows)  # a loss has one backward

        return heard

    train(model, WORLD, listening, TINY, seed=0)
    return [*seen, *(parameter.detach() for parameter in model.parameters())]


@pytest.fixture(scope="module")
def grpo_trace(writer) -> list[Tensor]:
    return trace(writer, plain_grpo)


@pytest.mark.parametrize("method", [METHODS["grpo"], by_hand(SRPOConfig(strength=0.0))], ids=["grpo", "strength 0"])
def test_no_strength_is_grpo_bit_for_bit(writer, grpo_trace, method):
    found = trace(writer, method)
    assert len(found) == len(grpo_trace)
    assert all(torch.equal(a, b) for a, b in zip(found, grpo_trace, strict=True))


@pytest.mark.parametrize("options", [SRPOConfig(strength=0.0), SRPOConfig(mix=0.0)], ids=["strength", "mix"])
def test_no_view_is_scored_where_every_weight_is_one(writer, monkeypatch, options):
    batch, _ = roll_out(writer, WORLD, TINY, seeded(1), 1)
    monkeypatch.setattr(training, "score", lambda *args: pytest.fail("a view was scored"))
    credited = SRPO(options).credit_of(writer, batch)
    assert torch.equal(credited.weights, batch.mask.float())
    assert torch.equal(credited.advantages, batch.advantages[:, None] * batch.mask)


@pytest.mark.parametrize("options", [SRPOConfig(), SRPOConfig(baseline="median", mix=0.5, surrogate="cispo")])
def test_credit_given_once_trains_as_credit_given_at_every_update(writer, options):
    found, expected = trace(writer, SRPO(options)), trace(writer, by_hand(options))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "changes", [{}, {"corruption": "other_image"}, {"counterfactual": "mask", "reliance_spans": 2}]
)
def test_shared_prefixes_score_as_whole_passes_do(writer, changes):
    batch, _ = roll_out(writer, WORLD, replace(TINY, prompts=24), seeded(1), 1)
    options = SRPOConfig(**changes)
    views = plan_views(batch, options).views
    assert len(views) == 2 + options.reliance_spans
    for view in views:
        whole = score(writer, batch, view, options)
        shared = score(writer, batch, view, options, share_prefixes=True)
        real = batch.mask if view.responses is None else view.responses.mask
        assert real.any()
        torch.testing.assert_close(shared[real], whole[real], atol=1e-5, rtol=0)
    one, other = (SRPO(options, share_prefixes=share).weights(writer, batch) for share in (True, False))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_every_view_of_the_options_is_scored(writer):
    batch, _ = roll_out(writer, WORLD, replace(TINY, prompts=24), seeded(1), 1)
    usual = SRPO().credit_of(writer, batch)
    changes = {
        "corrupted_log_probs": [{"corruption": "noise"}, {"corruption_amount": 0.9}, {"seed": 1}],
        "counterfactual_log_probs": [
            {"counterfactual": "drop"}, {"counterfactual": "mask"}, {"counterfactual_image": "corrupted"},
        ],
        "scores": [{"reliance_spans": 2}],
    }  # fmt: skip
    for name, alternatives in changes.items():
        for options in alternatives:
            found = SRPO(SRPOConfig(**options)).credit_of(writer, batch)
            assert not torch.equal(getattr(found, name), getattr(usual, name)), options
            for other in changes.keys() - {name, "scores"}:
                assert torch.equal(getattr(found, other), getattr(usual, other)), options
    assert usual.metrics["swap/coverage"] > 0.5


def test_a_moving_average_is_refused():
    with pytest.raises(ValueError, match="ema_rms"):
        SRPO(SRPOConfig(scale="ema_rms"))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_fused_loss_gives_the_same_training(writer, strength):
    plain, fused = (trace(writer, SRPO(SRPOConfig(strength=strength), fused=fused)) for fused in (False, True))
    for expected, found in zip(plain, fused, strict=True):
        assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-6


def test_srpo_is_not_grpo(writer, grpo_trace):
    found = trace(writer, METHODS["srpo"])
    assert any(not torch.equal(a, b) for a, b in zip(found, grpo_trace, strict=True))


def test_a_batch_holds_live_groups_only(writer):
    batch, metrics = roll_out(writer, WORLD, replace(TINY, prompts=24), seeded(1), 1)
    assert 0 < len(batch.token_ids) < 24 * 4
    assert metrics["live"] == len(batch.token_ids) / (24 * 4)
    assert (batch.advantages != 0).all()
    for group in batch.group_ids.unique():
        assert batch.advantages[batch.group_ids == group].sum() == pytest.approx(0.0, abs=1e-5)
    assert (batch.old_log_probs <= 0).all()


def test_the_contexts_leave_what_they_must(writer):
    batch, _ = roll_out(writer, WORLD, replace(TINY, prompts=24), seeded(1), 1)
    roles = batch.segmentation.roles
    replaced = with_other_perception(writer, batch)
    perception = roles == int(Role.PERCEPTION)
    assert torch.equal(replaced[perception], batch.old_log_probs[perception])
    corrupted = with_corrupted_image(writer, batch)
    assert not torch.equal(corrupted[perception], batch.old_log_probs[perception])
    assert torch.equal(corrupted, with_corrupted_image(writer, batch))


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    out = tmp_path_factory.mktemp("study")
    return Study(out, WORLD, BRIEF, TINY, evaluation_size=32, evaluate_every=1)


@pytest.fixture(scope="module")
def results(study) -> list[dict]:
    return run_all(study, METHODS, [0], on_event=lambda event: None)


def test_finished_runs_are_found_and_others_are_not(study, results, tmp_path):
    shutil.copytree(study.out, tmp_path / "copy")

    def found(**changes) -> set[str]:
        events = []
        run_all(replace(study, out=tmp_path / "copy", **changes), METHODS, [0], on_event=events.append)
        return {event["who"] for event in events if event.get("found")}

    assert found() == {"warm start", "grpo", "srpo"}
    assert found(train=replace(TINY, learning_rate=1e-4)) == {"warm start"}


def run_until_killed(study):
    """In a process of its own: ends it without any farewell while the second batch is scored under its views."""
    torch.set_num_threads(1)  # as everywhere: sums depend on it
    whole_score, calls = training.score, []

    def score(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:  # two views before training, one of the first batch and now its other one
            os.kill(os.getpid(), signal.SIGKILL)
        return whole_score(*args, **kwargs)

    training.score = score
    run_all(study, {"srpo": SRPO()}, [0], on_event=lambda event: None)


def test_a_seed_determines_everything_even_after_a_kill(study, results, tmp_path):
    elsewhere = replace(study, out=tmp_path)
    # In other processes: a result must not depend on what ran before it.
    killed = multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(elsewhere,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert {path.name for path in tmp_path.rglob("*.json")} == {"seed0.json"}  # its warm start was finished
    again = run_all(elsewhere, {"srpo": SRPO()}, [0], workers=2, on_event=lambda event: None)[0]
    first = json.loads((study.out / "runs" / "srpo-lr0.0002-seed0.json").read_text())["result"]
    untimed = {"cpu_seconds": 0, "step_seconds": 0}
    assert again | untimed == first | untimed
