"""Completion logs of other tools -> a rollout file -> the figures of a report, against counts by hand."""

import json
import math

import pytest
from rollout_files import srpo

from srpo_core.cli import terminal
from srpo_core.rollouts import CorrectRule, RolloutError, import_logs, parse_rollout, read_rollouts, summarize_files
from srpo_core.tags import RoleTags

GOOD = "<perception>a cat</perception><think>it purrs</think><answer>3</answer>"
BAD = "<perception>a cat<think>it purrs"


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(terminal.out, "width", 200)
    monkeypatch.setattr(terminal.err, "width", 200)


def write(path, records):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def verl(folder, *, steps=(1, 2, 10), prompts=2, size=2):
    """As ``trainer.rollout_data_dir``: one file a step. The first response of a prompt is right, the last malformed."""
    for step in steps:
        rows = [
            {
                "input": f"user\nhow many? {prompt}\nassistant\n",
                "output": BAD if row == size - 1 else GOOD,
                "gts": "3",
                "score": 1.1 if row == 0 else 0.1,
                "step": step,
                "acc": float(row == 0),
                "request_id": f"{step}-{prompt}-{row}",
            }
            for prompt in range(prompts)
            for row in range(size)
        ]
        write(folder / f"{step}.jsonl", rows)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def facts(output):
    """The summary table of the command, as a dictionary."""
    found = {}
    for line in output.split("\n"):
        name, _, value = line.partition("  ")
        if value.strip():
            found[name] = value.strip()
    return found


def test_verl_is_imported_and_its_figures_are_right(tmp_path):
    folder, output = verl(tmp_path / "rollouts"), tmp_path / "out.jsonl"
    result = srpo("import", folder, "-o", output, "--right", "acc")
    told = facts(result.stdout)
    assert told["log of"].startswith(f"verl: 3 files, {folder / '1.jsonl'} to")
    assert told["responses"] == "12"
    assert told["steps"] == "3: 1 to 10"
    assert told["groups"] == "6 of 2 responses"
    assert told["reward"] == "all"
    assert told["right"] == "50.0 % of 12, by acc > 0"
    assert told["reference"] == told["prompt"] == "all"
    assert told["advantage"] == told["image"] == "-"
    assert f"{output} holds 12 responses" in result.stdout

    first = parse_rollout(json.dumps(lines(output)[0]))
    assert (first.text, first.reward, first.reference, first.step) == (GOOD, 1.1, "3", 1)
    assert (first.correct, first.correct_by, first.group, first.id) == (True, "acc > 0", 0, "1-0-0")
    assert first.prompt == "user\nhow many? 0\nassistant\n"
    assert first.extra == {"acc": 1.0}
    assert [line["group"] for line in lines(output)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]

    report = facts(srpo("report", output, "-o", tmp_path / "r.html").stdout)
    assert report["right answers"] == "50.0 %"
    assert report["right"] == "acc > 0"
    assert report["well-formed"] == "50.0 %"  # one of two
    summary = summarize_files([output])
    # 1.1 and 0.1 in each group: 0.5 from the mean, standard deviation 0.5 * sqrt(2).
    assert abs(summary.advantages) == pytest.approx([1 / math.sqrt(2)] * 12, rel=1e-3)


def trl_rows(step, *, nan=True):
    """Two prompts of three responses: two reward functions, of which one does not apply to the last response."""
    rows = []
    for prompt in ("one?", "two?"):
        for accuracy, form, advantage in ((1.0, 0.5, 1.0), (0.0, 0.5, 0.0), (0.0, math.nan if nan else 0.0, -1.0)):
            row = {
                "step": step,
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                "completion": [{"role": "assistant", "content": GOOD if form == 0.5 else BAD}],
                "accuracy_reward": accuracy,
                "format_reward": form,
                "solution": "3",
                "advantage": advantage,
            }
            rows.append(row)
    return rows


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="optional: only TRL's logs need it")
    parquet = pytest.importorskip("pyarrow.parquet", reason="optional: only TRL's logs need it")
    # As pandas writes what TRL gives it: numbers that are NaN are null.
    clean = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(clean), path)
    return path


