"""One rollout batch and one driver for all trainers: plan what has to be scored, then turn the scores into credit.

A trainer of any framework does four things: it makes a :class:`RolloutBatch` of its responses, asks :func:`plan` which
other views have to be scored, scores each by its own forward pass, and gives the log-probs to :func:`credit`. These are
two calls because planning may happen in another process than scoring.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.counterfactuals import CounterfactualResponses, counterfactual_responses
from srpo_core.diagnostics import credit_diagnostics
from srpo_core.engine_gap import ENGINE_METRICS, engine_gap
from srpo_core.masking import masked_mean
from srpo_core.options import ContextOptions, SRPOConfig
from srpo_core.reliance import SpanCounterfactuals, span_counterfactuals
from srpo_core.roles import Segmentation, ending_ids, segment_responses
from srpo_core.srpo import Credit, srpo_advantages
from srpo_core.tags import Kind, open_block
from srpo_core.token_text import TokenizerLike
from srpo_core.typechecking import typechecked
from srpo_core.weights import ScaleState

__all__ = [
    "MAIN_METRICS",
    "MetricSet",
    "Plan",
    "RolloutBatch",
    "View",
    "credit",
    "ending_ids",
    "logged",
    "plan",
    "prompt_id",
    "record",
]

#: Which metrics are logged: the few to look at in every run, or all.
MetricSet = Literal["main", "all"]

#: The main metrics, in the order in which they are worth a look: whether responses have roles, whether scores say
#: anything, whether the weights move credit, and how many responses teach something. They are means over the batch and
#: always the same names, so that a trainer may average them over several batches.
MAIN_METRICS = (
    "structured/fraction",
    "score/perception/mean",
    "score/reasoning/mean",
    "tokens/perception/fraction",
    "weight/perception/mass",
    "tokens/effective_fraction",
    "advantage/cosine",
    "advantage/zero",
    "swap/coverage",
    "corruption/unchanged",
    "right/fraction",
)

#: The kinds of block that a response may begin inside of, by their code in :attr:`RolloutBatch.open_at_start`.
OPEN_BLOCKS: tuple[Kind | None, ...] = (None, "perception", "reasoning", "answer")


class RolloutBatch(NamedTuple):
    """The responses of a rollout batch, of all processes that share a baseline or lend each other perceptions.

    Attributes:
        token_ids: Sampled tokens, right-padded; or whole sequences, if `attended` says so.
        mask: True at the tokens the policy sampled.
        segmentation: What each token does.
        group_ids: Equal where responses answer the same prompt; best from :func:`prompt_id`.
        attended: True at all tokens that are context or sampled, where `token_ids` hold prompts too. None: `mask`.
        open_at_start: The block that each prompt left open, as its place in ``OPEN_BLOCKS``; None: none did.
    """

    token_ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    segmentation: Segmentation
    group_ids: Int[Tensor, " batch"]
    attended: Bool[Tensor, "batch time"] | None = None
    open_at_start: Int[Tensor, " batch"] | None = None

    @staticmethod
    def of(
        token_ids: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        tokenizer: TokenizerLike,
        options: ContextOptions,
        *,
        group_ids: Int[Tensor, " batch"],
        prompt_ends: Sequence[str] | None = None,
        ending: Sequence[int] | None = None,
        attended: Bool[Tensor, "batch time"] | None = None,
    ) -> "RolloutBatch":
        """The batch with its responses segmented by the tags of the options.

        Args:
            token_ids: Sampled tokens, right-padded; or whole sequences, with `attended`.
            mask: True at the tokens the policy sampled.
            tokenizer: Anything with ``decode(list_of_ids) -> str``.
            options: The tags, and what answers count as.
            group_ids: Equal where responses answer the same prompt; best from :func:`prompt_id`.
            prompt_ends: The prompt of each response as text with its special tokens, or the end of it. Where it ends
                in an opening tag, as many chat templates of thinking models do, the response begins inside that block.
                None: all begin outside.
            ending: Ids that end a response, from :func:`ending_ids`; None: those of the tokenizer.
            attended: True at context and sampled tokens, where `token_ids` hold prompts too. None: `mask`.

        Raises:
            ValueError: If there is not one of `prompt_ends` for each response.
        """
        opened: list[Kind | None] | None = None
        if prompt_ends is not None:
            if len(prompt_ends) != len(token_ids):
                raise ValueError(
                    f"prompt_ends must have one text per response, {len(token_ids)}, got {len(prompt_ends)}"
                )
            opened = [open_block(end, options.tags) for end in prompt_ends]
        segmentation = segment_responses(
            token_ids,
            mask,
            tokenizer,
            tags=options.tags,
            eos_token_id=ending,
            answer_role=options.answer_role,
            open_at_start=opened,
        )
        codes = None if opened is None else torch.tensor([OPEN_BLOCKS.index(kind) for kind in opened])
        return RolloutBatch(
            token_ids,
            mask,
            segmentation,
            group_ids,
            attended,
            None if codes is None else codes.to(token_ids.device),
        )


def prompt_id(prompt: Tensor, inputs: Mapping[str, Any] | None = None) -> int:
    """A number that names a prompt and its images: the same in every process, batch, step and run.

    It is the prompt's own, whatever its place in a batch: give it to :func:`~srpo_core.corrupt_images`, whose draw it
    keys, and as `group_ids`. Of each input up to 4096 values, evenly spread, are read: enough to tell images apart.

    Args:
        prompt: Token ids without padding, [time].
        inputs: What else the model sees of the prompt, by name, such as ``pixel_values``; only tensors are read.

    Returns:
        At least 0 and below 2**48, which every JSON reader keeps exact.

    Example:
        >>> from srpo_core.batch import prompt_id
        >>> one, other = torch.tensor([5, 6, 7]), torch.tensor([5, 6, 8])
        >>> prompt_id(one) == prompt_id(one.clone()), prompt_id(one) == prompt_id(other)
        (True, False)
    """
    digest = hashlib.blake2b(_bytes(prompt.long()), digest_size=6)
    for name, values in sorted((inputs or {}).items()):
        if isinstance(values, Tensor):
            flat = values.detach().flatten()
            digest.update(repr((name, tuple(values.shape))).encode())
            digest.update(_bytes(flat[:: max(1, len(flat) // 4096)].double()))
    return int.from_bytes(digest.digest(), "little")


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().numpy().tobytes()


class View(NamedTuple):
    """One more context that every response is scored in.

    Attributes:
        name: Under which :func:`credit` expects its log-probs.
        image: Whether the model sees the original image or the corrupted one.
        responses: What is scored in the place of the responses; None: the responses themselves.
    """

    name: str
    image: Literal["original", "corrupted"]
    responses: CounterfactualResponses | None


class Plan(NamedTuple):
    """What has to be scored, in order. It is the same list on every process.

    Attributes:
        views: The contexts, each one forward pass without gradient.
        counterfactual: The responses with their perception replaced.
        spans: The responses without each span of their perception, where reliance is asked for.
    """

    views: tuple[View, ...]
    counterfactual: CounterfactualResponses
    spans: SpanCounterfactuals | None


def plan(
    batch: RolloutBatch,
    options: SRPOConfig,
    *,
    has_images: bool,
    pad_token_id: int,
    perception_keys: Int[Tensor, " batch"] | None = None,
) -> Plan:
    """Which views of a rollout batch have to be scored, and the responses that are changed for them.

    The views are ``corrupted`` (the responses themselves, with the corrupted image), ``counterfactual`` (another
    perception) and, for reliance, ``span_0``, ``span_1``, ... (each span left out in turn). Without images there is no
    dependency on them to be measured, so only ``counterfactual`` is left.

    Args:
        batch: The responses.
        options: Which contexts.
        has_images: Whether any prompt of the batch, on any process, has an image.
        pad_token_id: Fills changed responses up.
        perception_keys: Equal where perceptions say the same, see :func:`~srpo_core.counterfactual_responses`.

    Example:
        >>> segmentation = Segmentation(torch.tensor([[0, 1, 0, 2]]), torch.tensor([0]), torch.zeros(1, 4).bool())
        >>> ids = torch.tensor([[1, 7, 2, 8]])
        >>> batch = RolloutBatch(ids, ids > 0, segmentation, torch.tensor([0]))
        >>> planned = plan(batch, SRPOConfig(counterfactual="drop"), has_images=True, pad_token_id=0)
        >>> [view.name for view in planned.views], planned.counterfactual.token_ids
        (['corrupted', 'counterfactual'], tensor([[1, 2, 8]]))
    """
    roles, _, boundary = batch.segmentation
    # Whatever is attended goes in as part of the response: prompts and tool outputs then stay where they are.
    attended = batch.mask if batch.attended is None else batch.attended
    changed = counterfactual_responses(
        batch.token_ids,
        roles,
        attended,
        kind=options.counterfactual,
        group_ids=batch.group_ids,
        perception_keys=perception_keys,
        boundary=boundary,
        pad_token_id=pad_token_id,
    )
    views = [View("corrupted", "corrupted", None)] if has_images else []
    seen = "corrupted" if has_images and options.counterfactual_image == "corrupted" else "original"
    views.append(View("counterfactual", seen, changed))
    spans = None
    if has_images and options.reliance_passes:
        spans = span_counterfactuals(
            batch.token_ids,
            roles,
            attended,
            spans=options.reliance_passes,
            boundary=boundary,
            pad_token_id=pad_token_id,
        )
        views += [View(f"span_{k}", "original", responses) for k, responses in enumerate(spans.responses)]
    return Plan(tuple(views), changed, spans)


@typechecked
def credit(
    batch: RolloutBatch,
    planned: Plan,
    scored: Mapping[str, Tensor],
    options: SRPOConfig,
    *,
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    step: int,
    image_counts: Int[Tensor, "batch 2"] | None = None,
    correct: Bool[Tensor, " batch"] | Int[Tensor, " batch"] | None = None,
    engine_log_probs: Float[Tensor, "batch time"] | None = None,
    scale_state: ScaleState | None = None,
) -> Credit:
    """Token advantages of a rollout batch from the log-probs of its views, and every metric that is logged about them.

    Args:
        batch: The responses. If tokens were taken out of training after planning, with the smaller mask.
        planned: From :func:`plan`.
        scored: Of each view by its name, log-probs in nats: ``[batch, new_time]`` of ``view.responses.token_ids``, or
            ``[batch, time]`` of the responses themselves.
        options: How log-probs become weights.
        old_log_probs: The responses in their own context, nats, by the same code path.
        advantages: One per response.
        step: Optimizer step, from 0, for the ramp of `mix`.
        image_counts: Of each response the images of its prompt, and how many of these the corruption left as they were.
            A response without images depends on none: its contrast is 0, not the noise between two passes. None: all
            have images, and nobody counted.
        correct: Whether each answer is right, for the metrics: booleans, or 1, 0 and -1 for "not known".
        engine_log_probs: The sampled tokens as the inference engine reported them, nats, for the metrics alone; NaN
            where it reported none. None: there is no engine, or it reported nothing.
        scale_state: For `scale` ``ema_rms``: that of the last result.

    Returns:
        The credit, with the metrics of :func:`~srpo_core.diagnostics.credit_diagnostics` and beside them
        ``advantage/zero``, the share of responses that teach nothing, ``corruption/unchanged``, the share of images
        that the corruption left as they were, and those of :func:`~srpo_core.engine_gap.engine_gap`.

    Raises:
        ValueError: If a view was not scored, or has another shape, or as :func:`~srpo_core.srpo_advantages`.
    """
    expected = [view.name for view in planned.views]
    if missing := [name for name in expected if name not in scored]:
        raise ValueError(
            f"scored has no log-probs of {', '.join(missing)}; score each of plan.views: {', '.join(expected)}"
        )
    expected_tokens = {"old_log_probs": (old_log_probs, batch.token_ids)} | {
        f"scored[{view.name!r}]": (scored[view.name], (view.responses or batch).token_ids) for view in planned.views
    }
    for name, (log_probs, tokens) in expected_tokens.items():
        if log_probs.shape != tokens.shape:
            raise ValueError(
                f"{name} must have shape {tuple(tokens.shape)}, one log-prob for each token that was to be scored, got "
                f"{tuple(log_probs.shape)}"
            )
    roles, broken, _ = batch.segmentation
    corrupted = scored["corrupted"] if "corrupted" in expected else None
    if corrupted is not None and image_counts is not None:
        corrupted = torch.where(image_counts[:, :1] > 0, corrupted, old_log_probs.to(corrupted.dtype))
    counterfactual = planned.counterfactual.carry_back(scored["counterfactual"], original_log_probs=old_log_probs)
    reliance = None
    if planned.spans is not None:
        passes = [scored[name] for name in expected if name.startswith("span_")]
        reliance = planned.spans.reliance(
            passes, roles, batch.mask, original_log_probs=old_log_probs, clip=options.score_clip
        )
    made = srpo_advantages(
        old_log_probs,
        advantages,
        roles,
        batch.mask,
        options.at_step(step),
        corrupted_log_probs=corrupted,
        counterfactual_log_probs=counterfactual,
        reliance=reliance,
        broken=broken,
        scale_state=scale_state,
    )
    donors = planned.counterfactual.donors if options.counterfactual == "swap" else None
    metrics = credit_diagnostics(
        made.weights,
        roles,
        batch.mask,
        scores=made.scores,
        broken=broken,
        advantages=advantages,
        correct=correct,
        donors=donors,
        score_clip=options.score_clip,
    )
    is_zero = (advantages == 0).to(made.weights.dtype)
    metrics["advantage/zero"] = masked_mean(is_zero, batch.mask.any(1), empty=torch.nan)
    if image_counts is not None:
        images, unchanged = image_counts.sum(0)
        metrics["corruption/unchanged"] = unchanged / images  # NaN without images
    if engine_log_probs is not None:
        metrics |= engine_gap(old_log_probs, roles, batch.mask, scores=made.scores, engine_log_probs=engine_log_probs)
    return made._replace(metrics=metrics, donors=donors)


def record(
    batch: RolloutBatch,
    credited: Credit,
    *,
    advantages: Tensor,
    correct: Tensor | None = None,
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What every trainer writes of a batch: arguments for :meth:`~srpo_core.rollouts.RolloutWriter.write`.

    Args:
        batch: The responses.
        credited: From :func:`credit`.
        advantages: One per response.
        correct: Whether each answer is right, as :func:`credit` takes it; None: not known.
        rows: Which responses; None: all.
    """
    roles, broken, _ = batch.segmentation
    values = {
        "tokens": batch.token_ids,
        "mask": batch.mask,
        "old_log_probs": credited.old_log_probs,
        "corrupted_log_probs": credited.corrupted_log_probs,
        "counterfactual_log_probs": credited.counterfactual_log_probs,
        "roles": roles,
        "broken": broken,
        "scores": credited.scores,
        "weights": credited.weights,
        "advantages": advantages,
        "group_ids": batch.group_ids,
        "donors": credited.donors,
    }
    # What is not known is left out, so that it may be given beside what is here.
    codes = {"correct": (correct, (False, True, None)), "open_at_start": (batch.open_at_start, OPEN_BLOCKS)}
    written = {
        name: [spelled[code] for code in given.long().tolist()]
        for name, (given, spelled) in codes.items()
        if given is not None
    }
    if rows is not None:
        values = {name: None if value is None else value[list(rows)] for name, value in values.items()}
        written = {name: [value[row] for row in rows] for name, value in written.items()}
    return values | written


