"""The figures on top of the page, and what each figure of the page means in plain words."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from srpo_core.diagnostics import INTERFERENCE_MATTERS
from srpo_core.report.words import interference_in_words, percent, right_in_words
from srpo_core.rollouts import Summary

__all__ = ["HELP", "Figure", "figures", "silent_share"]

# Rules of thumb of this project, below or above which a figure is marked.
#: Share of well-formed responses.
FEW_WELL_FORMED = 0.9
#: Share of scores at the clip.
MUCH_CLIPPED = 0.05
#: Share of effective tokens.
FEW_EFFECTIVE = 0.5
#: Share of responses for which another perception was found.
FEW_REPLACED = 0.5
#: Share of responses with an advantage of 0.
MANY_SILENT = 0.5

#: Explanations of what stands elsewhere on the page, by the name under which the page looks them up.
HELP = {
    "shares": "The upper bar divides the tokens by their role, the lower bar divides the weight. Both bars are over "
    "the responses whose weights are known. Other tokens are tags and text outside of the blocks; their weight is 1.",
    "format": "The tags that were searched for, and why responses could not be read with them. A malformed response is "
    "trained as in GRPO: each of its tokens has weight 1.",
    "quadrants": "Responses whose perception was labeled right or wrong. Grounded: both are right. Lucky: the answer "
    "is right although the perception is wrong. The score is the mean visual dependency of the perception tokens: the "
    "nats that they lose when the image is corrupted.",
    "weight/perception": "How the weights of perception tokens are distributed. A token with weight 2 gets twice the "
    "advantage that GRPO gives it, a token with weight 1 gets the same. The axis is logarithmic.",
    "weight/reasoning": "How the weights of reasoning tokens are distributed. A token with weight 2 gets twice the "
    "advantage that GRPO gives it, a token with weight 1 gets the same. The axis is logarithmic.",
    "score/perception": "Scores of perception tokens. With the default kind of score: how many nats of log-probability "
    "a token loses when the image is corrupted. At 0 the token does not depend on the image.",
    "score/reasoning": "Scores of reasoning tokens. With the default kind of score: how many nats of log-probability a "
    "token loses when the perception before it is replaced. At 0 the token does not depend on the perception.",
    "reward": "The reward of this response, as the trainer recorded it.",
    "advantage": "The advantage of this response: its reward compared with the rewards of its group. GRPO gives it to "
    "every token; SRPO multiplies it by the weight of each token.",
    "role weight": "Mean, least and greatest weight of the tokens of this role in this response. 1 is GRPO.",
    "strip": "The weights along the response: orange above 1, blue below 1.",
    "length": "Number of tokens of this response.",
    "cut off": "The model did not end this response itself: it reached the limit of tokens.",
}


class Figure(NamedTuple):
    """A figure on top of the page.

    Attributes:
        label: Its name.
        value: As it is shown; ``-`` where it is not known.
        note: What it counts, in a few words.
        help: What it means and when it matters, in plain words.
        warning: What to do, where the figure is beyond its threshold; else empty.
    """

    label: str
    value: str
    note: str
    help: str
    warning: str = ""


def figures(summary: Summary) -> list[Figure]:
    """The figures on top of the page, in their order.

    Args:
        summary: From :func:`~srpo_core.rollouts.summarize_files` or :func:`~srpo_core.rollouts.summarize_rollouts`.

    Example:
        >>> from srpo_core.rollouts import summarize_rollouts
        >>> [(figure.label, figure.value) for figure in figures(summarize_rollouts([]))][:2]
        [('Right answers', '-'), ('Well-formed', '-')]
    """
    metrics = summary.metrics()
    shown = [
        _right(summary, metrics),
        _well_formed(metrics),
        Figure(
            "Weight on perception",
            percent(metrics.get("weight/perception/mass")),
            f"on {percent(metrics.get('tokens/perception/fraction'))} of the tokens; mean weight "
            f"{_number(metrics.get('weight/perception/mean'), 2)}",
            "Share of all weight that perception tokens carry. With the weights of GRPO it equals their share of the "
            "tokens.",
        ),
        _effective(metrics),
    ]
    if (cosine := metrics.get("advantage/cosine")) is not None:
        meaning = (
            "Cosine between the token advantages with and without weights. At 1 they are those of GRPO; the lower it "
            "is, the more the weights change the direction of the update."
        )
        shown.append(Figure("Similarity to GRPO", f"{cosine:.3f}", "cosine of the token advantages", meaning))
    if (silent := silent_share(summary)) is not None:
        meaning = (
            "Share of the responses with an advantage of 0, because all responses of their group earned the same "
            f"reward. Nothing is learned from them. Above {percent(MANY_SILENT)} the prompts are too easy or too hard "
            "for most groups."
        )
        warning = "Most groups teach nothing: choose other prompts." if silent > MANY_SILENT else ""
        shown.append(Figure("Advantage of 0", percent(silent), "of the responses teach nothing", meaning, warning))
    if (replaced := metrics.get("swap/coverage")) is not None:
        meaning = (
            "Share of the responses for which the perception of another response was found to replace their own. The "
            f"reasoning of the others has score 0. Below {percent(FEW_REPLACED)} more responses to each prompt help."
        )
        warning = "Sample more responses to each prompt." if replaced < FEW_REPLACED else ""
        shown.append(
            Figure("Perceptions replaced", percent(replaced), "of the responses with both roles", meaning, warning)
        )
    shown += _scores(summary, metrics)
    return shown


def _right(summary: Summary, metrics: dict[str, float]) -> Figure:
    rewards = summary.columns["reward"][~np.isnan(summary.columns["reward"])]
    mean = f"; mean reward {rewards.mean():.3f}" if len(rewards) else ""
    meaning = "Share of the answers that count as right, among those that are judged. The line below names the rule."
    return Figure("Right answers", percent(metrics.get("right/fraction")), right_in_words(summary) + mean, meaning)


def _well_formed(metrics: dict[str, float]) -> Figure:
    broken = metrics.get("broken/fraction")
    share = None if broken is None else 1 - broken
    note = f"{percent(metrics.get('structured/fraction'))} have tokens with a role"
    meaning = (
        "Share of the responses in which every block opens and closes as the tags require. Below "
        f"{percent(FEW_WELL_FORMED)} many responses are trained as in GRPO, with weight 1 on every token: look at "
        "Format for the reasons."
    )
    warning = "See the reasons under Format." if share is not None and share < FEW_WELL_FORMED else ""
    return Figure("Well-formed", percent(share), note, meaning, warning)


def _effective(metrics: dict[str, float]) -> Figure:
    share = metrics.get("tokens/effective_fraction")
    meaning = (
        "How evenly the weight is spread over the tokens of perception and reasoning: (sum of w)² / (n · sum of w²). "
        f"At 100 % all weights are equal, as in GRPO. Below {percent(FEW_EFFECTIVE)} a few tokens carry most of the "
        "weight: lower strength."
    )
    warning = "A few tokens carry most of the weight: lower strength." if (share or 1.0) < FEW_EFFECTIVE else ""
    return Figure("Effective tokens", percent(share), "of the tokens with a role", meaning, warning)


def _scores(summary: Summary, metrics: dict[str, float]) -> list[Figure]:
    shown = []
    clipped = {role: metrics.get(f"score/{role}/clipped") for role in ("perception", "reasoning")}
    if any(share is not None for share in clipped.values()):
        clip = f"{summary.options.config.score_clip:g} nats"
        meaning = (
            f"Share of the scores that reached the bound of {clip}. Scores at the bound can no longer be told apart. "
            f"Above {percent(MUCH_CLIPPED)} raise score_clip."
        )
        warning = "Raise score_clip." if any((share or 0.0) > MUCH_CLIPPED for share in clipped.values()) else ""
        note = f"of the perception scores and {percent(clipped['reasoning'])} of the reasoning scores, at {clip}"
        shown.append(Figure("Scores clipped", percent(clipped["perception"]), note, meaning, warning))
    if (noise := metrics.get("noise/perception/rms")) is not None:
        meaning = (
            "Root mean square of what the log-probs of perception tokens differ by between two equal passes. Scores "
            "below twice this value cannot be told from noise."
        )
        above = percent(metrics.get("noise/perception/above"))
        note = f"{above} of the perception scores exceed twice that"
        shown.append(Figure("Noise of two passes", f"{_short(noise)} nats", note, meaning))
    figure, advice = interference_in_words(metrics.get("interference"))
    if figure:
        responses = int(summary.columns["diverged"].sum())
        if responses < len(summary):
            advice += f"; on {responses:,} response{'' if responses == 1 else 's'}"
        meaning = (
            "How far learning from the tokens with a weight below 1 moves the perception tokens with a weight above 1, "
            f"relative to their own step. Below {INTERFERENCE_MATTERS:g} stay with GRPO: nothing is gained by weights. "
            "Above, there may be a gain; it is not promised."
        )
        shown.append(Figure("Interference", figure, advice, meaning))
    return shown


def silent_share(summary: Summary) -> float | None:
    """Share of the responses with an advantage of 0, as when all rewards of a group are equal; None if none is known.

    Example:
        >>> from srpo_core.rollouts import parse_rollout, score_rollouts, summarize_rollouts
        >>> lines = ['{"tokens": ["a"], "advantage": 0}', '{"tokens": ["b"], "advantage": -1}', '{"tokens": ["c"]}']
        >>> silent_share(summarize_rollouts(score_rollouts(map(parse_rollout, lines))))
        0.5
    """
    advantages: NDArray[np.float64] = summary.advantages
    known = ~np.isnan(advantages)
    return float((advantages[known] == 0).mean()) if known.any() else None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float) -> str:
    """Two significant digits, without an exponent where the value is not tiny."""
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-4 else f"{float(f'{value:.2g}'):g}"
