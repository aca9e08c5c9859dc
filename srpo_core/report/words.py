"""What the page and the commands say in words. Every sentence is computed from the file."""

import math
import shlex
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from srpo_core.diagnostics import INTERFERENCE_MATTERS
from srpo_core.rollouts import Rollout, ScoringOptions, Summary
from srpo_core.rollouts.counts import UNKNOWN
from srpo_core.rollouts.dependence import Dependence, dependence
from srpo_core.tags import BrokenReason

__all__ = ["REASONS", "Answer", "answers", "changed_options", "fault", "interference_in_words", "origin_of_weights"]
__all__ += ["percent", "right_in_words"]

#: What each reason to be malformed means to a person.
REASONS = {
    BrokenReason.NO_PERCEPTION: "no perception block",
    BrokenReason.UNCLOSED: "a block is left open",
    BrokenReason.NESTED: "a block opens inside another",
    BrokenReason.CROSSED: "two blocks overlap",
    BrokenReason.STRAY_CLOSE: "a block closes that is not open",
    BrokenReason.TWO_ANSWERS: "a second answer",
}

#: Credit counts as moved to or from perception where its shares of the weight and of the tokens differ by more.
MOVED = 0.01
#: Share of unmoved tokens from which on a role hardly depends on its second view.
NEARLY_ALL = 0.9


class Answer(NamedTuple):
    """One of the questions that a report answers.

    Attributes:
        question: What a user wants to know.
        sentence: The answer; if it was not measured, what is missing and how it can be measured.
        measured: Whether the file holds what the answer needs.
    """

    question: str
    sentence: str
    measured: bool


def answers(summary: Summary) -> list[Answer]:
    """Where the credit went, whether the model looks at the image, and what else is asked first, in plain sentences.

    Each sentence is computed from the figures of the summary and claims nothing beyond them. What was not measured is
    named with a way to measure it.

    Args:
        summary: From :func:`~srpo_core.rollouts.summarize_files` or :func:`~srpo_core.rollouts.summarize_rollouts`.

    Returns:
        Three or four answers; none for a summary without responses.

    Example:
        >>> from srpo_core.rollouts import parse_rollout, score_rollouts, summarize_rollouts
        >>> rollout = parse_rollout('{"tokens": ["a", "cat", "."], "roles": "PRO", "broken": "none", "weights": '
        ...                         '[1.5, 0.5, 1]}')
        >>> answers(summarize_rollouts(score_rollouts([rollout])))[0].sentence
        'Perception tokens are 33.3 % of the tokens and carry 50.0 % of the weight: credit moved to perception.'
    """
    if not len(summary):
        return []
    image, perception = dependence(summary, "perception"), dependence(summary, "reasoning")
    told = [_credit(summary)]
    if image is None and perception is None:
        told.append(_neither(summary))
    else:
        told += [_image(summary, image), _perception(summary, perception)]
    return [*told, _right(summary)]


_CREDIT = "Where did the credit go?"
_IMAGE = "Does the model look at the image?"
_FOLLOWS = "Does the reasoning follow the perception?"
_RIGHT = "Are the answers right?"


def _credit(summary: Summary) -> Answer:
    columns = summary.columns
    rows = columns["weighed"] > 0
    if not rows.any():
        lacking = "weights, scores, or log-probs of a second view" if columns["tokens"].any() else "tokens"
        return Answer(_CREDIT, f"This is not known, because no line has {lacking}.", False)
    if not (columns["perception/weighed"][rows].any() or columns["reasoning/weighed"][rows].any()):
        sentence = "No token is part of a perception or of a reasoning, so every token has weight 1, as in GRPO."
        return Answer(_CREDIT, sentence, True)
    low, high = float(summary.extremes[:, 0].min()), float(summary.extremes[:, 1].max())
    if low == high == 1.0:
        return Answer(_CREDIT, "Every token has weight 1, as in GRPO: no credit was moved.", True)
    tokens, weight = columns["tokens"][rows].sum(), columns["weights"][rows].sum()
    share = float(columns["perception/tokens"][rows].sum() / tokens)
    mass = float(columns["perception/weights"][rows].sum() / weight) if weight > 0 else 0.0
    sentence = f"Perception tokens are {percent(share)} of the tokens and carry {percent(mass)} of the weight"
    if mass - share > MOVED:
        sentence += ": credit moved to perception."
    elif share - mass > MOVED:
        sentence += ": credit moved away from perception."
    else:
        sentence += (
            f", so little credit moved to or from perception as a whole. Single tokens have weights from {low:.2f} to "
            f"{high:.2f}."
        )
    return Answer(_CREDIT, sentence, True)


def _image(summary: Summary, found: Dependence | None) -> Answer:
    if found is None:
        sentence = f"This is not measured: {_why_unscored(summary, 'perception')}"
        return Answer(_IMAGE, sentence, False)
    verdict = _verdict(found, "The perceptions depend on the image", "The perceptions hardly depend on the image")
    return Answer(_IMAGE, _told(verdict, found, "the image is corrupted", "perception"), True)


def _perception(summary: Summary, found: Dependence | None) -> Answer:
    if found is None:
        sentence = f"This is not measured: {_why_unscored(summary, 'reasoning')}"
        return Answer(_FOLLOWS, sentence, False)
    verdict = _verdict(found, "The reasoning follows its perception", "The reasoning hardly depends on its perception")
    return Answer(_FOLLOWS, _told(verdict, found, "the perception is replaced", "reasoning"), True)


