"""``srpo show``: one response in the terminal."""

from itertools import islice
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from srpo_core.cli.reading import File, Right, Strict, finish, name_lines, read, scoring, with_tags
from srpo_core.cli.terminal import By, heat_text, legend, out, print_caret, safe, stop, table
from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.report import REASONS, fault
from srpo_core.roles import Role
from srpo_core.rollouts import RolloutError, ScoredRollout, ScoringOptions, score_rollouts
from srpo_core.rollouts.counts import right_of
from srpo_core.rollouts.retag import Retag
from srpo_core.tags import BrokenReason

__all__ = ["show"]

# What weights and scores are computed from, where they are not recorded.
_SOURCES = {"weight": "scores, nor log-probs of a second view", "score": "log-probs of a second view"}


@with_tags
def show(
    file: File,
    index: Annotated[int, typer.Option(min=0, help="Which response, from 0; malformed lines do not count.")] = 0,
    by: Annotated[By, typer.Option(help="Whether the colors show weights or scores.")] = "weight",
    list_tokens: Annotated[bool, typer.Option("--table", help="List every token with its numbers.")] = False,
    right: Right = None,
    strict: Strict = False,
    *,
    tags: Retag,
) -> None:
    """Show one response as a heat map in the terminal."""
    errors: list[RolloutError] = []
    found, count = None, 0
    for count, rollout in enumerate(islice(read(file, errors, tags=tags, strict=strict), index + 1), start=1):
        found = rollout if count == index + 1 else None
    if found is None:
        name_lines(errors)
        stop(
            f"there is no response {index} in {file}: --index must be at most {count - 1}"
            if count
            else f"there are no readable responses in {file}"
        )
    options = scoring(right, tags)
    scored = next(score_rollouts([found], options))
    _print_facts(scored, index, options)
    _print_heat(scored, by)
    _print_fault(scored)
    if (list_tokens or out.color_system is None) and len(found):
        out.print(_token_table(scored))
    finish(errors)


def _print_facts(scored: ScoredRollout, index: int, options: ScoringOptions) -> None:
    rollout = scored.rollout
    facts = [f"#{index}"] + ([rollout.id] if rollout.id is not None else [])
    for name in ("step", "group", "reward", "advantage", "reference", "image"):
        if (value := getattr(rollout, name)) is not None:
            facts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    rule = rollout.correct_by if options.right is None else options.right
    for name, value in (("answer", right_of(rollout, options)), ("perception", rollout.perception_correct)):
        if value is not None:
            facts.append(
                f"{name} {'right' if value else 'wrong'}" + (f" ({rule})" if name == "answer" and rule else "")
            )
    out.print(safe("  ".join(fact.replace("\n", " ") for fact in facts), style="bold"))
    if rollout.prompt is not None:
        out.print(safe(rollout.prompt, style="italic"))
    out.print()


def _print_heat(scored: ScoredRollout, by: By) -> None:
    rollout = scored.rollout
    if not len(rollout):
        out.print(safe(rollout.text))
        return
    out.print(heat_text(rollout.pieces, scored.weights if by == "weight" else scored.scores, by=by), soft_wrap=False)
    if scored.has_weights if by == "weight" else scored.has_contrast:
        out.print(Text("\n").append_text(legend(by)))
    else:
        out.print(
            Text(f"\nThe {by}s are not known, because the line has neither {by}s nor {_SOURCES[by]}.", style="yellow")
        )
    out.print(_role_table(scored))


def _print_fault(scored: ScoredRollout) -> None:
    reason, position = fault(scored.rollout)
    # The trainer may have judged the response differently.
    if scored.broken != BrokenReason.NONE and position is not None and reason != BrokenReason.NONE:
        out.print(Text(f"\nmalformed: {REASONS[reason]}", style="yellow"))
        print_caret(None, scored.rollout.text, position)


def _role_table(scored: ScoredRollout) -> Table:
    rows = table("", "tokens", "mean weight", "range", "mean score")
    for role, name in ROLE_NAMES.items():
        where = scored.roles == int(role)
        if where.any():
            of, scores = scored.weights[where], scored.scores[where]
            weighed, known = scored.has_weights, role in scored.known_scores
            spread = f"{of.min():.2f} to {of.max():.2f}" if weighed else "-"
            mean, score = f"{of.mean():.3f}" if weighed else "-", f"{scores.mean():+.3f} nats" if known else "-"
            rows.add_row(name, str(where.sum()), mean, spread, score)
    return rows


def _token_table(scored: ScoredRollout) -> Table:
    rows = table("token", "role", "weight", "score", left=2)
    for piece, role, weight, score in zip(
        scored.rollout.pieces, scored.roles, scored.weights, scored.scores, strict=True
    ):
        of_weight = f"{weight:.3f}" if scored.has_weights else "-"
        of_score = "" if role == Role.OTHER else f"{score:+.3f}" if Role(role) in scored.known_scores else "-"
        rows.add_row(safe(repr(piece)), Role(role).name.lower(), of_weight, of_score)
    return rows
