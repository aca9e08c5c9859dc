"""One rollout batch and one driver for all trainers: plan what has to be scored, then turn the scores into credit.

A trainer of any framework does four things: it makes a :class:`RolloutBatch` of its responses, asks :func:`plan` which
other views have to be scored, scores each by its own forward pass, and gives the log-probs to :func:`credit`. These are
two calls because planning may happen in another process than scoring.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.counterfactuals import CounterfactualResponses, counterfactual_responses
from srpo_core.diagnostics import credit_diagnostics
from srpo_core.masking import masked_mean
from srpo_core.options import ContextOptions, SRPOConfig
from srpo_core.reliance import SpanCounterfactuals, span_counterfactuals
from srpo_core.roles import Segmentation, segment_responses
from srpo_core.srpo import Credit, srpo_advantages
from srpo_core.tags import BrokenReason
from srpo_core.token_text import TokenizerLike
from srpo_core.typechecking import typechecked
from srpo_core.weights import ScaleState

__all__ = [
    "Plan",
    "RolloutBatch",
    "View",
    "check_first_batch",
    "credit",
    "ending_ids",
    "logged",
    "plan",
    "record",
]

logger = logging.getLogger("srpo_core")


class RolloutBatch(NamedTuple):
    """The responses of a rollout batch, of all processes that share a baseline or lend each other perceptions.

    Attributes:
        token_ids: Sampled tokens, right-padded; or whole sequences, if `attended` says so.
        mask: True at the tokens the policy sampled.
        segmentation: What each token does.
        group_ids: Equal where responses answer the same prompt.
        attended: True at all tokens that are context or sampled, where `token_ids` hold prompts too. None: `mask`.
    """

    token_ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    segmentation: Segmentation
    group_ids: Int[Tensor, " batch"]
    attended: Bool[Tensor, "batch time"] | None = None

    @staticmethod
    def of(
        token_ids: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        tokenizer: TokenizerLike,
        options: ContextOptions,
        *,
        group_ids: Int[Tensor, " batch"],
        ending: Sequence[int] | None = None,
        attended: Bool[Tensor, "batch time"] | None = None,
    ) -> "RolloutBatch":
        """The batch with its responses segmented by the tags of the options.

        Args:
            token_ids: Sampled tokens, right-padded; or whole sequences, with `attended`.
            mask: True at the tokens the policy sampled.
            tokenizer: Anything with ``decode(list_of_ids) -> str``.
            options: The tags, and what answers count as.
            group_ids: Equal where responses answer the same prompt.
            ending: Ids that end a response, from :func:`ending_ids`; None: the tokenizer's own.
            attended: True at context and sampled tokens, where `token_ids` hold prompts too. None: `mask`.
        """
        segmentation = segment_responses(
            token_ids,
            mask,
            tokenizer,
            tags=options.tags,
            eos_token_id=ending_ids(tokenizer) if ending is None else ending,
            answer_role=options.answer_role,
        )
        return RolloutBatch(token_ids, mask, segmentation, group_ids, attended)


def ending_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Token ids that end a response: the tokenizer's, and those of the generation config, which engines obey.

    Example:
        >>> class Tokenizer: eos_token_id = 7
        >>> class GenerationConfig: eos_token_id = [7, 9]
        >>> ending_ids(Tokenizer(), GenerationConfig())
        (7, 9)
    """
    found: set[int] = set()
    for source in (tokenizer, generation_config):
        ids = getattr(source, "eos_token_id", None)
        found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    if not found:
        raise ValueError("neither the tokenizer nor the generation config has an eos_token_id: pass the ids yourself")
    return tuple(sorted(found))


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
    correct: Bool[Tensor, " batch"] | None = None,
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
        correct: Whether each answer is right, for the metrics.
        scale_state: For `scale` ``ema_rms``: that of the last result.

    Returns:
        The credit, with the metrics of :func:`~srpo_core.diagnostics.credit_diagnostics` and beside them
        ``advantage/zero``, the share of responses that teach nothing, and ``corruption/unchanged``, the share of images
        that the corruption left as they were.

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
    metrics["advantage/zero"] = masked_mean((advantages == 0).to(made.weights.dtype), batch.mask.any(1))
    if image_counts is not None:
        images, unchanged = image_counts.sum(0)
        metrics["corruption/unchanged"] = unchanged / images.clamp(min=1)
    return made._replace(metrics=metrics, donors=donors)