def _verdict(found: Dependence, yes: str, hardly: str) -> str:
    """What the figures say, where they leave no doubt; else nothing."""
    if found.error is not None and found.mean > max(found.threshold, 2 * found.error):
        return f"{yes}: "
    if abs(found.mean) < found.threshold and found.unmoved >= NEARLY_ALL:
        return f"{hardly}: "
    return ""


def _told(verdict: str, found: Dependence, when: str, role: str) -> str:
    """The verdict, if there is one, and the figures behind it in one sentence."""
    size = "less than 0.01" if 0 < abs(found.mean) < 0.005 else f"{abs(found.mean):.2f}"
    error = "" if found.error is None else f" (standard error {found.error:.2f})"
    change = "gains" if found.mean < 0 else "loses"
    limit = f"{found.threshold:.2f} nats" + (", which is twice the noise of two equal passes" if found.is_noise else "")
    responses = "1 response" if found.responses == 1 else f"{found.responses:,} responses"
    return (
        f"{verdict}{'when' if verdict else 'When'} {when}, a {role} token {change} {size} nats on average{error}, over "
        f"{responses}; {percent(found.unmoved)} of these tokens change by less than {limit}."
    )


def _why_unscored(summary: Summary, role: str) -> str:
    columns = summary.columns
    field = {"perception": "corrupted_log_probs", "reasoning": "counterfactual_log_probs"}[role]
    if not columns["has_tokens"].any():
        return f"the lines hold texts without tokens. {_remedy(summary)}"
    if not columns[f"{role}/tokens"].any():
        return f"no token is part of a {role} with the tags that were searched for."
    if role == "reasoning" and (columns["swapped"] == 0).any() and not (columns["swapped"] == 1).any():
        return "for no response was another perception found. Sample more responses to each prompt."
    mean = _mean_score(summary, role)
    known = ""
    if mean is not None:
        known = f" The recorded scores of {role} tokens are {mean:+.2f} nats on average; their kind is not recorded."
    return f"old_log_probs or {field} are missing. {_remedy(summary)}{known}"


def _mean_score(summary: Summary, role: str) -> float | None:
    scored = summary.columns[f"{role}/scored"].sum()
    return float(summary.columns[f"{role}/scores"].sum() / scored) if scored else None


def _neither(summary: Summary) -> Answer:
    """Where neither second view was scored, one sentence says so."""
    columns = summary.columns
    question = "Does the model look at the image, and does the reasoning follow the perception?"
    if not columns["has_tokens"].any():
        lacking = "the lines hold texts without tokens"
    elif not (columns["perception/tokens"].any() or columns["reasoning/tokens"].any()):
        sentence = "This is not measured: no token is part of a perception or of a reasoning with the tags that were "
        return Answer(question, f"{sentence}searched for.", False)
    else:
        lacking = "corrupted_log_probs and counterfactual_log_probs are missing"
        if not columns["perception/tokens"].any() or not columns["reasoning/tokens"].any():
            lacking = "log-probs of the second views are missing"
    return Answer(question, f"This is not measured: {lacking}. {_remedy(summary)}", False)


def _remedy(summary: Summary) -> str:
    file = shlex.quote(Path(summary.files[0]).name) if summary.files else "rollouts.jsonl"
    return f"Score them with `srpo score {file} --model PATH`, or record them in training."


def _right(summary: Summary) -> Answer:
    right = summary.columns["right"]
    known = int((right != UNKNOWN).sum())
    if known:
        share = percent(float((right == 1).sum()), known)
        judged = "the" if known == len(summary) else f"the {known:,} judged"
        return Answer(_RIGHT, f"{share} of {judged} answers are right, by this rule: {right_in_words(summary)}.", True)
    if np.isnan(summary.columns["reward"]).all():
        sentence = (
            "This is not recorded. Name a reward function with the option `correct` of the trainer, or record rewards."
        )
    else:
        sentence = f"This is {right_in_words(summary)}."
    return Answer(_RIGHT, sentence, False)


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
    """Where the weights of a summary come from, as far as this is known.

    Example:
        >>> from srpo_core.rollouts import summarize_rollouts
        >>> origin_of_weights(summarize_rollouts([]))
        'not known'
    """
    columns = summary.columns
    known = columns["recorded"] if not summary.options.recompute else np.zeros(len(summary), dtype=bool)
    recorded, weighed = int((known & (columns["weighed"] > 0)).sum()), int((columns["weighed"] > 0).sum())
    if not weighed:
        return "not known"
    return "recorded" if recorded == weighed else "computed" if not recorded else "partly recorded"


def right_in_words(summary: Summary) -> str:
    """By which rule answers count as right; without a rule, how one can be given.

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
    remedy = (
        "pass --right '>=1', a threshold on the reward, or name the reward function that decides with the option "
        "`correct` of the trainer"
    )
    if rules:
        more = f", and not known of {open_ones:,} others that have only a reward: {remedy}" if open_ones else ""
        return "; ".join(rules) + more
    if open_ones:
        return f"not known, because the rewards are not only 0 and 1: {remedy}"
    if not np.isnan(columns["reward"]).all():
        return "not known: a rule is recorded, but no verdict"
    return "not known: neither correct nor a reward is recorded"


def changed_options(options: ScoringOptions) -> str:
    """The options that differ from their defaults.

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
    """A share as it is shown; ``-`` where it is not known, or is a share of nothing. A few are not shown as none.

    Example:
        >>> percent(1, 3), percent(0, 0), percent(None), percent(1, 10**6), percent(1 - 1e-6)
        ('33.3 %', '-', '-', '< 0.1 %', '> 99.9 %')
    """
    if not whole or part is None:
        return "-"
    share = part / whole
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"
