"""What the page and the commands say in words."""

import math
from dataclasses import fields

from srpo_core.diagnostics import INTERFERENCE_MATTERS
from srpo_core.rollouts import Rollout, ScoringOptions, Summary
from srpo_core.tags import BrokenReason, parse_response

__all__ = ["REASONS", "changed_options", "fault", "interference_in_words", "origin_of_weights", "percent"]

#: What each reason to be malformed means to a person.
REASONS = {
    BrokenReason.NO_PERCEPTION: "no perception block",
    BrokenReason.UNCLOSED: "a block is left open",
    BrokenReason.NESTED: "a block opens inside another",
    BrokenReason.CROSSED: "two blocks overlap",
    BrokenReason.STRAY_CLOSE: "a block closes that is not open",
    BrokenReason.TWO_ANSWERS: "a second answer",
}


def fault(rollout: Rollout) -> tuple[BrokenReason, int | None]:
    """Why the text of a response is malformed, and the index of the character where that shows; None where it is not.

    Example:
        >>> fault(Rollout(text="<perception>a cat</perception></think>"))
        (<BrokenReason.STRAY_CLOSE: 5>, 30)
    """
    parsed = parse_response(rollout.text, rollout.tags, finished=rollout.finished)
    return parsed.reason, parsed.position


def interference_in_words(interference: float | None) -> tuple[str, str]:
    """The figure as it is shown, and what it advises; without a figure, how it can be measured.

    Example:
        >>> interference_in_words(0.02)[0], interference_in_words(None)[1]
        ('0.02', 'not measured: srpo_core.diagnostics.interference says how')
    """
    if interference is None:
        return "", "not measured: srpo_core.diagnostics.interference says how"
    figure = "∞" if math.isinf(interference) else f"{interference:.3g}"
    if 0 < interference < 0.001:
        figure = "< 0.001"
    if interference < INTERFERENCE_MATTERS:
        return figure, (
            f"below {INTERFERENCE_MATTERS:g}, stay with GRPO: "
            "learning from the tokens with low weights hardly moves the perception tokens with high ones"
        )
    return figure, (
        "weights may matter here: learning from the tokens with low weights moves the perception tokens with high ones"
    )


def origin_of_weights(summary: Summary) -> str:
    """Where the weights of a summary come from."""
    recorded = int(summary.columns["recorded"].sum())
    return "recorded" if recorded == len(summary) else "computed" if not recorded else "partly recorded"


def changed_options(options: ScoringOptions) -> str:
    """The options that are not at their defaults.

    Example:
        >>> changed_options(ScoringOptions(CreditOptions(strength=0.5))), changed_options(ScoringOptions())
        ('strength=0.5', 'the defaults')
    """
    default = ScoringOptions()
    values = {each.name: getattr(options.config, each.name) for each in fields(default.config)}
    changed = {name: value for name, value in values.items() if value != getattr(default.config, name)}
    if options.answer_role != default.answer_role:
        changed["answer_role"] = options.answer_role
    return ", ".join(f"{name}={value!r}" for name, value in changed.items()) or "the defaults"


def percent(part: float, whole: float = 1.0) -> str:
    """A share as it is shown.

    Example:
        >>> percent(1, 3), percent(0, 0)
        ('33.3 %', '0 %')
    """
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