def check_first_batch(
    batch: RolloutBatch,
    options: SRPOConfig,
    *,
    prompts: Sequence[str],
    image_counts: Int[Tensor, "batch 2"] | None = None,
    named: str = "{}",
) -> None:
    """Look at the first rollout batch of a run for settings under which SRPO can do nothing.

    Later batches are only counted in the metrics: what a model does must not stop its training.

    Args:
        batch: The responses.
        options: Which tags are expected, and how images are corrupted.
        prompts: Some prompts as text, special tokens and all.
        image_counts: Of each response its images, and how many the corruption left as they were.
        named: How the user writes an option's name, with ``{}`` where the name goes: ``"srpo_{}"``.

    Raises:
        ValueError: If a prompt ends inside a block, no response has a role although no prompt asks for the tags, or the
            corruption changed no image. If the prompts do ask it only warns, because the model may learn to answer so,
            and likewise if no prompt has an image.
    """

    def option(name: str) -> str:
        return named.replace("{}", name)

    tags = options.tags
    for opening, _ in tags.pairs.values():
        if any(prompt.rstrip().endswith(opening) for prompt in prompts):
            raise ValueError(
                f"the chat template ends the prompt with {opening!r}, so that responses begin inside a block whose "
                "opening tag they lack and all count as broken: take the tag out of the template's generation prompt"
            )
    if image_counts is not None:
        images, unchanged = image_counts.sum(0).tolist()
        if images == 0:
            logger.warning("SRPO: no prompt of the first batch has an image, so no token can depend on one")
        elif images == unchanged:
            raise ValueError(
                f"{option('corruption')}={options.corruption!r} left all {images} images of the first batch as they "
                f"were, so no token can depend on them: raise {option('corruption_amount')}, or choose another kind"
            )
    if options.changes_nothing or (batch.segmentation.broken == int(BrokenReason.NONE)).any():
        return
    structure = "".join(f"{opening}...{closing}" for opening, closing in tags.pairs.values())
    reasons = ", ".join(
        f"{count} {BrokenReason(reason).name.lower()}"
        for reason, count in zip(
            *(x.tolist() for x in batch.segmentation.broken.unique(return_counts=True)), strict=True
        )
    )
    found = f"no response of the first batch has the structure {structure} ({reasons})"
    if not any(tags.perception[0] in prompt for prompt in prompts):
        raise ValueError(
            f"{found}, and the prompts do not ask for it: name the tags in a system message, train on demonstrations "
            f"first, or set {', '.join(option(f'{kind}_tags') for kind in ('perception', 'reasoning', 'answer'))} to "
            "your own"
        )
    logger.warning("SRPO: %s, so all weights are 1 until the model answers as the prompts ask", found)


def record(
    batch: RolloutBatch, credited: Credit, *, advantages: Tensor, rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """What every trainer writes of a batch: arguments for :meth:`~srpo_core.rollouts.RolloutWriter.write`.

    Args:
        batch: The responses.
        credited: From :func:`credit`.
        advantages: One per response.
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
    if rows is None:
        return values
    return {name: None if value is None else value[list(rows)] for name, value in values.items()}


def logged(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics as numbers under the names that every trainer logs, ``srpo/weight/perception/mean``; waits once.

    Example:
        >>> from srpo_core.batch import logged
        >>> logged({"advantage/zero": torch.tensor(0.5)})
        {'srpo/advantage/zero': 0.5}
    """
    values = torch.stack([value.double() for value in metrics.values()]).tolist() if metrics else []
    return {f"srpo/{name}": value for name, value in zip(metrics, values, strict=True)}
