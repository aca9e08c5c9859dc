"""Scored rollouts to one self-contained page: what happened to the credit, and where in each response.

The page loads nothing and runs one script, its own: a policy in its head forbids all else. Whatever comes out of a
model enters it as text, never as markup.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srpo_core.diagnostics import INTERFERENCE_MATTERS, ROLE_NAMES
from srpo_core.report.colors import SCALES, TEXT, Color, Theme, score_shade, weight_shade
from srpo_core.roles import BrokenReason, Role, parse_response
from srpo_core.rollouts import Rollout
from srpo_core.summaries import (
    CreditOptions,
    ScoredRollout,
    Summary,
    load,
    score_rollouts,
    summarize_rollouts,
)

__all__ = ["fault", "report_files", "report_rollouts"]

_MAX_BYTES = 5_000_000
_IMAGE_SHARE = 0.4  # of the page
_IMAGE_SIDE = 384  # pixels
_IMAGE_BYTES = 50_000  # beyond, it is compressed
_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
_BARS = 64  # of a histogram
_ROLE_LETTER = {Role.OTHER: "O", Role.PERCEPTION: "P", Role.REASONING: "R"}

#: What the reasons to be broken mean to a person.
REASONS = {
    BrokenReason.NO_PERCEPTION: "no perception block",
    BrokenReason.UNCLOSED: "a block is left open",
    BrokenReason.NESTED: "a block opens inside another",
    BrokenReason.CROSSED: "two blocks overlap",
    BrokenReason.STRAY_CLOSE: "a block closes that is not open",
    BrokenReason.TWO_ANSWERS: "a second answer",
}


def report_files(
    summary: Summary,
    path: str | os.PathLike[str],
    *,
    sample: int = 200,
    seed: int = 0,
    max_bytes: int = _MAX_BYTES,
    title: str = "Credit report",
) -> None:
    """Write the page of summarised files; statistics over all responses, heat maps of a sample.

    Args:
        summary: From :func:`~srpo_core.summaries.summarize_files`.
        path: Of the page.
        sample: Responses to show, at most.
        seed: Of the draw.
        max_bytes: Size of the page, at most: fewer responses and images are shown where it is reached.
        title: Of the page.
    """
    rows = summary.sample(sample, seed=seed).tolist()
    shown = zip(rows, load(summary, rows), strict=True)
    folders = [Path(file).parent for file in summary.files]
    page = _page(summary, shown, folders, seed=seed, max_bytes=max_bytes, title=title)
    Path(path).write_text(page, encoding="utf-8")


def report_rollouts(
    rollouts: Iterable[Rollout],
    path: str | os.PathLike[str],
    *,
    options: CreditOptions | None = None,
    image_folder: str | os.PathLike[str] = ".",
    sample: int = 200,
    seed: int = 0,
    max_bytes: int = _MAX_BYTES,
    title: str = "Credit report",
) -> None:
    """Write the same page of rollouts in memory.

    Args:
        rollouts: Read, or made by hand.
        path: Of the page.
        options: How log-probs become weights.
        image_folder: Where relative image paths start.
        sample: Responses to show, at most.
        seed: Of the draw.
        max_bytes: Size of the page, at most.
        title: Of the page.

    Example:
        >>> import tempfile
        >>> from srpo_core.rollouts import parse_rollout
        >>> rollout = parse_rollout('{"tokens": ["<perception>", "a", "cat", "</perception>"]}')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report_rollouts([rollout], Path(folder) / "report.html")
        ...     (Path(folder) / "report.html").read_text()[:15]
        '<!doctype html>'
    """
    scored = list(score_rollouts(rollouts, options))
    summary = summarize_rollouts(scored, options)
    rows = summary.sample(sample, seed=seed).tolist()
    shown = ((row, scored[row]) for row in rows)
    page = _page(summary, shown, [Path(image_folder)], seed=seed, max_bytes=max_bytes, title=title)
    Path(path).write_text(page, encoding="utf-8")


def interference_in_words(interference: float | None) -> tuple[str, str]:
    """The figure as it is shown, and what it advises; without one, how to have it."""
    if interference is None:
        return "", "not measured: srpo_core.diagnostics.interference says how"
    figure = "∞" if math.isinf(interference) else f"{interference:.3g}"
    if 0 < interference < 0.001:
        figure = "< 0.001"
    if interference < INTERFERENCE_MATTERS:
        return figure, (
            f"below {INTERFERENCE_MATTERS:g}, stay with GRPO: "
            "learning from the tokens that weigh little hardly moves the perception that weighs much"
        )
    return figure, (
        "weights may matter here: learning from the tokens that weigh little moves the perception that weighs much"
    )


def fault(rollout: Rollout) -> tuple[BrokenReason, int | None]:
    """Why the text of a response is malformed, and the character at which that shows."""
    parsed = parse_response(rollout.text, rollout.tags, finished=rollout.finished)
    return parsed.reason, parsed.position


# The page


def _page(
    summary: Summary,
    shown: Iterable[tuple[int, ScoredRollout]],
    folders: Sequence[Path],
    *,
    seed: int,
    max_bytes: int,
    title: str,
) -> str:
    advantages = summary.advantages
    overview = _overview(summary, title)
    folder = files("srpo_core.report")
    template = {name: folder.joinpath(f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    style = template["css"] + "".join(_shades(theme) for theme in SCALES)
    fixed = sum(map(len, (*template.values(), style))) + len(_json(overview)) + 2000

    images = _Images(folders, budget=int((max_bytes - fixed) * _IMAGE_SHARE))
    budget = max_bytes - fixed
    rows, left_out = [], 0
    for index, scored in shown:
        row = _row(summary, index, scored, advantages[index])
        size = len(_json(row).encode())
        if size > budget:
            left_out += 1
            continue
        used = images.used
        row["image"] = images.add(scored.rollout.image, summary.places[index].file if summary.places else 0)
        budget -= size + 32 + images.used - used
        rows.append(row)
    rows.sort(key=lambda row: row["index"])
    data = overview | {
        "rows": rows,
        "images": images.shown,
        "sample": {"shown": len(rows), "total": len(summary), "tooLarge": left_out, "seed": seed}
        | {"images": len(images.shown), "imagesLeftOut": images.left_out, "imagesMissing": images.missing},
    }
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(template['js'])}'; style-src '{_hash(style)}'"
    )
    parts = {"policy": policy, "title": html.escape(title), "style": style, "script": template["js"]}
    parts["data"] = _json(data)
    # In one pass, so that nothing that is filled in is taken for a place to fill in.
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template["html"])


def _json(data: Any) -> str:
    """JSON that stays inside its script element whatever the strings say."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Lone surrogates cannot be written as UTF-8.
    text = text.encode("utf-8", "replace").decode()
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _css(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _shades(theme: Theme) -> str:
    """Classes h0, h1, ... of the heat map's scale, under one theme."""
    rules = [f"[data-theme={theme}]{{--heat-text:{_css(TEXT[theme])};--heat-middle:{_css(SCALES[theme][20])}}}"]
    rules += [f"[data-theme={theme}] .h{shade}{{background:{_css(c)}}}" for shade, c in enumerate(SCALES[theme])]
    return "\n".join(rules) + "\n"


# Overview


def _overview(summary: Summary, title: str) -> dict[str, Any]:
    columns = summary.columns
    steps = np.unique(columns["step"][columns["step"] >= 0])
    recorded = int(columns["recorded"].sum())
    rewards = columns["reward"][~np.isnan(columns["reward"])]
    advantages = summary.advantages
    metrics = summary.metrics()
    figure, advice = interference_in_words(metrics.pop("interference", None))  # infinity is no JSON
    return {
        "title": title,
        "version": _version(),
        "files": [Path(file).name for file in summary.files],
        "counts": {
            "responses": len(summary),
            "tokens": int(columns["tokens"].sum()),
            "groups": len({group for group in summary.groups if group is not None}),
            "silent": _silent_share(summary, advantages),
            "steps": len(steps),
            "malformed": summary.malformed,
            "noContrast": int((~columns["contrast"] & ~columns["recorded"]).sum()),
        },
        "reward": float(rewards.mean()) if len(rewards) else None,
        "errors": [
            {"file": Path(error.path or "").name, "line": error.line, "reason": error.reason}
            for error in summary.errors[:5]
        ],
        "weights": "recorded" if recorded == len(summary) else "computed" if not recorded else "partly recorded",
        "options": _changed_options(summary.options),
        "clip": summary.options.config.score_clip,
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
        "steps": _steps(summary, steps) if len(steps) > 2 else None,
    }


def _version() -> str:
    try:
        return version("srpo-core")
    except PackageNotFoundError:
        return "from source"


def _changed_options(options: CreditOptions) -> str:
    default = CreditOptions().config
    changed = {f.name: getattr(options.config, f.name) for f in fields(default)}
    named = [f"{name}={value!r}" for name, value in changed.items() if value != getattr(default, name)]
    return ", ".join(named) or "the defaults"


def _silent_share(summary: Summary, advantages: NDArray[np.float64]) -> float | None:
    """Share of responses whose group's rewards are all equal: they teach nothing."""
    known = ~np.isnan(advantages)
    return float((advantages[known] == 0).mean()) if known.any() else None


def _histograms(summary: Summary) -> dict[str, Any]:
    """Shares of tokens by weight (in powers of 2) and by score (nats)."""
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
    """Of responses whose perception is labelled: right and wrong answers out of right and wrong perceptions."""
    columns = summary.columns
    if not ((columns["perception_right"] >= 0) & (columns["right"] >= 0)).any():
        return None
    cells = []
    for perception in (1, 0):
        for answer in (1, 0):
            rows = (columns["perception_right"] == perception) & (columns["right"] == answer)
            tokens = columns["perception/tokens"][rows].sum()
            cells.append(
                {
                    "perception": perception,
                    "answer": answer,
                    "count": int(rows.sum()),
                    "weight": float(columns["perception/weights"][rows].sum() / tokens) if tokens else None,
                    "score": float(columns["perception/scores"][rows].sum() / tokens) if tokens else None,
                }
            )
    return cells


def _steps(summary: Summary, steps: NDArray[np.int64]) -> dict[str, Any]:
    """Means over the responses of each step."""
    columns = summary.columns

    def series(numerator: NDArray[Any], denominator: NDArray[Any] | None = None) -> list[float | None]:
        values = []
        for step in steps:
            rows = columns["step"] == step
            part = numerator[rows].astype(float)
            whole = (~np.isnan(part)).sum() if denominator is None else denominator[rows].sum()
            values.append(round(float(np.nansum(part) / whole), 5) if whole else None)
        return values

    structured = (columns["perception/tokens"] + columns["reasoning/tokens"]) > 0
    return {
        "step": steps.tolist(),
        "reward": series(columns["reward"]),
        "structured": series(structured),
        "perception weight": series(columns["perception/weights"], columns["perception/tokens"]),
        "perception score": series(columns["perception/scores"], columns["perception/tokens"]),
        "reasoning score": series(columns["reasoning/scores"], columns["reasoning/tokens"]),
    }


# Responses


def _row(summary: Summary, index: int, scored: ScoredRollout, advantage: float) -> dict[str, Any]:
    rollout = scored.rollout
    pieces = rollout.pieces or [rollout.text]
    weights = scored.weights if len(rollout) else np.ones(1, np.float32)
    scores = scored.scores if len(rollout) else np.zeros(1, np.float32)
    roles = scored.roles if len(rollout) else np.zeros(1, np.int64)
    _, position = fault(rollout)
    row = {
        "index": index,
        "tokens": pieces,
        "roles": "".join(_ROLE_LETTER[Role(role)] for role in roles),
        "weights": np.rint(1000 * weights.astype(np.float64)).astype(int).tolist(),
        "weightShades": weight_shade(weights).tolist(),
        "broken": scored.broken.name.lower(),
        "right": rollout.is_right,
        "perceptionRight": rollout.perception_correct,
        "reward": rollout.reward,
        "advantage": None if math.isnan(advantage) else round(advantage, 4),
        "group": None if rollout.group is None else str(rollout.group),
        "step": rollout.step,
        "id": rollout.id,
        "prompt": rollout.prompt,
        "reference": rollout.reference,
        "extra": json.dumps(rollout.extra, ensure_ascii=False) if rollout.extra else None,
        "finished": rollout.finished,
    }
    if scored.has_contrast:
        row |= {"scores": _hundredths(scores), "scoreShades": score_shade(scores).tolist()}
    if scored.broken != BrokenReason.NONE and position is not None and rollout.ends is not None:
        row["brokenToken"] = int(min(np.searchsorted(rollout.ends, position, side="right"), len(pieces) - 1))
    if rollout.old_log_probs is not None:
        row["logProbs"] = _hundredths(rollout.old_log_probs)
        other = np.zeros_like(rollout.old_log_probs)
        for role, values in (
            (Role.PERCEPTION, rollout.corrupted_log_probs),
            (Role.REASONING, rollout.counterfactual_log_probs),
        ):
            if values is not None:
                other = np.where(roles == int(role), values, other)
        row["otherLogProbs"] = _hundredths(other)
    if summary.places:
        place = summary.places[index]
        row |= {"file": place.file, "line": place.line}
    return {name: value for name, value in row.items() if value is not None}


def _hundredths(values: NDArray[np.floating]) -> list[int]:
    # Minus infinity is shown as what it is not far from.
    return np.rint(100 * np.clip(values.astype(np.float64), -999.0, 999.0)).astype(int).tolist()


@dataclass
class _Images:
    """Images as data URIs by their path, as many as fit."""

    folders: Sequence[Path]
    budget: int
    shown: dict[str, str] = field(default_factory=dict)
    used: int = 0
    left_out: int = 0
    missing: int = 0

    def add(self, image: str | None, file: int) -> str | None:
        if image is None:
            return None
        key = f"{file}/{image}" if len(self.folders) > 1 else image
        if key not in self.shown:
            uri = _data_uri(self.folders[file] / image)
            if uri is None:
                self.missing += 1
                return None
            if self.used + len(uri) > self.budget:
                self.left_out += 1
                return None
            self.shown[key] = uri
            self.used += len(uri) + len(key) + 8
        return key


def _data_uri(path: Path) -> str | None:
    """A small copy of an image; the file itself where Pillow is absent; None if it is no image that can be read."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError):
        return None
    kind = next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
    if kind is None:
        return None
    try:
        from PIL import Image
    except ImportError:
        pass
    else:
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                if max(image.size) > _IMAGE_SIDE or len(content) > _IMAGE_BYTES:
                    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
                    smaller = io.BytesIO()
                    image.convert("RGB").save(smaller, "JPEG", quality=82)
                    content, kind = smaller.getvalue(), "jpeg"
        except Exception:  # Pillow raises whatever its decoders do
            return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
