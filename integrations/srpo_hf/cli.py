"""``srpo score``: a model's log-probs in every view, added to anyone's rollouts."""

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from srpo_core import SRPOConfig
from srpo_core.checked import OptionError
from srpo_core.cli.reading import File, Strict, finish, with_options, with_tags, written
from srpo_core.cli.terminal import err, out, safe, stop, table
from srpo_core.options import ContextOptions
from srpo_core.rollouts import RolloutError
from srpo_core.rollouts.retag import Retag

__all__ = ["score"]

_HINTS = get_type_hints(ContextOptions)
_NAMES = ("corruption", "corruption_amount", "seed", "counterfactual", "counterfactual_image", "answer_role")
_OFFERED = {each.name: (each, _HINTS[each.name]) for each in fields(ContextOptions) if each.name in _NAMES}


@with_tags
@with_options(_OFFERED)
def score(
    file: File,
    *,
    model: Annotated[
        str, typer.Option("--model", help="The checkpoint that sampled the responses: a folder, or a name on the hub.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the result goes. Else FILE.scored.jsonl, beside FILE.")
    ] = None,
    template: Annotated[
        bool | None,
        typer.Option(
            "--template/--no-template",
            help="Put every prompt into the chat template, or none. Else those that are not templated already.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system message of prompts that are put into the chat template.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="The temperature that the responses were sampled with.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses in one forward pass.")] = 8,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave a response unscored if it is longer, prompt included. Else the model's bound."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:0 or cpu; auto spreads the model over all. Else a GPU if any.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: that of the checkpoint.")
    ] = "auto",
    attention: Annotated[
        str | None, typer.Option(help="An implementation that transformers knows, such as sdpa or flash_attention_2.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the checkpoint run.")
    ] = False,
    strict: Strict = False,
    tags: Retag,
    **chosen: Any,
) -> None:
    """Score the responses of any rollout file with a model, in every view, for `srpo report` and `srpo weights`.

    A run that was stopped goes on where it was when it is started again.
    """
    try:
        config = SRPOConfig(**chosen)
    except OptionError as error:
        stop(error.worded(written))
    if not temperature > 0:
        stop(f"--temperature must be above 0, got {temperature}")
    target = file.with_name(f"{file.stem}.scored.jsonl") if output is None else output
    if target.exists():
        is_source = target.samefile(file)
        stop(
            f"{target} is the file that is read; write to another"
            if is_source
            else f"{target} is there already: remove it, or name another file with -o"
        )
    try:
        from srpo_hf import Scorer
        from srpo_hf.loading import encoder, load_model, longest, made_with
        from srpo_hf.score import ScoreOptions, score_file
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("srpo"):
            raise
        stop(f"srpo score needs {error.name}, which is not installed: pip install '.[hf]' in a checkout of srpo_core")
    loading = {"device": device, "dtype": dtype, "attention": attention, "trust_remote_code": trust_remote_code}
    try:
        with err.status("loading the model"):
            policy, processor = load_model(model, **loading)
        scorer = Scorer(policy, processor, config, temperature=temperature, batch_size=batch_size)
        about = made_with(model, policy) | {"temperature": temperature, "batch_size": batch_size, **loading}
        columns = (TextColumn("scoring"), BarColumn(40), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
            task = progress.add_task("", total=None)
            scored = score_file(
                file,
                target,
                scorer,
                processor,
                encoder(policy, processor),
                config,
                ScoreOptions(
                    tags=tags,
                    template=template,
                    system=system,
                    max_tokens=max_tokens if max_tokens is not None else longest(policy),
                    rows=max(ScoreOptions.rows, batch_size),
                ),
                made_with=about | {"srpo_core": version("srpo-core"), "transformers": version("transformers")},
                strict=strict,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except MemoryError:
        stop(f"the memory is full: lower --batch-size, which is {batch_size}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        stop(f"the memory of the device is full: lower --batch-size, which is {batch_size}")
    except (RolloutError, ValueError, OSError) as error:
        stop(str(error))
    _print(scored, target)
    finish(scored.errors)
    if not scored.scored:
        stop("no response could be scored")


def _print(scored: Any, target: Path) -> None:
    facts = table("", "", left=2)
    facts.add_row("responses", f"{scored.responses:,}")
    if scored.resumed:
        facts.add_row("of an earlier run", f"{scored.resumed:,}")
    facts.add_row("scored", f"{scored.scored:,}")
    if scored.without_image:
        facts.add_row("without an image", f"{scored.without_image:,}; no corrupted_log_probs, because nothing can be")
    if scored.encoded:
        facts.add_row(
            "encoded anew", f"{scored.encoded:,}; their recorded tokens are not those of this model's tokenizer"
        )
    out.print(facts)
    for reason, count in scored.unscored.items():
        places = ", ".join(scored.places[reason])
        more = f", and {count - len(scored.places[reason]):,} more" if count > len(scored.places[reason]) else ""
        out.print(safe(f"\n{count:,} left unscored, because {reason}: {places}{more}", style="yellow"), soft_wrap=True)
    if scored.gap is not None and scored.score is not None and scored.gap > scored.score:
        out.print(
            Text(
                f"\nThe log-probs that the file held differ from this model's by {scored.gap:.2f} nats a token, more "
                f"than the scores ({scored.score:.2f} nats): is this the checkpoint that sampled the responses, and "
                "the prompt that it was given? They were replaced.",
                style="yellow",
            ),
            soft_wrap=True,
        )
    if scored.scored:
        out.print(safe(f"\n{target} holds the log-probs and weights; srpo report reads it."), soft_wrap=True)
