"""What the page and the commands say in words."""

import math
from dataclasses import fields

import numpy as np

from srpo_core.diagnostics import INTERFERENCE_MATTERS
from srpo_core.rollouts import Rollout, ScoringOptions, Summary
from srpo_core.rollouts.counts import UNKNOWN
from srpo_core.tags import BrokenReason

__all__ = ["REASONS", "changed_options", "fault", "interference_in_words", "origin_of_weights", "percent"]
__all__ += ["right_in_words"]

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
    return rollout.parsed.reason, rollout.parsed.position


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
    """Where the weights of a summary come from, as far as they are known."""
    columns = summary.columns
    known = columns["recorded"] if not summary.options.recompute else np.zeros(len(summary), dtype=bool)
    recorded, weighed = int((known & (columns["weighed"] > 0)).sum()), int((columns["weighed"] > 0).sum())
    if not weighed:
        return "not known"
    return "recorded" if recorded == weighed else "computed" if not recorded else "partly recorded"


def right_in_words(summary: Summary) -> str:
    """By which rule answers count as right; if by none, how that can be said.

    Example:
        >>> from srpo_core.rollouts import summarize_rollouts
        >>> right_in_words(summarize_rollouts([]))
        'not known: neither correct nor a reward is recorded'
    """
    columns = summary.columns
    if summary.options.right is not None:
        rule = f"{summary.options.right} (--right)"
        return rule if (columns["right"] != UNKNOWN).any() else f"{rule}, but no reward is recorded"
    rules = sorted(rule or "as recorded" for rule in summary.correct_by)
    rules += ["rewards are 0 or 1"] if summary.rewards_tell else []
    open_ones = 0 if summary.rewards_tell else int(columns["only_reward"].sum())
    remedy = "pass --right '>=1', a threshold on the reward, or name the reward function that decides in training"
    if rules:
        more = f", and not known of {open_ones:,} others with a reward alone: {remedy}" if open_ones else ""
        return "; ".join(rules) + more
    if open_ones:
        return f"not known, because rewards are not just 0 and 1: {remedy}"
    return "not known: neither correct nor a reward is recorded"


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


def percent(part: float | None, whole: float = 1.0) -> str:
    """A share as it is shown; ``-`` where it is not known, or is a share of nothing.

    Example:
        >>> percent(1, 3), percent(0, 0), percent(None)
        ('33.3 %', '-', '-')
    """
    return f"{100 * part / whole:.1f} %" if whole and part is not None else "-"
