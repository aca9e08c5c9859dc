"""Rollout files for tests: one with a bit of everything, malformed lines, and the commands that read them."""

import json

import torch
from typer.testing import CliRunner

from srpo_core.cli.app import app
from srpo_core.rollouts import RolloutWriter

#: What each command that reads a rollout file is called with.
COMMANDS = {
    "report": lambda file: ["report", file, "-o", file.with_suffix(".html")],
    "show": lambda file: ["show", file, "--index", "1"],
    "segment": lambda file: ["segment", file],
    "weights": lambda file: ["weights", file, "--strength", "0.5"],
}

#: What a model, or whoever feeds one, may write to break out of a page or to steer a terminal.
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!-- <script>",
    "]]>&lt;b&gt;{{data}}{{script}}",
    "\u2028\u2029\u202eevil\u202c",
    "[bold red]markup[/bold red]",
    "\x1b]0;title\x07\x1b[31m",
    "javascript:window.hacked=1",
]


def srpo(*arguments, code=0):
    """The result of a command, which must end with this exit status."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (arguments, result.output, result.exception)
    return result


def check_that_commands_serve(file):
    """Every command reads the file to its end."""
    for arguments in COMMANDS.values():
        srpo(*arguments(file))


def words(perception, answer, reasoning=("so", " it", " is")):
    thinking = ("<think>", *reasoning, "</think>", "<answer>", answer, "</answer>")
    return ["<perception>", *perception, "</perception>", *thinking]


def write_rollouts(path, *, steps=3, groups=3, size=4, hostile=True, interference=None):
    """``steps * groups * size`` responses, then two broken ones, then one for each hostile text."""
    g = torch.Generator().manual_seed(0)
    with RolloutWriter(path) as writer:
        for step in range(steps):
            count = groups * size
            right = torch.rand(count, generator=g) < 0.5
            seen = torch.rand(count, generator=g) < 0.6
            tokens = [words(["red", " 3", " blue"] if ok else ["red", " 2"], "3" if ok else "2") for ok in right]
            time = max(map(len, tokens))
            mask = torch.arange(time) < torch.tensor([len(row) for row in tokens])[:, None]
            old = -torch.rand(count, time, generator=g)
            changed = torch.rand(count, time, generator=g) < 0.3
            divergences = {}
            if interference is not None:
                up = torch.rand(count, time, generator=torch.Generator().manual_seed(step))
                divergences = {"down_divergence": interference * up, "up_divergence": up}
            writer.write(
                tokens,
                mask,
                old_log_probs=old,
                corrupted_log_probs=old - 2 * changed,
                counterfactual_log_probs=old - 3 * changed.flip(1),
                repeated_log_probs=old + 0.01 * torch.randn(count, time, generator=g).clamp(max=0),
                rewards=right.float(),
                correct=right,
                perception_correct=seen,
                group_ids=torch.arange(count) // size,
                donors=torch.arange(count) - 1,
                prompts=["how many?"] * count,
                references=["3"] * count,
                images=[torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i // size)) for i in range(count)],
                step=step,
                **divergences,
            )
        writer.write([["<perception>", "a", "<think>", "b", "</think>"], ["just", " words"]], rewards=[0.0, 1.0])
        if hostile:
            for text in HOSTILE:
                tokens = words(["cat"], "cat", [text])
                log_probs = -torch.ones(1, len(tokens))
                writer.write(
                    [tokens],
                    old_log_probs=log_probs,
                    corrupted_log_probs=2 * log_probs,
                    prompts=[text],
                    references=[text],
                    ids=[text],
                    group_ids=[text],
                    images=[text],
                    extra=[{text: text}],
                )
    return path


def add_malformed(path):
    """Tear line 2, and add a line with an unknown field; returns the numbers of both lines."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # splitlines knows more ends of lines
    lines[1] = lines[1][:40]
    lines.append(json.dumps({"tokens": ["a"], "log_probs": [-1]}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return 2, len(lines)
