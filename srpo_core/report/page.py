"""The page: one file that loads nothing and runs only its own script.

A content security policy in its head forbids everything else. Whatever a model wrote enters the page as text, never as
markup.
"""

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srpo_core.report.colors import REACH, SCALES, TEXT, Color, Theme, score_shade, weight_shade
from srpo_core.report.images import Images
from srpo_core.report.overview import overview
from srpo_core.report.words import fault
from srpo_core.roles import Role
from srpo_core.rollouts import (
    Rollout,
    ScoredRollout,
    ScoringOptions,
    Summary,
    load,
    score_rollouts,
    summarize_rollouts,
)
from srpo_core.rollouts.counts import UNKNOWN
from srpo_core.rollouts.record import ROLE_LETTERS

__all__ = ["Written", "report_files", "report_rollouts"]

_MAX_BYTES = 5_000_000
_IMAGE_SHARE = 0.4  # of the page
_SCRIPTS = ("base.js", "overview.js", "responses.js")  # joined in this order


class Written(NamedTuple):
    """What a written page holds.

    Attributes:
        shown: Number of responses in the list.
        missing_images: Which images are not shown and why, in one sentence; empty if none is missing.
    """

    shown: int
    missing_images: str


def report_files(
    summary: Summary,
    path: str | os.PathLike[str],
    *,
    sample: int = 200,
    seed: int = 0,
    max_bytes: int = _MAX_BYTES,
    title: str = "Credit report",
    image_folder: str | os.PathLike[str] | None = None,
) -> Written:
    """Write the page of summarized files: statistics over all responses, heat maps of a sample.

    Args:
        summary: From :func:`~srpo_core.rollouts.summarize_files`.
        path: The file to write; missing folders are made.
        sample: Number of responses to show, at most.
        seed: Seed for drawing them.
        max_bytes: Size of the page, at most. If it would be exceeded, fewer responses and images are shown.
        title: Title of the page.
        image_folder: Where images may lie beside the folders of the files, with all that is below it. Images in other
            places are not shown, because whoever wrote a file may name any path.

    Returns:
        What the page holds.
    """
    rows = summary.sample(sample, seed=seed).tolist()
    shown = zip(rows, load(summary, rows), strict=True)
    folders = [Path(file).parent for file in summary.files]
    allowed = [] if image_folder is None else [Path(image_folder)]
    return _write(path, summary, shown, folders, allowed, seed=seed, max_bytes=max_bytes, title=title)


def report_rollouts(
    rollouts: Iterable[Rollout],
    path: str | os.PathLike[str],
    *,
    options: ScoringOptions | None = None,
    image_folder: str | os.PathLike[str] = ".",
    sample: int = 200,
    seed: int = 0,
    max_bytes: int = _MAX_BYTES,
    title: str = "Credit report",
) -> Written:
    """Write the same page for rollouts in memory.

    Args:
        rollouts: The rollouts.
        path: The file to write; missing folders are made.
        options: How log-probs become weights; None for the defaults.
        image_folder: Where relative image paths start; images outside of it are not shown.
        sample: Number of responses to show, at most.
        seed: Seed for drawing them.
        max_bytes: Size of the page, at most.
        title: Title of the page.

    Returns:
        What the page holds.

    Example:
        >>> import tempfile
        >>> from srpo_core.rollouts import parse_rollout
        >>> rollout = parse_rollout('{"tokens": ["<perception>", "a", "cat", "</perception>"]}')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = report_rollouts([rollout], Path(folder) / "report.html")
        ...     written.shown, (Path(folder) / "report.html").read_text()[:15]
        (1, '<!doctype html>')
    """
    scored = list(score_rollouts(rollouts, options))
    summary = summarize_rollouts(scored, options)
    rows = summary.sample(sample, seed=seed).tolist()
    shown = ((row, scored[row]) for row in rows)
    return _write(path, summary, shown, [Path(image_folder)], [], seed=seed, max_bytes=max_bytes, title=title)