def test_trl_is_imported_from_parquet_and_its_figures_are_right(tmp_path):
    for step in (9, 10):
        write_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet", trl_rows(step))
    output = tmp_path / "out.jsonl"
    told = facts(srpo("import", tmp_path / "completions", "-o", output, "--right", "accuracy_reward").stdout)
    assert told["log of"].startswith("TRL: 2 files, ")
    assert told["responses"] == "12"
    assert told["groups"] == "4 of 3 responses"
    assert told["reward"] == "all, accuracy_reward + format_reward"
    assert told["right"] == "33.3 % of 12, by accuracy_reward > 0"
    assert told["advantage"] == told["reference"] == "all"
    rollouts = list(read_rollouts(output))
    assert [each.reward for each in rollouts[:3]] == [1.5, 0.5, 0.0]  # what was not given adds nothing
    assert rollouts[2].extra == {"accuracy_reward": 0.0}
    assert [each.advantage for each in rollouts[:3]] == [1.0, 0.0, -1.0]
    assert (rollouts[0].prompt, rollouts[0].reference) == ("<image>one?", "3")
    metrics = summarize_files([output]).metrics()
    assert metrics["right/fraction"] == pytest.approx(4 / 12)
    assert metrics["broken/fraction"] == pytest.approx(4 / 12)


def test_trl_rows_say_the_same_in_every_container(tmp_path):
    rows = trl_rows(1)
    table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    made = []
    for name, content in (("a.jsonl", None), ("b.json", json.dumps(rows)), ("c.table.json", json.dumps(table))):
        path = tmp_path / name
        path.write_text(content) if content else write(path, rows)
        import_logs([path], tmp_path / "out.jsonl")
        made.append((tmp_path / "out.jsonl").read_text())
    assert made[0] == made[1] == made[2]
    assert made[0].count("\n") == 6


def swift(path, *, steps=(1, 2), key="step", **more):
    """One line a step, a list for each column; steps are strings."""
    records = []
    for step in steps:
        record = {
            key: [str(step) if key == "step" else step] * 4,
            "prompt": ["p", "p", "q", "q"],
            "completion": [f"{GOOD} {step}", BAD, GOOD, BAD],
            "Accuracy": [1.0, 0.0, 1.0, math.nan],
            "Format": [1.0, 0.0, 1.0, 0.0],
            "advantages": [0.7, -0.7, 0.7, -0.7],
            "entropy": [0.1, 0.2, 0.3, 0.4],
        }
        records.append(record | more)
    return write(path, records)


@pytest.mark.parametrize("key", ["step", "gen_step"])
def test_swift_is_imported_and_its_figures_are_right(tmp_path, key):
    output = tmp_path / "out.jsonl"
    told = facts(srpo("import", swift(tmp_path / "c.jsonl", key=key), "-o", output, "--right", "Accuracy>=1").stdout)
    assert told["log of"] == f"ms-swift: {tmp_path / 'c.jsonl'}"
    assert told["groups"] == "4 of 2 responses"
    assert told["reward"] == "all, Accuracy + Format"  # the entropy of a response is none
    assert told["right"] == "66.7 % of 6, by Accuracy >= 1"  # of two nothing is known
    rollouts = list(read_rollouts(output))
    assert [each.reward for each in rollouts[:4]] == [2.0, 0.0, 2.0, 0.0]
    assert [each.correct for each in rollouts[:4]] == [True, False, True, None]
    assert [each.step for each in rollouts] == [1] * 4 + [2] * 4
    assert summarize_files([output]).metrics()["right/fraction"] == pytest.approx(4 / 6)


def test_the_whole_reward_that_an_early_swift_logs_is_taken(tmp_path):
    records = [{"step": ["3"] * 2, "messages": [[{"role": "user", "content": "q"}]] * 2, "completion": ["a", "b"]}]
    path = write(tmp_path / "c.jsonl", [records[0] | {"reward": [0.25, 0.75], "other": [5.0, 5.0]}])
    import_logs([path], tmp_path / "out.jsonl")
    assert [(each.reward, each.prompt) for each in read_rollouts(tmp_path / "out.jsonl")] == [(0.25, "q"), (0.75, "q")]


