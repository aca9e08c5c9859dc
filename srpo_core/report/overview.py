"""The data of the page that are about all responses: answers, figures, histograms, curves."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.report.figures import HELP, figures
from srpo_core.report.words import (
    REASONS,
    answers,
    changed_options,
    interference_in_words,
    origin_of_weights,
    right_in_words,
)
from srpo_core.rollouts import Summary
from srpo_core.rollouts.counts import UNKNOWN

_BARS = 64  # of a histogram


def overview(summary: Summary, title: str) -> dict[str, Any]:
    """The data of the page that are about all responses."""
    columns = summary.columns
    steps = np.unique(columns["step"][columns["step"] >= 0])
    metrics = summary.metrics()
    has_tokens = columns["has_tokens"]
    figure, advice = interference_in_words(metrics.pop("interference", None))  # JSON has no infinity
    return {
        "title": title,
        "version": _version(),
        "answers": [answer._asdict() for answer in answers(summary)],
        "figures": [figure._asdict() for figure in figures(summary)],
        "help": HELP,
        "formats": [{"lines": lines.split("\n"), "count": number} for lines, number in summary.formats.most_common(4)],
        "files": [Path(file).name for file in summary.files],
        "counts": {
            "responses": len(summary),
            "tokens": int(columns["tokens"].sum()) if has_tokens.any() else None,
            "withoutTokens": int((~has_tokens).sum()),
            "groups": len({group for group in summary.groups if group is not None}),
            "steps": len(steps),
            "malformed": summary.malformed,
            "withoutWeights": int(((columns["tokens"] > 0) & (columns["weighed"] == 0)).sum()),
            "judged": int((columns["broken"] != UNKNOWN).sum()),
        },
        "errors": [
            {"file": Path(error.path or "").name, "line": error.line, "reason": error.reason}
            for error in summary.errors[:5]
        ],
        "right": right_in_words(summary),
        "shares": _shares_of_roles(summary),
        "weights": origin_of_weights(summary),
        "options": changed_options(summary.options),
        "metrics": metrics,
        "interference": {"figure": figure, "advice": advice, "responses": int(columns["diverged"].sum())},
        "histograms": _histograms(summary),
        "broken": [
            {
                "reason": reason.name.lower(),
                "meaning": REASONS[reason],
                "count": int((columns["broken"] == reason).sum()),
            }
            for reason in REASONS
        ],
        "quadrants": _quadrants(summary),
        "training": _training(summary, steps) if len(steps) > 2 else None,
    }


def _shares_of_roles(summary: Summary) -> dict[str, list[float] | None]:
    """Shares of perception and of reasoning in the tokens and in the weight; None where they are not known.

    Both are over the responses whose weights are known, because shares of different responses cannot be compared. If no
    weights are known, the tokens are those of all responses.
    """
    columns = summary.columns
    rows = columns["weighed"] > 0 if columns["weighed"].any() else columns["tokens"] > 0
    shares: dict[str, list[float] | None] = {}
    for kind in ("tokens", "weights"):
        whole = columns[kind][rows].sum()
        parts = [columns[f"{name}/{kind}"][rows].sum() for name in ROLE_NAMES.values()]
        shares[kind] = [float(part / whole) for part in parts] if whole > 0 else None
    return shares


def _version() -> str:
    try:
        return version("srpo-core")
    except PackageNotFoundError:
        return "from source"


def _histograms(summary: Summary) -> dict[str, Any]:
    """Shares of the tokens by weight (in powers of 2) and by score (nats)."""
    histograms: dict[str, Any] = {}
    for index, name in enumerate(ROLE_NAMES.values()):
        for kind, grid, counts in (
            ("weight", np.log2(summary.weight_grid), summary.weight_counts[index]),
            ("score", summary.score_grid, summary.score_counts[index][None]),
        ):
            reach = _reach(grid, summary, kind)
            edges = np.linspace(-reach, reach, _BARS + 2)  # an odd number of bars: one has 1, or 0, in its middle
            bins = np.clip(np.searchsorted(edges, grid, side="right") - 1, 0, _BARS)
            bars = np.stack([np.bincount(bins, weights=row, minlength=_BARS + 1) for row in counts])
            whole = bars.sum(0)
            histograms.setdefault(kind, {})[name] = {
                "reach": reach,
                "all": _shares(whole),
                "wrong": _shares(bars[0]) if kind == "weight" else [],
                "right": _shares(bars[1]) if kind == "weight" else [],
                "count": int(whole.sum()),
                "tokens": int(summary.columns[f"{name}/tokens"].sum()),
            }
    return histograms


def _reach(grid: NDArray[np.float64], summary: Summary, kind: str) -> float:
    """The same axis for both roles, wide enough for nearly all tokens."""
    counts = summary.weight_counts.sum((0, 1)) if kind == "weight" else summary.score_counts.sum(0)
    if not counts.any():
        return 1.0
    share = np.cumsum(counts) / counts.sum()
    low, high = grid[np.searchsorted(share, 0.001)], grid[min(np.searchsorted(share, 0.999), len(grid) - 1)]
    steps = [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
    return next((step for step in steps if step >= max(abs(low), abs(high))), float(max(abs(low), abs(high))))


def _shares(counts: NDArray[np.float64]) -> list[float]:
    total = counts.sum()
    return [round(share, 5) for share in (counts / total).tolist()] if total else []


def _quadrants(summary: Summary) -> list[dict[str, Any]] | None:
    """Right and wrong answers after right and wrong perceptions, where the perceptions are labeled."""
    columns = summary.columns
    if not ((columns["perception_right"] >= 0) & (columns["right"] >= 0)).any():
        return None
    cells = []
    for perception in (1, 0):
        for answer in (1, 0):
            rows = (columns["perception_right"] == perception) & (columns["right"] == answer)
            weighed, scored = (columns[f"perception/{kind}"][rows].sum() for kind in ("weighed", "scored"))
            cells.append(
                {
                    "perception": perception,
                    "answer": answer,
                    "count": int(rows.sum()),
                    "weight": float(columns["perception/weights"][rows].sum() / weighed) if weighed else None,
                    "score": float(columns["perception/scores"][rows].sum() / scored) if scored else None,
                }
            )
    return cells


class _Curve(NamedTuple):
    """A mean over the responses of each step."""

    label: str
    unit: str  # on the axis
    help: str


_CURVES = {
    "reward": _Curve("Reward", "mean", "Mean reward of the responses of each step."),
    "right": _Curve("Right answers", "share", "Share of right answers among the judged answers of each step."),
    "structured": _Curve(
        "Responses with roles",
        "share",
        "Share of the responses of each step in which some token is part of a perception or of a reasoning. The others "
        "are trained as in GRPO.",
    ),
    "weight": _Curve("Weight of perception", "mean weight", "Mean weight of the perception tokens. 1 is GRPO."),
    "visual": _Curve(
        "Visual dependency",
        "nats per token",
        "Mean score of the perception tokens: the nats that a token loses when the image is corrupted. If it falls to "
        "0, the perceptions no longer depend on the image.",
    ),
    "consistency": _Curve(
        "Perception consistency",
        "nats per token",
        "Mean score of the reasoning tokens: the nats that a token loses when its perception is replaced. If it falls "
        "to 0, the reasoning no longer depends on the perception.",
    ),
}


def _training(summary: Summary, steps: NDArray[np.int64]) -> dict[str, Any]:
    """Means over the responses of each step, as the page draws them."""
    columns = summary.columns
    numbers = np.searchsorted(steps, columns["step"].clip(min=0))
    has_step = columns["step"] >= 0

    def series(numerator: NDArray[Any], denominator: NDArray[Any] | None = None) -> list[float | None]:
        part = numerator.astype(float)
        whole = (~np.isnan(part)).astype(float) if denominator is None else denominator.astype(float)
        rows = has_step & (whole > 0)
        sums, counts = (
            np.bincount(numbers[rows], weights=values[rows], minlength=len(steps)) for values in (part, whole)
        )
        return [float(f"{one / many:.6g}") if many else None for one, many in zip(sums, counts, strict=True)]

    structured = ((columns["perception/tokens"] + columns["reasoning/tokens"]) > 0).astype(float)
    structured[columns["tokens"] == 0] = np.nan
    answers = np.where(columns["right"] == UNKNOWN, np.nan, columns["right"])
    values = {
        "reward": series(columns["reward"]),
        "right": series(answers),
        "structured": series(structured),
        "weight": series(columns["perception/weights"], columns["perception/weighed"]),
        "visual": series(columns["perception/scores"], columns["perception/scored"]),
        "consistency": series(columns["reasoning/scores"], columns["reasoning/scored"]),
    }
    return {
        "step": steps.tolist(),
        "curves": [curve._asdict() | {"values": values[name]} for name, curve in _CURVES.items()],
    }
