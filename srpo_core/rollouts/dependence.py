"""How much the tokens of a role depend on what their second view changes: the image, or the perception."""

import math
from typing import Literal, NamedTuple

import numpy as np

from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.rollouts.summary import Summary

__all__ = ["ALMOST_NOTHING", "Dependence", "dependence"]

#: Nats below which a change counts as almost nothing: the probability of the token changes by less than 5 %.
ALMOST_NOTHING = 0.05


class Dependence(NamedTuple):
    """What the tokens of a role lose in their second view.

    Attributes:
        mean: Mean loss of a token, nats; below 0 where tokens gain. Each token counts with at most the clip of the
            scores, 5 nats by default.
        error: Standard error of the mean, nats, with the response as the unit of sampling; None for one response.
        unmoved: Share of the tokens that change by less than the threshold, in [0, 1].
        threshold: Nats: :data:`ALMOST_NOTHING`, or twice the noise of two equal passes where this is more.
        is_noise: Whether the threshold is twice the noise of two equal passes.
        responses: Number of responses that were compared.
    """

    mean: float
    error: float | None
    unmoved: float
    threshold: float
    is_noise: bool
    responses: int


def dependence(summary: Summary, name: Literal["perception", "reasoning"]) -> Dependence | None:
    """What the tokens of a role lose in their second view; None where no response was scored in it.

    The second view of perception tokens has the image corrupted, that of reasoning tokens has the perception replaced.
    Responses for which no other perception was found are left out of the latter.

    Args:
        summary: From :func:`~srpo_core.rollouts.summarize_files` or :func:`~srpo_core.rollouts.summarize_rollouts`.
        name: The role.

    Example:
        >>> from srpo_core.rollouts import parse_rollout, score_rollouts, summarize_rollouts
        >>> rollout = parse_rollout('{"tokens": ["a", "red", "cat"], "roles": "PPP", "broken": "none", "old_log_probs":'
        ...                         ' [-1, -1, -1], "corrupted_log_probs": [-1, -3, -2]}')
        >>> found = dependence(summarize_rollouts(score_rollouts([rollout])), "perception")
        >>> found.mean, round(found.unmoved, 3), found.threshold, found.responses
        (1.0, 0.333, 0.05, 1)
    """
    columns = summary.columns
    rows = columns[f"{name}/compared"] > 0
    if not rows.any():
        return None
    counts, sums = columns[f"{name}/compared"][rows], columns[f"{name}/lost"][rows]
    responses, tokens = len(counts), int(counts.sum())
    mean = float(sums.sum() / tokens)
    error = None
    if responses > 1:  # of a ratio of two sums over responses
        spread = float(((sums - mean * counts) ** 2).sum())
        error = math.sqrt(responses / (responses - 1) * spread) / tokens
    repeated = int(columns[f"{name}/repeated"].sum())
    noise = 2 * math.sqrt(float(columns[f"{name}/squared_noise"].sum()) / repeated) if repeated else 0.0
    threshold = max(ALMOST_NOTHING, noise)
    changes = summary.change_counts[list(ROLE_NAMES.values()).index(name)]
    unmoved = int(changes[np.abs(summary.score_grid) < threshold].sum())
    return Dependence(mean, error, unmoved / tokens, threshold, noise > ALMOST_NOTHING, responses)