def test_openrlhf_tables_are_imported_once_though_each_holds_all_rows_so_far(tmp_path):
    rows = [[step, f"user\nq{step}\nassistant\n{GOOD}", float(step % 2)] for step in range(3)]
    for count in (1, 2, 3):
        table = {"columns": ["global_step", "text", "reward"], "data": rows[:count]}
        (tmp_path / f"generated_samples_{count}.table.json").write_text(json.dumps(table))
    found = import_logs([tmp_path], tmp_path / "out" / "r.jsonl")
    assert (found.responses, found.left_out, found.compared) == (3, 3, 0)
    rollouts = list(read_rollouts(tmp_path / "out" / "r.jsonl"))
    assert [(each.step, each.reward, each.text, each.prompt) for each in rollouts] == [
        (step, step % 2, GOOD, f"user\nq{step}") for step in range(3)
    ]


def test_openrlhf_batch_inference_is_imported(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"input": "q", "output": GOOD, "reward": reward} for reward in (1, -2.5)])
    told = facts(srpo("import", path, "-o", tmp_path / "out.jsonl", "--right", ">=1").stdout)
    assert told["log of"].startswith("OpenRLHF: ")
    assert (told["steps"], told["groups"], told["right"]) == ("-", "1 of 2 responses", "50.0 % of 2, by reward >= 1")
    # Without a reward the columns do not tell.
    path = write(tmp_path / "y.jsonl", [{"input": "q", "output": GOOD}])
    failed = srpo("import", path, "-o", tmp_path / "out.jsonl", code=1).stderr
    assert (
        "the columns ('input', 'output') do not show which tool wrote this log; name the tool with --from trl|verl"
        in failed
    )
    told = facts(srpo("import", path, "-o", tmp_path / "out.jsonl", "--from", "openrlhf").stdout)
    assert told["reward"] == "-"
    assert "'>=1'" in told["right"]


# Groups


def test_groups_are_those_of_one_step_one_prompt_and_one_reference(tmp_path):
    rows = [{"input": "q", "output": "a", "score": 1, "step": step, "gts": gts} for step in (1, 2) for gts in "xyx"]
    write(tmp_path / "a" / "1.jsonl", rows)
    write(tmp_path / "b" / "1.jsonl", rows[:1])  # of another run
    import_logs([tmp_path / "a", tmp_path / "b"], tmp_path / "out.jsonl")
    assert [line["group"] for line in lines(tmp_path / "out.jsonl")] == [0, 1, 0, 2, 3, 2, 4]


def test_groups_of_verl_are_told_by_its_uids(tmp_path):
    row = {"input": "q", "output": "a", "score": 1, "step": 1}
    write(tmp_path / "1.jsonl", [row | {"uid": uid} for uid in ("ab_1_0_0", "ab_1_1_0", "ab_2_0_0", "ab_2_1_0")])
    import_logs([tmp_path / "1.jsonl"], tmp_path / "out.jsonl")
    assert [(line["group"], line["id"]) for line in lines(tmp_path / "out.jsonl")] == [
        (0, "ab_1_0_0"),
        (0, "ab_1_1_0"),
        (1, "ab_2_0_0"),
        (1, "ab_2_1_0"),
    ]


def test_prompts_of_different_images_are_told_apart_by_the_size_of_a_group(tmp_path):
    """TRL logs no images: "how many?" of two images is one text. Advantages that are no function of rewards show it."""
    rows = []
    for rewards in ((1, 0), (3, 1)):
        for reward in rewards:
            row = {"step": 1, "prompt": "how many?", "completion": GOOD, "r": reward}
            rows.append(row | {"advantage": 0.7 if reward == max(rewards) else -0.7})
    path = write(tmp_path / "c.jsonl", rows)
    result = srpo("import", path, "-o", tmp_path / "out.jsonl")
    assert facts(result.stdout)["groups"] == "1 of 4 responses"
    assert "In 1 of 1 groups the advantages do not follow the rewards." in result.stdout
    assert "--group-size 8" in result.stdout
    result = srpo("import", path, "-o", tmp_path / "out.jsonl", "--group-size", "2")
    assert facts(result.stdout)["groups"] == "2 of 2 responses"
    assert "do not follow" not in result.stdout
    assert [line["group"] for line in lines(tmp_path / "out.jsonl")] == [0, 0, 1, 1]


