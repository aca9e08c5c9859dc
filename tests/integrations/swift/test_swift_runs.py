"""The command line `swift rlhf --rlhf_type grpo` on a CPU, stock and with SRPO."""

import json

import pytest
import torch
from swift_runs import run, write_inputs
from typer.testing import CliRunner

from srpo_core.cli.app import app

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("swift")
    write_inputs(made)
    return made


@pytest.fixture(scope="module")
def stock(folder):
    return run(folder, "stock", module="swift.cli.main")


@pytest.fixture(scope="module")
def weighted(folder):
    return run(
        folder, "weighted", "--srpo_strength", 1, "--srpo_rollouts", "rollouts.jsonl", "--srpo_correct", "Longer"
    )


def test_strength_0_is_grpo_bit_for_bit(folder, stock):
    code, log, parameters, logged = run(folder, "off", "--srpo_strength", 0, "--srpo_reliance_spans", 2)
    assert code == stock[0] == 0, log[-3000:]
    assert [step["loss"] for step in logged[:2]] == [step["loss"] for step in stock[3][:2]]
    assert parameters.keys() == stock[2].keys()
    assert all(torch.equal(parameters[name], stock[2][name]) for name in parameters)
    assert logged[0]["srpo/structured/fraction"] == 6 / 8  # its passes were made


def test_weights_train_something_else_and_are_logged(stock, weighted):
    code, log, parameters, logged = weighted
    assert code == 0, log[-3000:]
    assert not all(torch.equal(parameters[name], stock[2][name]) for name in parameters)
    assert logged[0]["srpo/corruption/unchanged"] == 0
    assert logged[0]["srpo/tokens/effective_fraction"] < 0.999
    assert "6 of 8 responses are well-formed" in log


def test_a_weight_changes_the_gradient_of_its_token_and_no_other(folder, weighted):
    place, before, after = torch.load(folder / "weighted/gradients.pt")
    assert before[place] != 0
    assert after[place] == 2 * before[place]
    after[place] = before[place]
    assert torch.equal(after, before)


def test_rollouts_are_read_by_the_report(folder, weighted):
    path = folder / "weighted/rollouts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert torch.tensor(line["weights"]).mean().item() == pytest.approx(1.0, abs=1e-3)
    shown = CliRunner().invoke(app, ["report", str(path), "-o", str(folder / "report.html")])
    assert shown.exit_code == 0, shown.output
    tokens, right = sum(len(line["tokens"]) for line in lines), sum(line["correct"] for line in lines)
    assert f"8, with {tokens} tokens" in shown.output
    assert f"{100 * right / 8:.1f} % of the answers are right, by this rule: Longer" in shown.output
    assert "Longer" in (folder / "report.html").read_text()


def test_a_setting_that_undoes_weights_is_refused(folder):
    code, log, parameters, _ = run(folder, "refused", "--loss_type", "real")
    assert code != 0
    assert parameters is None
    assert "--loss_type real: this loss averages the advantages" in log