def logged(metrics: Mapping[str, Tensor], *, which: MetricSet = "main") -> dict[str, float]:
    """Metrics as numbers under the names that every trainer logs, such as ``srpo/weight/perception/mass``.

    A metric that is NaN, because the batch has nothing that it could be measured on, is left out. The device is waited
    for once.

    Args:
        metrics: 0-d tensors by name, of a :class:`~srpo_core.Credit`.
        which: ``main`` for those of :data:`MAIN_METRICS` and the gap to an inference engine, ``all`` for every metric
            that is given.

    Raises:
        ValueError: If `which` is unknown.

    Example:
        >>> from srpo_core.batch import logged
        >>> metrics = {"advantage/zero": torch.tensor(0.5), "weight/perception/p95": torch.tensor(2.0)}
        >>> logged(metrics)
        {'srpo/advantage/zero': 0.5}
        >>> logged(metrics, which="all")
        {'srpo/advantage/zero': 0.5, 'srpo/weight/perception/p95': 2.0}
    """
    names = choose("which", which, {"main": MAIN_METRICS + ENGINE_METRICS, "all": tuple(metrics)})
    metrics = {name: metrics[name] for name in names if name in metrics}
    values = torch.stack([value.double() for value in metrics.values()]).tolist() if metrics else []
    return {f"srpo/{name}": value for name, value in zip(metrics, values, strict=True) if not math.isnan(value)}