def test_weights_of_rewards_are_those_that_are_given(tmp_path):
    path = write(tmp_path / "c.jsonl", trl_rows(1))
    result = srpo(
        "import", path, "-o", tmp_path / "o", "--reward", "accuracy_reward=2", "--reward", "format_reward=0.1"
    )
    assert facts(result.stdout)["reward"] == "all, 2 accuracy_reward + 0.1 format_reward"
    assert [each.reward for each in read_rollouts(tmp_path / "o")][:3] == pytest.approx([2.05, 0.05, 0.0])
    srpo("import", path, "-o", tmp_path / "o", "--reward", "format_reward")
    assert [each.reward for each in read_rollouts(tmp_path / "o")][:3] == [0.5, 0.5, None]
    failed = srpo("import", path, "-o", tmp_path / "new", "--reward", "accuracy", code=1).stderr
    assert "'accuracy' is none of the reward functions ('accuracy_reward', 'format_reward')" in failed
    assert not (tmp_path / "new").exists()
    assert "--reward must be NAME or NAME=WEIGHT" in srpo("import", path, "--reward", "a=b", code=1).stderr


def test_a_table_that_is_written_again_is_counted_and_left_out_on_request(tmp_path):
    """ms-swift and TRL log their last responses at each step, also at those that generate none."""
    path = swift(tmp_path / "c.jsonl", steps=(1, 2))
    again = [json.loads(line) for line in path.read_text().splitlines()]
    write(path, [again[0], again[0] | {"step": ["2"] * 4}, again[1] | {"step": ["3"] * 4}])
    result = srpo("import", path, "-o", tmp_path / "o")
    assert (
        "4 responses were logged twice, at two steps. Pass --drop-repeated to leave their second record out."
        in result.stdout
    )
    assert len(lines(tmp_path / "o")) == 12
    result = srpo("import", path, "-o", tmp_path / "o", "--drop-repeated")
    assert "4 responses were logged twice; their second record is left out." in result.stdout
    assert [line["step"] for line in lines(tmp_path / "o")] == [1] * 4 + [3] * 4


# What is right, and where responses begin


def test_without_a_rule_nothing_is_said_to_be_right(tmp_path):
    folder = verl(tmp_path / "rollouts", steps=(1,))
    told = facts(srpo("import", folder, "-o", tmp_path / "o").stdout)
    assert told["right"] == "not known: pass --right with one of score, acc"
    assert {"correct", "correct_by"}.isdisjoint(lines(tmp_path / "o")[0])
    failed = srpo("import", folder, "-o", tmp_path / "new", "--right", "accuracy", code=1).stderr
    assert (
        "'accuracy', which should decide what counts as right, is none of the reward functions 'score', 'acc'" in failed
    )
    assert "--right: what counts as right must be" in srpo("import", folder, "--right", "a>b", code=1).stderr
    assert not (tmp_path / "new").exists()


def test_import_logs_takes_the_rule_and_the_tags(tmp_path):
    row = {"prompt": "q\n<r>", "completion": "x</r>", "r": 1.0, "advantage": 0}
    found = import_logs(
        [write(tmp_path / "c.jsonl", [row, row | {"prompt": "q", "r": None}])],
        tmp_path / "o",
        right=CorrectRule.read("r>=1"),
        tags=RoleTags(reasoning=("<r>", "</r>")),
    )
    first, second = read_rollouts(tmp_path / "o")
    assert (first.open_at_start, second.open_at_start) == ("reasoning", None)
    assert (first.correct, second.correct) == (True, None)
    assert first.correct_by == second.correct_by == found.correct_by == "r >= 1"
    assert first.tags.reasoning == ("<r>", "</r>")
    assert found.found == {"reward": 1, "advantage": 2, "prompt": 2, "open_at_start": 1}
    assert found.right == {True: 1, None: 1}


