"""The ``--srpo.*`` options: command line to :class:`~srpo_core.SRPOConfig`, and on to the Ray workers."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from srpo_core import RoleTags, SRPOConfig

__all__ = ["ENVIRONMENT_VARIABLE", "ROLLOUTS_VARIABLE", "dump_config", "load_config", "option_parser", "parse_options"]

#: Carries the options to the Ray workers, as JSON.
ENVIRONMENT_VARIABLE = "SRPO_OPENRLHF"
#: Carries the path of the file that rollouts are written to, if there is one.
ROLLOUTS_VARIABLE = "SRPO_OPENRLHF_ROLLOUTS"
_PREFIX = "--srpo."

_HELP = {
    "perception_tags": "opening and closing tag around what the model says it sees",
    "reasoning_tags": "opening and closing tag around what it concludes",
    "answer_tags": "opening and closing tag around the answer; give none where answers are not tagged",
    "answer_role": "what answer tokens count as",
    "corruption": "what the second look at the image is like",
    "corruption_strength": "how much of it, in the unit of its kind, e.g. a share of patches",
    "seed": "of the corruption; the draw also depends on the step and the prompt",
    "counterfactual": "what happens to the perception in the second look at the reasoning",
    "counterfactual_image": "the image shown then",
    "use_spans": "of the perception, each left out of one more pass for a use score, this project's extension; 0: none",
    "strength": "of the weights; 0 is the stock loss",
    "visual_score": "contrast of perception tokens",
    "consistency_score": "contrast of reasoning tokens",
    "score_clip": "bound of both contrasts, nats",
    "use": "how the use score enters that of the perception; only with use_spans",
    "baseline": "what is subtracted from the scores of a response",
    "weight_map": "from centred score to weight",
    "renormalization": "over what the weights are 1 on average",
    "scale": "unit of the scores: nats, or their root mean square in the batch",
    "visual_scale": "size of a typical perception score, in that unit",
    "consistency_scale": "size of a typical reasoning score, in that unit",
    "bound": "of a centred score before the exponential, nats",
    "sign": "symmetric, or flipped where the advantage is negative",
    "mix": "share of the weights in 1 + mix * (weights - 1)",
    "mix_warmup_steps": "steps over which the mix grows from 0",
}
# The rest of SRPOConfig is what OpenRLHF's own flags say: advantages, loss, KL. `scale_decay` goes with ema_rms only.


def option_parser() -> argparse.ArgumentParser:
    """Parser of the ``--srpo.*`` options: one for each field of :class:`~srpo_core.SRPOConfig` that is read."""
    parser = argparse.ArgumentParser(
        "python -m srpo_openrlhf",
        usage="%(prog)s [--srpo.* ...] [any flag of openrlhf.cli.train_ppo_ray ...]",
        description="OpenRLHF's train_ppo_ray with SRPO's token weights multiplied into the advantages.",
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("SRPO")
    group.add_argument(
        _PREFIX + "rollouts",
        metavar="FILE",
        help="write every rollout batch to this JSON Lines file, for `srpo report` and its kin; resuming appends",
    )
    defaults = SRPOConfig()
    hints = get_type_hints(SRPOConfig)
    for name, text in _HELP.items():
        kind, is_tags, _ = name.partition("_tags")
        if is_tags:
            default = getattr(defaults.tags, kind)
            group.add_argument(
                _PREFIX + name,
                nargs="*" if name == "answer_tags" else 2,
                metavar="TAG",
                default=default,
                help=f"{text} (default: {' '.join(default)})",
            )
            continue
        default = getattr(defaults, name)
        shown = "that of the kind" if default is None else f"{default:.4g}" if isinstance(default, float) else default
        group.add_argument(_PREFIX + name, default=default, help=f"{text} (default: {shown})", **_argument(hints[name]))
    return parser


def parse_options(argv: Sequence[str]) -> tuple[SRPOConfig, str | None, list[str]]:
    """The checked options, the file for the rollouts, and what is left of the command line for OpenRLHF, in its order.

    Exits with status 2 and a sentence if an option is unknown or out of range, as argparse does.

    Example:
        >>> config, _, rest = parse_options(["--actor.adam.lr", "1e-6", "--srpo.strength", "0.5", "--seed", "1"])
        >>> config.strength, rest
        (0.5, ['--actor.adam.lr', '1e-6', '--seed', '1'])
    """
    parser = option_parser()
    ours, rest = parser.parse_known_args(argv)
    unknown = [flag for flag in rest if flag.startswith(_PREFIX)]
    if unknown:
        parser.error(f"unknown option {unknown[0].partition('=')[0]}; python -m srpo_openrlhf --help lists them")
    values = {name.removeprefix("srpo."): value for name, value in vars(ours).items()}
    rollouts = values.pop("rollouts")
    try:
        tags = RoleTags(
            perception=values.pop("perception_tags"),
            reasoning=values.pop("reasoning_tags"),
            answer=values.pop("answer_tags") or None,
        )
        return SRPOConfig(tags=tags, **values), rollouts, rest
    except ValueError as error:
        parser.error(f"{_PREFIX}*: {error}")


def dump_config(config: SRPOConfig) -> str:
    """The options as a string for an environment variable."""
    return json.dumps(asdict(config))


def load_config() -> SRPOConfig:
    """The options that the launcher put into this worker's environment.

    Raises:
        RuntimeError: If there are none.
    """
    dumped = os.environ.get(ENVIRONMENT_VARIABLE)
    if dumped is None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE} is not set in this Ray worker: start with python -m srpo_openrlhf")
    values = json.loads(dumped)
    return SRPOConfig(tags=RoleTags(**values.pop("tags")), **values)


def _argument(annotation: Any) -> dict[str, Any]:
    """Type and choices of an option, read off its annotation."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    kind = next(kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType)
    return {"type": kind, "metavar": kind.__name__.upper()}
