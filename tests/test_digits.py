"""The demo and its world: are the pages what the truth says, do the files and sentences say what the runs gave?"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor
from typer.testing import CliRunner

from benchmarks.grounding.demo import WARM_START, demonstrate
from benchmarks.grounding.digits import BLACK, CELLS, GRID, ID, INKS, PATCH, RGB, Digits, cells_of, draw, scans
from benchmarks.grounding.report import (
    accuracy_table,
    conclusions,
    enlarge,
    paired,
    specimens_of,
    summarize,
    what_to_do_next,
    what_was_learned,
    whether_they_differ,
    with_error,
    write_rollouts,
)
from benchmarks.grounding.runs import Study
from benchmarks.grounding.train import METHODS, SRPO, Batch, TrainConfig
from benchmarks.grounding.warm_start import new_model
from benchmarks.grounding.world import EOS, PAD, TAG_IDS, Problems, measure, read, reward, to_words
from srpo_core import segment_roles
from srpo_core.cli import demo as cli_demo
from srpo_core.cli.app import app
from srpo_core.rollouts import ScoringOptions, read_rollouts, score_rollouts

WORLD = Digits()


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------- world


def ink_of(cell: Tensor) -> tuple[int, Tensor] | None:
    """The color and the ink of a cell, by a search over all colors: the one that explains its pixels; None: paper."""
    if bool((cell == 1).all()):
        return None
    found = []
    for color in range(len(RGB)):
        darkest = int((1 - RGB[color]).argmax())
        ink = (1 - cell[darkest]) / (1 - RGB[color, darkest])
        drawn = 1 - ink * (1 - RGB[color])[:, None, None]
        found.append((float((drawn - cell).abs().max()), color, ink))
    error, color, ink = min(found, key=lambda each: each[0])
    assert error < 1e-5
    return color, ink[1:-1, 1:-1]


def scan_of(ink: Tensor) -> int:
    """The index of the one scan that has this ink."""
    (index,) = (scans().ink - ink).abs().flatten(1).amax(1).lt(1e-4).nonzero()[:, 0].tolist()
    return index


def written_on(page: Tensor) -> list[tuple[int, int] | None]:
    """Color and scan of each cell of a page."""
    cells = [
        page[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        for row in range(GRID)
        for column in range(GRID)
    ]
    return [None if (found := ink_of(cell)) is None else (found[0], scan_of(found[1])) for cell in cells]


def test_a_third_of_the_scans_is_held_out_and_no_scan_is_in_both_parts():
    ink, labels, held_out = scans()
    # Every scan is different, so that parts of different indices share no scan.
    assert len({tuple(scan.flatten().tolist()) for scan in ink}) == len(ink) == 1797
    expected = [index * 2654435761 % 2**32 < 2**32 // 3 for index in range(1797)]
    assert held_out.tolist() == expected
    assert held_out.sum() == 600
    for digit in range(10):
        assert (labels[held_out] == digit).sum() >= 50
    assert ink.min() == 0
    assert ink.max() == 1


@pytest.mark.parametrize("split", ["train", "aligned", "conflict", "swapped"])
def test_a_page_shows_what_the_truth_says_in_scans_of_its_part(split):
    problems = WORLD.sample(12, split, seeded(1))
    assert problems.images.shape == (12, 3, GRID * PATCH, GRID * PATCH)
    places = set()
    for row in range(len(problems)):
        page = written_on(problems.images[row])
        colors = [cell[0] for cell in page if cell is not None]
        assert sorted(colors) == [0, 1, 2, 3, *[BLACK] * (CELLS - 4)]
        shown = {color: int(scans().digits[scan]) for color, scan in page if color != BLACK}
        assert [shown[color] for color in range(4)] == problems.readings[row].tolist()
        asked = problems.colors[row].tolist()
        assert asked[0] != asked[1]
        assert [shown[color] for color in asked] == problems.counts[row].tolist()
        assert sum(shown[color] for color in asked) == problems.answers[row] <= 9
        assert all(bool(scans().held_out[scan]) == (split != "train") for _, scan in page)
        found = cells_of(problems.images[row], problems.colors[row]).tolist()
        assert [colors[cell] for cell in found] == asked
        places.update(found)
    assert len(places) > 5


def test_every_digit_is_asked_for():
    counts = WORLD.sample(3000, "train", seeded()).counts
    found = {(one, two) for one, two in counts.tolist()}
    assert found == {(one, two) for one in range(10) for two in range(10) if one + two <= 9}


def test_an_empty_page_shows_nothing():
    problems = WORLD.sample(4, "blind", seeded())
    assert (problems.images == 1).all()
    assert written_on(problems.images[0]) == [None] * CELLS


def test_draw_puts_ink_on_paper_inside_a_margin():
    ink = torch.zeros(1, CELLS, 8, 8)
    ink[0, 5, 0, 7] = 0.5  # second row, third column of the page; upper right corner of the scan
    page = draw(ink, torch.zeros(1, CELLS, dtype=torch.long))[0]
    assert page.shape == (3, 30, 30)
    assert page[:, 11, 28].tolist() == pytest.approx([1 - 0.5 * (1 - channel) for channel in RGB[0].tolist()])
    page[:, 11, 28] = 1
    assert (page == 1).all()


def test_hints_are_as_right_as_the_split_promises():
    for split, share in {"aligned": 1.0, "conflict": 0.0, "blind": 0.0}.items():
        problems = WORLD.sample(200, split, seeded(2))
        assert (problems.shortcut == problems.answers).double().mean() == share
        for question, inks, hint in zip(problems.questions, problems.colors, problems.shortcut.tolist(), strict=True):
            first, second = (INKS[ink] for ink in inks)
            asked = f"add {first} and {second} ? maybe {hint}"
            assert " ".join(to_words(question, WORLD.vocabulary)) == asked
    mixture = Digits(shortcut_right=0.3).sample(2000, "train", seeded(3))
    assert (mixture.shortcut == mixture.answers).double().mean() == pytest.approx(0.3, abs=0.04)
    assert WORLD.sample(200, "swapped", seeded(4)).shortcut.min() >= 0


def test_a_demonstration_is_read_as_it_was_written():
    problems = WORLD.sample(300, "conflict", seeded())
    responses = WORLD.demonstrate(problems, seeded(), misread=0.0, shortcut=0.0)
    assert responses.shape[1] == WORLD.response_length
    assert measure(responses, problems)["grounded"] == 1.0
    assert (reward(responses, problems) == 1).all()
    first, second = (INKS[ink] for ink in problems.colors[0])
    one, two = problems.counts[0].tolist()
    assert " ".join(to_words(responses[0], WORLD.vocabulary)) == (
        f"<perception> the {first} {one} and the {second} {two} </perception> "
        f"<think> {one} plus {two} is {one + two} </think> <answer> {one + two} </answer> <eos>"
    )
    lazy = measure(WORLD.demonstrate(problems, seeded(), misread=0.0, shortcut=0.5), problems)
    assert lazy["bias"] == pytest.approx(0.5, abs=0.08)
    assert lazy["perception"] == 1.0
    careless = WORLD.demonstrate(problems, seeded(), misread=0.5, shortcut=0.0)
    assert measure(careless, problems)["consistent"] == 1.0
    stated = read(careless, problems.colors).counts
    assert ((stated - problems.counts).abs() <= 1).all()
    assert 0.2 < (stated != problems.counts).double().mean() < 0.5  # some slips would lead off the scale


def test_without_scikit_learn_the_demo_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn, which is not installed: pip install '.\[demo\]'"):
        scans.__wrapped__()


def test_the_command_says_what_to_install_before_it_runs_anything(monkeypatch):
    monkeypatch.setattr(cli_demo, "find_spec", lambda module: None if module == "sklearn" else object())
    monkeypatch.setattr(cli_demo.subprocess, "run", lambda *args, **options: pytest.fail("the demo was run"))
    result = CliRunner().invoke(app, ["demo", "--seeds", "1"])
    assert result.exit_code == 1
    assert result.stderr == "Error: the demo needs scikit-learn: in the checkout run `pip install '.[demo]'`\n"


# ------------------------------------------------------------------------------------------------------------ sentences


def rates_of(**after: list[float]) -> dict:
    """Made-up rates of methods that start at 20 % right answers; half of the right answers at the end are grounded."""

    def rates(values: list[float]) -> dict:
        half = [value / 2 for value in values]
        row = {"answer": values, "perception": half, "grounded": half, "bias": [1 - value for value in values]}
        return {"conflict": row, "aligned": row, "blind": row}

    return {name: {"before": rates([0.2] * len(values)), "after": rates(values)} for name, values in after.items()}


def test_paired_differences_have_students_interval():
    # By hand: mean 0.2, s.d. 0.1, and t of 2 degrees of freedom is 4.3027: 4.3027 * 0.1 / sqrt(3) = 0.2484.
    difference = paired([0.4, 0.5, 0.6], [0.3, 0.3, 0.3])
    assert difference == pytest.approx((0.2, -0.0484, 0.4484), abs=1e-4)
    assert paired([0.5], [0.2])[0] == pytest.approx(0.3)
    assert all(math.isnan(bound) for bound in paired([0.5], [0.2])[1:])


@pytest.mark.parametrize(
    ("srpo", "grpo", "expected"),
    [
        (
            [0.51, 0.61, 0.72],
            [0.4, 0.5, 0.6],
            "Here SRPO ends with more right answers than GRPO (SRPO minus GRPO is +11.3 percentage points, "
            "95 % interval +9.9 to +12.8, paired over 3 seeds), which says nothing about other models or data.",
        ),
        (
            [0.4, 0.5, 0.6],
            [0.51, 0.61, 0.72],
            "Here SRPO ends with fewer right answers than GRPO (SRPO minus GRPO is -11.3 percentage points, "
            "95 % interval -12.8 to -9.9, paired over 3 seeds), which says nothing about other models or data.",
        ),
        (
            [0.4, 0.5, 0.6],
            [0.5, 0.4, 0.6],
            "No difference can be told from 3 seeds: SRPO minus GRPO is +0.0 percentage points, "
            "95 % interval -24.8 to +24.8, which includes 0.",
        ),
        (
            [0.5],
            [0.4],
            "No difference can be told from 1 seed (SRPO minus GRPO is +10.0 percentage points): "
            "`--seeds 4` trains four pairs of models.",
        ),
    ],
)
def test_whether_they_differ(srpo, grpo, expected):
    assert whether_they_differ(rates_of(grpo=grpo, srpo=srpo)).replace("-0.0", "+0.0") == expected


def test_one_method_is_compared_with_nothing():
    assert whether_they_differ(rates_of(grpo=[0.5, 0.6])) == (
        "Only GRPO was run, and nothing can be compared: `--methods grpo,srpo` runs both."
    )


def test_what_was_learned_names_rise_fall_and_grounds():
    assert what_was_learned(rates_of(grpo=[0.4, 0.6], srpo=[0.1, 0.1])) == (
        "On handwriting that was never seen in training, with a wrong hint, right answers rose from 20 % to 50 % with "
        "GRPO and fell from 20 % to 10 % with SRPO; 50 % of the right answers after GRPO and 50 % of those after SRPO "
        "rest on two right readings."
    )
    assert what_was_learned(rates_of(srpo=[0.0])) == (
        "On handwriting that was never seen in training, with a wrong hint, right answers fell from 20 % to 0 % with "
        "SRPO."
    )
    assert "stayed at 20 % with GRPO" in what_was_learned(rates_of(grpo=[0.2]))


def test_what_to_do_next_gives_a_file_and_a_command():
    both, alone = rates_of(grpo=[0.5], srpo=[0.5]), rates_of(grpo=[0.5])
    assert what_to_do_next(both, Path("runs/demo"), ".venv/bin/srpo") == (
        "Open runs/demo/weights.html in a browser to see which words of a response got the credit, beside the page "
        "that it read; `.venv/bin/srpo show runs/demo/rollouts.jsonl --index 0 --table` prints one response token by "
        "token."
    )
    assert what_to_do_next(alone, Path("runs/demo"), "srpo").startswith("Open runs/demo/learning_curves.png")
    three = conclusions(both, out=Path("runs/demo"), command="srpo")
    assert three == [
        what_was_learned(both),
        whether_they_differ(both),
        what_to_do_next(both, Path("runs/demo"), "srpo"),
    ]


def test_the_table_holds_percentages_in_plain_columns():
    assert with_error([0.5]) == "50.0"
    assert with_error([0.4, 0.6]) == "50.0 ± 10.0"  # s.d. 0.1414, over sqrt(2)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(accuracy_table(rates_of(grpo=[0.4, 0.6], srpo=[0.3, 0.3])))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "warm start GRPO SRPO" in lines
    assert "right answers, hint wrong 20.0 ± 0.0 50.0 ± 10.0 30.0 ± 0.0" in lines
    assert "both digits read right, hint wrong 10.0 ± 0.0 25.0 ± 5.0 15.0 ± 0.0" in lines
    assert "answer follows the hint, hint wrong 80.0 ± 0.0 50.0 ± 10.0 70.0 ± 0.0" in lines


# ------------------------------------------------------------------------------------------------------------ specimens

RIGHT = "<perception> the red 3 and the blue 5 </perception> <think> 3 plus 5 is 8 </think> <answer> 8 </answer> <eos>"
LUCKY = RIGHT.replace("red 3", "red 2")
MISREAD = LUCKY.replace("is 8", "is 7").replace("<answer> 8", "<answer> 7")
HINTED = RIGHT.replace("<answer> 8", "<answer> 1")


def batch_of(*texts: str) -> Batch:
    """Responses to a question about a red 3 and a blue 5, with the hint 1."""
    rows = [[ID[word] for word in text.split()] for text in texts]
    longest = max(map(len, rows))
    token_ids, n = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]), len(texts)
    mask = token_ids != PAD
    problems = Problems(
        images=WORLD.sample(1, "conflict", seeded()).images.repeat(n, 1, 1, 1),
        questions=torch.tensor([[ID[word] for word in "add red and blue ? maybe 1".split()]] * n),
        colors=torch.tensor([[0, 2]] * n),
        counts=torch.tensor([[3, 5]] * n),
        shortcut=torch.full((n,), 1),
        readings=torch.tensor([[3, 0, 5, 0]] * n),
        hints=torch.full((n, 4), -1),
    )
    return Batch(
        problems,
        problems.images,
        token_ids,
        mask,
        segment_roles(token_ids, mask, tag_ids=TAG_IDS, eos_token_id=EOS),
        torch.zeros(n, dtype=torch.long),
        torch.ones(n),
        -torch.ones(token_ids.shape),
        mask.sum().float(),
        step=0,
    )


def test_the_specimen_of_a_kind_is_the_one_whose_readings_weigh_most():
    batch = batch_of(RIGHT, LUCKY, RIGHT, MISREAD, HINTED, RIGHT.replace("and", "9"))
    weights = torch.ones(batch.token_ids.shape)
    weights[5, 3] = 9.0  # of a response that states a third digit
    weights[0, 10:] = 9.0  # of the reasoning
    weights[2, 3] = 2.0  # of the first reading
    found = {kind.split(":")[0]: row for kind, row in specimens_of(batch, weights).items()}
    assert found == {"right": 2, "misread": 3, "lucky": 1, "hint": 4}


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        ((RIGHT, LUCKY, MISREAD, HINTED), ["right", "misread", "lucky", "hint"]),
        ((RIGHT[:-6], RIGHT), ["right"]),
        ((), []),
    ],
)
def test_specimens_come_first(texts, kinds, tmp_path):
    texts = [RIGHT[:-6], *texts]
    batch = batch_of(*texts)
    specimens = write_rollouts(new_model(WORLD), WORLD, SRPO(), batch, tmp_path / "rollouts.jsonl")
    assert [kind.split(":")[0] for kind in specimens] == kinds
    written = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert [rollout.id for rollout in written] == specimens + [None] * (len(texts) - len(kinds))
    assert sorted(" ".join(map(str.strip, rollout.pieces)) for rollout in written) == sorted(texts)
    assert [rollout.finished for rollout in written] == [rollout.text.endswith("<eos>") for rollout in written]
    for rollout in written:
        assert rollout.prompt == "add red and blue ? maybe 1"
        assert rollout.reference == "red 3 + blue 5 = 8"
        assert (tmp_path / str(rollout.image)).exists()
    judged = {"right": (True, True), "misread": (False, False), "lucky": (True, False), "hint": (False, True)}
    for rollout, kind in zip(written, kinds, strict=False):
        assert (rollout.correct, rollout.perception_correct) == judged[kind]


def test_enlarging_repeats_each_pixel():
    image = torch.rand(3, 30, 30, generator=seeded())
    larger = enlarge(image)
    assert larger.shape == (3, 300, 300)
    assert torch.equal(larger[:, 10:20, 290:300], image[:, 1:2, 29:30].expand(3, 10, 10))


# ------------------------------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    brief = replace(WARM_START, max_steps=90, batch_size=16, stop_at_perception=None, learning_rate=8e-3)
    train = TrainConfig(steps=2, prompts=6, group_size=4)
    return Study(tmp_path_factory.mktemp("demo"), WORLD, brief, train, evaluation_size=32, evaluate_every=1)


@pytest.fixture(scope="module")
def printed(study) -> str:
    console = Console(width=200, record=True, file=(study.out / "terminal.txt").open("w", encoding="utf-8"))
    demonstrate(study, METHODS, [0], workers=1, console=console)
    return console.export_text()


def test_the_demo_writes_its_files_and_ends_with_three_sentences(study, printed):
    summary = json.loads((study.out / "summary.json").read_text())
    assert summary["rates"].keys() == {"grpo", "srpo"}
    for by_time in summary["rates"].values():
        assert by_time["before"] == summary["rates"]["grpo"]["before"]
        for by_split in by_time.values():
            assert {"train", *WORLD.splits} == by_split.keys()
            assert all(0.0 <= value <= 1.0 for rates in by_split.values() for [value] in rates.values())
    assert {"python", "torch", "srpo-core", "scikit-learn"} == summary["versions"].keys()
    assert summary["seconds"]["wall"] > 0
    for name in ("learning_curves.png", "example.png"):
        assert (study.out / name).read_bytes().startswith(b"\x89PNG")
    last = [f"{number}. {sentence}" for number, sentence in enumerate(summary["conclusions"], 1)]
    assert " ".join(printed.split()).endswith(" ".join(" ".join(last).split()))
    assert "No difference can be told from 1 seed" in last[1]
    assert str(study.out / "weights.html") in last[2]


def test_a_summary_holds_the_rates_of_every_seed():
    def result(method: str, answer: float, weight: float) -> dict:
        rates = {"conflict": {"answer": answer}}
        weights = {"digits": weight, "asked": 1.0}
        return {"method": method, "rates": {"before": rates, "after": rates}} | {
            "mean_weights": {"before": weights, "after": {**weights, "filler": 0.5}}
        }

    summary = summarize([result("srpo", 0.25, 2.0), result("srpo", 0.5, 3.0)])
    assert summary["rates"]["srpo"]["after"]["conflict"]["answer"] == [0.25, 0.5]
    assert summary["mean_weights"]["srpo"] == {"before": {"digits": 2.5}, "after": {"digits": 2.5, "filler": 0.5}}


def test_the_rollouts_of_the_demo_explain_its_weights(study, printed):
    """Labels, roles and weights of the file follow from its texts and log-probs, as the commands read them."""
    rollouts = list(read_rollouts(study.out / "rollouts.jsonl"))
    assert rollouts
    recomputed = score_rollouts(rollouts, ScoringOptions(recompute=True))
    for rollout, scored in zip(rollouts, recomputed, strict=True):
        assert rollout.weights == pytest.approx(scored.weights, abs=1e-3)
        assert rollout.swapped is not None
        assert rollout.scores == pytest.approx(scored.scores, abs=1e-4)
        from_text = next(score_rollouts([replace(rollout, roles=None, broken=None)]))
        assert from_text.broken == rollout.broken
        assert from_text.roles.tolist() == scored.roles.tolist()
        words = [piece.strip() for piece in rollout.pieces]
        assert rollout.correct == (rollout.reward == 1.0)
        asked, truth = str(rollout.prompt).split(), str(rollout.reference).split()
        assert [truth[0], truth[3]] == [asked[1], asked[3]]
        assert asked[-1] != truth[-1]  # a held-out page, and its hint is wrong
        if rollout.correct:
            assert words[words.index("<answer>") + 1] == truth[-1]
        if rollout.perception_correct:
            assert [words[words.index(color) + 1] for color in asked[1:4:2]] == [truth[1], truth[4]]


def test_the_page_of_the_demo_shows_every_rollout_beside_its_image(study, printed):
    page = (study.out / "weights.html").read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    rollouts = list(read_rollouts(study.out / "rollouts.jsonl"))
    assert [row["tokens"] for row in data["rows"]] == [rollout.pieces for rollout in rollouts]
    assert data["weights"] == "recorded"
    assert data["interference"]["responses"] == len(rollouts)
    for row in data["rows"]:
        assert data["images"][row["image"]].startswith("data:image/png;base64,")