def test_tags_of_the_command_are_those_of_the_rollouts(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "<d>a</d><think>b</think>", "r": 1}])
    srpo("import", path, "-o", tmp_path / "o", "--perception", "<d> </d>", "--answer", "none")
    (rollout,) = read_rollouts(tmp_path / "o")
    assert rollout.tags == RoleTags(perception=("<d>", "</d>"), answer=None)
    assert "1 of 1 response is well-formed" in srpo("segment", tmp_path / "o").stdout


# Files


def test_an_import_never_writes_over_what_it_reads(tmp_path):
    folder = verl(tmp_path / "rollouts", steps=(1,))
    before = (folder / "1.jsonl").read_bytes()
    for output in (folder / "1.jsonl", folder / ".." / "rollouts" / "1.jsonl"):
        assert (
            "is one of the files that are read; write to another" in srpo("import", folder, "-o", output, code=1).stderr
        )
    assert (folder / "1.jsonl").read_bytes() == before


def test_a_failed_import_leaves_the_old_file(tmp_path):
    output = tmp_path / "o"
    output.write_text("old")
    path = write(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "a", "r": 1}, {"prompt": "q"}])
    with pytest.raises(RolloutError, match="c.jsonl, line 2: a log of TRL has a column 'completion', got none"):
        import_logs([path], output, strict=True)
    assert output.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c.jsonl", "o"]


def test_malformed_lines_are_named_and_the_others_imported(tmp_path):
    path = write(tmp_path / "1.jsonl", [{"input": "q", "output": "a", "score": score} for score in (1, "high", 0)])
    with path.open("a") as file:
        file.write('{"input": "q", "outp')
    result = srpo("import", path, "-o", tmp_path / "o", code=1)
    assert f"{path}, line 2: score must be a number or null, got a string" in result.stderr
    assert f"{path}, line 4: not JSON: " in result.stderr
    assert "2 malformed lines left out" in result.stderr
    assert [line["reward"] for line in lines(tmp_path / "o")] == [1.0, 0.0]
    assert "line 2" in srpo("import", path, "-o", tmp_path / "new", "--strict", code=1).stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no responses in "),
        ('{"text": "a"}\n', "this holds rollouts already: srpo report reads it"),
        ('{"a": 1}\n', "the columns ('a') do not show which tool wrote this log"),
        ("torn", "this is neither JSON Lines, nor JSON, nor Parquet"),
    ],
)
def test_a_file_without_a_log_is_an_error(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert message in srpo("import", path, "-o", tmp_path / "o", code=1).stderr
    assert not (tmp_path / "o").exists()
    assert "does not exist" in srpo("import", tmp_path / "missing", code=2).output


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_rollouts_in_a_json_array_become_a_rollout_file(tmp_path, encoding):
    """Where the report says that a file is an array, the command it names does what it says."""
    records = [{"tokens": ["a"], "reward": 0.5, "step": 3}, {"text": "b", "reward": None}, {"tokens": 3}]
    path = tmp_path / "rollouts.json"
    path.write_text(json.dumps(records), encoding=encoding)
    assert f"srpo import {path} -o rollouts.jsonl" in srpo("report", path, code=1).stderr
    result = srpo("import", path, "-o", tmp_path / "o", "--right", ">=0.5", code=1)
    assert f"{path}, line 3: tokens must be an array of strings, got a number" in result.stderr
    assert facts(result.stdout)["right"] == "100.0 % of 1, by reward >= 0.5"
    first, second = read_rollouts(tmp_path / "o")
    assert (first.pieces, first.step, first.correct, second.reward) == (["a"], 3, True, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool": "nemo"}, "tool must be one of trl, verl, swift, openrlhf, got 'nemo'"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"rewards": {"a": math.inf}}, "rewards must have finite weights"),
    ],
)
def test_import_logs_checks_its_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        import_logs([tmp_path], tmp_path / "o", **options)


def test_progress_goes_to_the_end(tmp_path):
    folder, seen = verl(tmp_path / "rollouts"), []
    import_logs([folder], tmp_path / "o", progress=lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
