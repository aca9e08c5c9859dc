"""How much the reasoning relies on each perception token, and how that enters the score. This project's extension."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.contrasts import contrast
from srpo_core.counterfactuals import CounterfactualResponses, counterfactual_responses
from srpo_core.masking import (
    at_least_float32,
    check_finite,
    check_log_probs,
    check_no_nan,
    is_barred,
    log_probs_where_real,
    masked_mean,
    saturated,
)
from srpo_core.options import RelianceMode
from srpo_core.roles import Role, check_roles, role_masks
from srpo_core.typechecking import typechecked

__all__ = [
    "SpanCounterfactuals",
    "apply_reliance",
    "gradient_reliance",
    "perception_spans",
    "span_counterfactuals",
    "span_reliance",
]

# The slope of the log-odds, 1 / (1 - p), is bounded at p = exp(-1e-3): beyond, 1 - p is mostly rounding.
_MAX_LOG_PROB = -1e-3


@typechecked(values=(check_roles, log_probs_where_real("log_probs")))
def gradient_reliance(
    log_probs: Float[Tensor, "batch time"],
    embeddings: Float[Tensor, "batch time hidden_dim"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    r"""How much the reasoning's log-odds depend on each perception token, by gradient; 1 on average over these tokens.

    .. math:: u_t = \Bigl\| \frac{\partial}{\partial e_t} \sum_{k \in R} \operatorname{logit} \pi(o_k) \Bigr\|_2, \qquad
        U_t = u_t / \operatorname{mean}_P u, \qquad \operatorname{logit} p = \log p - \log(1 - p)

    with :math:`P` and :math:`R` the perception and reasoning tokens of one trajectory and :math:`e_t` the embedding
    that the model was given for token :math:`t`. Log-odds are used because a log-probability near 0 has almost no
    gradient, although a copied number is exactly what the perception is for. Their slope :math:`1 / (1 - p)` is bounded
    by its value at a log-probability of -0.001. A token that is surer than that counts less, the surer it is, so that
    certain tokens, whose :math:`1 - p` is only rounding, cannot dominate.

    One backward pass serves the whole batch, because responses do not depend on each other; in a packed row they would
    have to be kept apart. The function runs this pass, frees the graph and leaves every ``.grad`` as it was. Call it
    once per rollout batch.

    Args:
        log_probs: Each response token, nats, with a graph from `embeddings`. A reasoning token of minus infinity, which
            was barred, adds nothing.
        embeddings: Input embeddings of the same tokens: ``embeddings[:, t]`` is that of the token which
            ``log_probs[:, t]`` scores. Pass the very tensor that entered the model, made before the forward pass with
            ``requires_grad`` and then concatenated to the embeddings of the prompt. A slice that is taken afterwards is
            not part of the graph.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.

    Returns:
        Detached and at least 0, in float32 or float64; 0 outside the perception. Exactly 1 throughout the perception
        where there is no reasoning, or where the reasoning depends on none of it.

    Raises:
        ValueError: If `log_probs` has no graph to `embeddings`, a role is outside the enum, or a log-prob of a real
            token is NaN or plus infinity or its gradient not finite (the tensors are read on the host).

    Example:
        >>> embeddings = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], requires_grad=True)
        >>> logit = (embeddings[:, 0] * torch.tensor([0.0, 3.0]) + embeddings[:, 1]).sum(1)
        >>> log_probs = torch.stack([torch.zeros(1), torch.zeros(1), torch.nn.functional.logsigmoid(logit)], dim=1)
        >>> gradient_reliance(log_probs, embeddings, torch.tensor([[1, 1, 2]]), torch.ones(1, 3).bool())
        tensor([[1.3592, 0.6408, 0.0000]])

    References:
        None: an extension of this project, not part of SRPO (arXiv:2605.07274).
    """
    perception, reasoning = role_masks(roles, mask)
    slope = -1.0 / torch.expm1(log_probs.detach().to(at_least_float32(log_probs.dtype)).clamp(max=_MAX_LOG_PROB))
    slope = torch.where(reasoning & ~is_barred(log_probs), slope, 0.0).to(log_probs.dtype)
    gradient = None
    if log_probs.requires_grad and embeddings.requires_grad:
        (gradient,) = torch.autograd.grad(log_probs, embeddings, slope, retain_graph=False, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "log_probs has no graph to embeddings; run the forward with gradients enabled and give it these very "
            "embeddings, with requires_grad set before: a slice or copy taken afterwards is not part of the graph"
        )
    size = gradient.detach().to(at_least_float32(gradient.dtype)).norm(dim=-1)
    check_no_nan("the gradient of log_probs by embeddings", size.masked_fill(size.isinf(), torch.nan), perception)
    return _mean_one(size, perception, perception & reasoning.any(1, keepdim=True))


@typechecked
def perception_spans(
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    spans: int = 4,
) -> Int[Tensor, "batch time"]:
    """Number of the span, from 0, that each perception token belongs to; -1 at every other token.

    The perception of a response, all its blocks together, is cut into `spans` runs of nearly equal length. A perception
    with fewer tokens is cut into runs of one token. Where the text is available, sentences are better spans:
    :func:`span_reliance` takes any numbering.

    Args:
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens.
        spans: The largest number of spans, at least 1. Each span takes one more forward pass.

    Raises:
        ValueError: If `spans` is less than 1.

    Example:
        >>> roles = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 2], [1, 2, 0, 0, 0, 0, 0, 0]])
        >>> perception_spans(roles, roles >= 0, spans=2)
        tensor([[-1,  0,  0,  0, -1,  1,  1, -1],
                [ 0, -1, -1, -1, -1, -1, -1, -1]])
    """
    if spans < 1:
        raise ValueError(f"spans must be at least 1, got {spans}")
    perception = role_masks(roles, mask).perception
    count = perception.sum(1, keepdim=True)
    number = (perception.cumsum(1) - 1) * count.clamp(max=spans) // count.clamp(min=1)
    return torch.where(perception, number, -1)


class SpanCounterfactuals(NamedTuple):
    """Responses without one span of their perception, ready to be scored once for each span.

    Attributes:
        spans: Number of the span, from 0, that each perception token belongs to; -1 at every other token.
        responses: ``responses[k]`` is the batch without span ``k``; a response with fewer spans is unchanged there.
    """

    spans: Int[Tensor, "batch time"]
    responses: tuple[CounterfactualResponses, ...]

    @typechecked
    def reliance(
        self,
        log_probs: Sequence[Tensor],
        roles: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        *,
        original_log_probs: Float[Tensor, "batch time"],
        clip: float = 5.0,
    ) -> Float[Tensor, "batch time"]:
        """How much the reasoning relies on the span of each perception token: :func:`span_reliance` of these passes.

        Args:
            log_probs: One tensor [batch, new_time] for each of ``responses``, nats: ``log_probs[k][b, t]`` scores
                ``responses[k].token_ids[b, t]``.
            roles: The role of each token, :class:`~srpo_core.Role`.
            mask: True at the tokens that are trained on; elsewhere the inputs may hold anything, even NaN.
            original_log_probs: Log-probabilities of the original responses, nats, from the same code path.
            clip: The bound of what one reasoning token adds, nats, above 0.

        Raises:
            ValueError: If a pass is missing, one has another shape than its responses, or as :func:`span_reliance`.

        Example:
            >>> ids = torch.tensor([[1, 7, 8, 2, 8]])
            >>> roles = torch.tensor([[0, 1, 1, 0, 2]])
            >>> without = span_counterfactuals(ids, roles, ids > 0, spans=2)
            >>> passes = [torch.tensor([[-1.0, -1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -1.0, -1.0, -4.0]])]
            >>> without.reliance(passes, roles, ids > 0, original_log_probs=-torch.ones(1, 5))
            tensor([[0., 0., 2., 0., 0.]])
        """
        if len(log_probs) != len(self.responses):
            raise ValueError(
                f"log_probs holds {len(log_probs)} passes, and there are {len(self.responses)} spans to leave out: "
                "score each of responses once, in order"
            )
        carried = [
            responses.carry_back(scored, original_log_probs=original_log_probs)
            for responses, scored in zip(self.responses, log_probs, strict=True)
        ]
        return span_reliance(
            original_log_probs, roles, mask, without_log_probs=torch.stack(carried), spans=self.spans, clip=clip
        )


@typechecked(values=(check_roles,))
def span_counterfactuals(
    token_ids: Int[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    spans: int = 4,
    boundary: Bool[Tensor, "batch time"] | None = None,
    pad_token_id: int = 0,
) -> SpanCounterfactuals:
    """Responses without each span of their perception in turn, to be scored by the policy for :func:`span_reliance`.

    The spans are those of :func:`perception_spans`. To leave a span out, its tokens are removed; tags and everything
    else stay. There are always `spans` batches, whatever the responses hold, so every rank runs the same number of
    passes::

        without = span_counterfactuals(token_ids, roles, mask, boundary=boundary)
        passes = [score(each.token_ids) for each in without.responses]
        reliance = without.reliance(passes, roles, mask, original_log_probs=log_probs)

    The function waits for the device to learn the new lengths. Call it once per rollout batch.

    Args:
        token_ids: Sampled tokens, right-padded.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at tokens the policy sampled. Padding may hold anything.
        spans: The largest number of spans, at least 1. Each span takes one more forward pass.
        boundary: Tokens that share characters with a tag, from a :class:`~srpo_core.Segmentation`; None: there are no
            such tokens. They stay, so they are in no span, and their reliance is 1.
        pad_token_id: The token that fills up the new responses.

    Raises:
        ValueError: If `spans` is less than 1; outside ``torch.compile`` also if a role is outside the enum.

    Example:
        >>> ids = torch.tensor([[1, 7, 8, 2, 8], [1, 9, 2, 8, 0]])
        >>> roles = torch.tensor([[0, 1, 1, 0, 2], [0, 1, 0, 2, 0]])
        >>> without = span_counterfactuals(ids, roles, ids > 0, spans=2)
        >>> without.spans
        tensor([[-1,  0,  1, -1, -1],
                [-1,  0, -1, -1, -1]])
        >>> without.responses[1].token_ids
        tensor([[1, 7, 2, 8],
                [1, 9, 2, 8]])

    References:
        None: an extension of this project, not part of SRPO (arXiv:2605.07274).
    """
    if boundary is not None:
        roles = torch.where(boundary, int(Role.OTHER), roles)
    numbers = perception_spans(roles, mask, spans=spans)
    responses = [
        # To the counterfactual, span k alone is perception.
        counterfactual_responses(
            token_ids,
            torch.where(numbers == k, int(Role.PERCEPTION), int(Role.OTHER)),
            mask,
            kind="drop",
            pad_token_id=pad_token_id,
        )
        for k in range(spans)
    ]
    return SpanCounterfactuals(numbers, tuple(responses))


def _values_of_passes(arguments: Mapping[str, Any]) -> None:
    passes, spans = arguments["without_log_probs"], arguments["spans"]
    for k, without in enumerate(passes):
        check_log_probs(f"without_log_probs[{k}]", without, arguments["mask"])
    wrong = ((spans >= len(passes)) & role_masks(arguments["roles"], arguments["mask"]).perception).nonzero()
    if len(wrong):
        row, time = wrong[0].tolist()
        raise ValueError(
            f"spans is {spans[row, time]} at trajectory {row} token {time}, and without_log_probs holds "
            f"{len(passes)} passes; pass one for each span, numbered from 0"
        )


@typechecked(values=(check_roles, log_probs_where_real("log_probs"), _values_of_passes))
def span_reliance(
    log_probs: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    without_log_probs: Float[Tensor, "spans batch time"],
    spans: Int[Tensor, "batch time"],
    clip: float = 5.0,
) -> Float[Tensor, "batch time"]:
    r"""How much, in likelihood, the reasoning relies on the span of each perception token; 1 on average over these.

    This takes forward passes only: the response is scored once more for each span :math:`k`, without that span.

    .. math:: u_k = \sum_{j \in R} \operatorname{clip}\bigl(\log \pi(o_j) - \log \pi^{\setminus k}(o_j),\ 0,\ c\bigr),
        \qquad
        U_t = u_{k(t)} / \operatorname{mean}_P u

    :func:`span_counterfactuals` makes the responses to score, and :meth:`SpanCounterfactuals.reliance` passes their
    log-probabilities to this function. With spans of your own, ``without_log_probs[k]`` is what
    :func:`~srpo_core.counterfactual_responses` with ``kind="mask"`` or ``"drop"`` makes of roles in which span
    :math:`k` alone is perception, scored and carried back::

        others = torch.where((spans != k) & (roles == Role.PERCEPTION), int(Role.OTHER), roles)
        without = counterfactual_responses(token_ids, others, mask, kind="drop")
        without_log_probs[k] = without.carry_back(score(without), original_log_probs=log_probs)

    Args:
        log_probs: Each response token, nats.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        without_log_probs: The same tokens without span :math:`k`, nats, by the same code path.
        spans: The span of each perception token, from :func:`perception_spans` or your own numbering from 0. A
            perception token with -1 is in no span, and its reliance is 1. Read at perception tokens only.
        clip: :math:`c`, the bound of what one reasoning token adds, nats, above 0.

    Returns:
        Detached and at least 0; 0 outside the perception. Exactly 1 throughout the perception where there is no
        reasoning, or where the reasoning relies on no span.

    Raises:
        ValueError: If `clip` is out of range; outside ``torch.compile`` also if a role is outside the enum, a span of a
            perception token has no pass in `without_log_probs`, or a log-prob of a real token is NaN or plus infinity,
            for which the tensors are read on the host.

    Example:
        >>> log_probs = torch.tensor([[-1.0, -1.0, -1.0, -0.5]])
        >>> without = torch.tensor([[[-1.0, -1.0, -1.0, -3.5]], [[-1.0, -1.0, -1.0, -0.4]]])
        >>> span_reliance(log_probs, torch.tensor([[1, 1, 1, 2]]), torch.ones(1, 4).bool(),
        ...               without_log_probs=without, spans=torch.tensor([[0, 1, 1, -1]]))
        tensor([[3., 0., 0., 0.]])

    References:
        None: an extension of this project, not part of SRPO (arXiv:2605.07274).
    """
    perception, reasoning = role_masks(roles, mask)
    taken = contrast(log_probs, without_log_probs, reasoning, kind="positive", clip=clip).sum(-1)
    held = perception & (spans >= 0)
    # One row more, for the tokens that no pass is about: there may be no pass at all.
    taken = torch.cat([taken, taken.new_zeros(1, taken.shape[1])])
    return _mean_one(taken.gather(0, torch.where(held, spans.long(), 0).T).T, perception, held)


def _sound_in_perception(arguments: Mapping[str, Any]) -> None:
    perception = role_masks(arguments["roles"], arguments["mask"]).perception
    check_no_nan("scores", arguments["scores"], perception)
    check_finite("reliance", arguments["reliance"], perception)


@typechecked(values=(check_roles, _sound_in_perception))
def apply_reliance(
    scores: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    reliance: Float[Tensor, "batch time"],
    mode: RelianceMode = "product",
) -> Float[Tensor, "batch time"]:
    r"""Scores, in nats, which for perception tokens also count how much the reasoning relies on the token.

    With ``product`` the score is :math:`s_t U_t`: how much the token depends on the image, times how much the reasoning
    relies on it. With ``share`` it is :math:`U_t \operatorname{mean}_P s`: reliance alone decides among the perception
    tokens, and the image decides only how much they weigh against the reasoning. The result is not bounded by the clip
    of :math:`s`.

    Args:
        scores: :math:`s`, nats: from :func:`~srpo_core.visual_dependency` or a divergence at perception tokens. An
            infinite one counts as 20 nats.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        reliance: :math:`U`, from :func:`gradient_reliance` or :func:`span_reliance`: 1 on average over a trajectory's
            perception. Read at perception tokens only.
        mode: How the two are combined.

    Returns:
        Detached scores, for :func:`~srpo_core.shared_baseline_weights`. Scores of other tokens are as they were.

    Raises:
        ValueError: If `mode` is unknown; outside ``torch.compile`` also if a role is outside the enum, or at a
            perception token a value is NaN or the reliance infinite, for which the tensors are read on the host.

    Example:
        >>> scores, reliance = torch.tensor([[3.0, 1.0, 7.0]]), torch.tensor([[0.5, 1.5, 0.0]])
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]])
        >>> apply_reliance(scores, roles, roles > 0, reliance=reliance)
        tensor([[1.5000, 1.5000, 7.0000]])
        >>> apply_reliance(scores, roles, roles > 0, reliance=reliance, mode="share")
        tensor([[1., 3., 7.]])

    References:
        None: an extension of this project, not part of SRPO (arXiv:2605.07274).
    """
    shares = choose("mode", mode, {"product": False, "share": True})
    perception = role_masks(roles, mask).perception
    dtype = at_least_float32(torch.promote_types(scores.dtype, reliance.dtype))
    scores, reliance = saturated(scores.detach().to(dtype)), reliance.detach().to(dtype)
    shared = masked_mean(scores, perception, dim=1)[:, None] if shares else scores
    return torch.where(perception, shared * reliance, scores)


def _mean_one(values: Tensor, perception: Tensor, known: Tensor) -> Tensor:
    """Values over their mean; 1 where they are not known or none is above 0, and 0 outside the perception."""
    mean = masked_mean(values, known, dim=1)[:, None]
    values = torch.where(known & (mean > 0), values / mean, 1.0)
    return torch.where(perception, values, 0.0)