def _write(
    path: str | os.PathLike[str],
    summary: Summary,
    shown: Iterable[tuple[int, ScoredRollout]],
    folders: Sequence[Path],
    allowed: Sequence[Path],
    *,
    seed: int,
    max_bytes: int,
    title: str,
) -> Written:
    advantages = summary.advantages
    about_all = overview(summary, title)
    folder = files("srpo_core.report")
    template = {name: folder.joinpath(f"page.{name}").read_text("utf-8") for name in ("html", "css")}
    template["js"] = "".join(folder.joinpath(name).read_text("utf-8") for name in _SCRIPTS)
    style = template["css"] + "".join(_shades(theme) for theme in SCALES)
    fixed = sum(map(len, (*template.values(), style))) + len(_json(about_all)) + 2000

    images = Images(folders, budget=int((max_bytes - fixed) * _IMAGE_SHARE), allowed=allowed)
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
    data = about_all | {
        "rows": rows,
        "images": images.shown,
        "sample": {"shown": len(rows), "total": len(summary), "tooLarge": left_out, "seed": seed}
        | {"images": len(images.shown), "imagesLeftOut": len(images.left_out), "imagesMissing": len(images.missing)},
        "missingImages": images.missing_in_words(),
    }
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(template['js'])}'; style-src '{_hash(style)}'"
    )
    parts = {"policy": policy, "title": html.escape(title), "style": style, "script": template["js"]}
    parts["data"] = _json(data)
    # In one pass, because what has been filled in may itself look like a place to fill in.
    page = re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template["html"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")
    return Written(len(rows), data["missingImages"])


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
    """Classes h0, h1, ... of the heat map's scale, for one theme."""
    rules = [f"[data-theme={theme}]{{--heat-text:{_css(TEXT[theme])};--heat-middle:{_css(SCALES[theme][REACH])}}}"]
    rules += [f"[data-theme={theme}] .h{shade}{{background:{_css(c)}}}" for shade, c in enumerate(SCALES[theme])]
    return "\n".join(rules) + "\n"


def _row(summary: Summary, index: int, scored: ScoredRollout, advantage: float) -> dict[str, Any]:
    rollout, roles = scored.rollout, scored.roles
    right, perception_right, broken = (int(summary.columns[n][index]) for n in ("right", "perception_right", "broken"))
    _, position = fault(rollout)
    row = {
        "index": index,
        "tokens": rollout.pieces if scored.has_tokens else [rollout.text],
        "length": len(rollout) if scored.has_tokens else None,
        "roles": "".join(ROLE_LETTERS[Role(role)] for role in roles) if scored.has_tokens else "O",
        "broken": "none" if broken == UNKNOWN else scored.broken.name.lower(),
        "right": None if right == UNKNOWN else bool(right),
        "perceptionRight": None if perception_right == UNKNOWN else bool(perception_right),
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
    if scored.has_tokens and scored.has_weights:
        weights = scored.weights
        row["weights"] = np.rint(1000 * weights.astype(np.float64)).astype(int).tolist()
        row["weightShades"] = weight_shade(weights).tolist()
    if scored.has_tokens and scored.has_contrast:
        known = np.isin(roles, [int(role) for role in scored.known_scores])
        row |= {"scores": _hundredths(scored.scores, known), "scoreShades": score_shade(scored.scores).tolist()}
    if row["broken"] != "none" and position is not None and rollout.ends is not None and len(rollout):
        row["brokenToken"] = int(min(np.searchsorted(rollout.ends, position, side="right"), len(rollout) - 1))
    if rollout.old_log_probs is not None:
        row["logProbs"] = _hundredths(rollout.old_log_probs)
        other, known = np.zeros_like(rollout.old_log_probs), np.zeros(len(rollout), dtype=bool)
        for role, values in (
            (Role.PERCEPTION, rollout.corrupted_log_probs),
            (Role.REASONING, rollout.counterfactual_log_probs),
        ):
            if values is not None:
                other = np.where(roles == int(role), values, other)
                known |= roles == int(role)
        row["otherLogProbs"] = _hundredths(other, known)
    if summary.places:
        place = summary.places[index]
        row |= {"file": place.file, "line": place.line}
    return {name: value for name, value in row.items() if value is not None}


def _hundredths(values: NDArray[np.floating], known: NDArray[np.bool_] | None = None) -> list[int | None]:
    # JSON has no infinity: it is shown as a large number.
    numbers: list[int | None] = np.rint(100 * np.clip(values.astype(np.float64), -999.0, 999.0)).astype(int).tolist()
    for token in [] if known is None else np.flatnonzero(~known).tolist():
        numbers[token] = None
    return numbers
