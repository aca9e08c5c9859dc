"""The same losses straight from hidden states and the lm_head, without a [tokens, vocab] tensor.

With N tokens, hidden size H and vocabulary V one matrix product is 2NHV operations; a loss and the gradients of hidden
states and lm_head need three, 6NHV. :func:`_sweep` needs no more: it turns a chunk of logits into the derivative of the
log-probs in place, asks how the loss depends on those, and multiplies on. Backward only scales what forward has made.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core._masked import at_least_float32, masked_max, masked_mean
from srpo_core.log_probs import full_kl, jsd
from srpo_core.losses import KLEstimator, LossOutput, Reduction, Surrogate, aggregate, grpo_loss, token_losses
from srpo_core.srpo import Scale, Score, step_credit
from srpo_core.typechecking import choose, typechecked
from srpo_core.use import Use
from srpo_core.weights import Baseline, Renormalization, Sign, WeightMap

__all__ = [
    "LogProbsAndEntropy",
    "fused_linear_grpo_loss",
    "fused_linear_jsd",
    "fused_linear_kl",
    "fused_linear_log_probs",
    "fused_linear_log_probs_and_entropy",
    "fused_linear_srpo_loss",
]

Active = Literal["real", "credited"]
VocabReduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]

# Surrogates whose derivative at a token depends on the whole response.
_SEQUENCE_LEVEL = ("gspo", "gspo_token")
# A CPU passes over logits in its second-level cache about twice as fast as in memory.
_CACHED_BYTES = 2**20
# Vocabulary rows cast at a time where a product needs them in another dtype.
_CAST_ROWS = 2048


class LogProbsAndEntropy(NamedTuple):
    """Log-prob of each token, nats, and the entropy of the distribution that it was drawn from, nats, detached."""

    log_probs: Float[Tensor, "batch time"]
    entropy: Float[Tensor, "batch time"]


@typechecked
def fused_linear_log_probs(
    hidden: Float[Tensor, "batch time hidden_dim"],
    lm_head: Float[Tensor, "vocab hidden_dim"],
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
    vocab_offset: int = 0,
    vocab_reduce: VocabReduce | None = None,
) -> Float[Tensor, "batch time"]:
    r"""Log-probability, in nats, of each token, straight from the hidden state that predicts it; 0 at padding.

    .. math:: \log \pi(y_t) = z_{t, y_t} - \log \sum_v e^{z_{t, v}}, \qquad
        z_t = \operatorname{cap}(W h_t + b) / T, \quad \operatorname{cap}(x) = c \tanh(x / c)

    Without gradient it costs one product of the logits (2NHV). With a frozen lm_head (LoRA) the derivative by the
    hidden states is made at once, and any loss of the log-probs then costs 4NHV; with a trained one the logits are made
    again in backward, 8NHV: for a GRPO loss :func:`fused_linear_grpo_loss` has it in 6NHV. The arithmetic is the same
    in every case, so a first update finds a ratio of exactly 1.

    Args:
        hidden: ``hidden[b, t]`` predicts ``token_ids[b, t]``: the last hidden states, already shifted by one. A packed
            batch is ``[1, tokens, hidden_dim]``.
        lm_head: Weight of the output layer, in the dtype of `hidden`. Tied to the embedding or not; gathered, where
            it was sharded by rows of parameters (FSDP2: ``weight.full_tensor()``).
        token_ids: The tokens to score, each in [0, vocab) where `mask` is True.
        mask: True at the tokens to score. Elsewhere the inputs may hold anything, even NaN, and the gradient is 0.
        bias: Of the output layer.
        temperature: :math:`T`, the one that the rollout was sampled with, above 0.
        logit_softcap: :math:`c`, above 0 (Gemma's ``final_logit_softcapping``), or None.
        active_tokens: At least the number of tokens under `mask`, where the host knows it (a padded size to keep one
            compiled graph will do): only so many are computed. None: counted on the CPU in eager mode; elsewhere that
            would stall the device, so all of ``batch * time`` are computed. Too low a number makes the result NaN (on
            the CPU an error).
        chunk_tokens: Tokens whose logits, in at least float32, are in memory at a time, at least 1. None: 256 on a
            CPU, 1024 elsewhere.
        vocab_offset: First token of this shard of the vocabulary.
        vocab_reduce: For a vocabulary sharded over processes: ``(tensor, "max" or "sum") -> tensor``, the elementwise
            maximum or sum over all shards, called in the same order on each with small tensors, and with the gradient
            of `hidden`. None: `lm_head` is whole.

    Raises:
        ValueError: If an option is out of range, or the dtypes of `hidden` and `lm_head` differ.

    Example:
        >>> hidden, lm_head = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> fused_linear_log_probs(hidden, lm_head, torch.tensor([[0, 0]]), torch.tensor([[True, True]]))
        tensor([[-0.1269, -0.6931]])
    """
    hidden, lm_head, bias = _full_precision_of_float16(hidden, lm_head, bias)
    head = _head(hidden, lm_head, temperature, logit_softcap, chunk_tokens, vocab_offset, vocab_reduce)
    tokens = _tokens(mask, active_tokens)
    log_probs, _ = _log_probs(hidden, lm_head, bias, token_ids, tokens, head)
    return tokens.to_batch(log_probs, mask, 0.0)


@typechecked
def fused_linear_log_probs_and_entropy(
    hidden: Float[Tensor, "batch time hidden_dim"],
    lm_head: Float[Tensor, "vocab hidden_dim"],
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
    vocab_offset: int = 0,
    vocab_reduce: VocabReduce | None = None,
) -> LogProbsAndEntropy:
    r"""Log-probs as :func:`fused_linear_log_probs`, and the entropy of each next-token distribution from the same pass.

    Only the log-probs have a gradient. At padding both are 0.

    Args:
        hidden: See :func:`fused_linear_log_probs`.
        lm_head: See :func:`fused_linear_log_probs`.
        token_ids: See :func:`fused_linear_log_probs`.
        mask: See :func:`fused_linear_log_probs`.
        bias: See :func:`fused_linear_log_probs`.
        temperature: See :func:`fused_linear_log_probs`.
        logit_softcap: See :func:`fused_linear_log_probs`.
        active_tokens: See :func:`fused_linear_log_probs`.
        chunk_tokens: See :func:`fused_linear_log_probs`.
        vocab_offset: See :func:`fused_linear_log_probs`.
        vocab_reduce: See :func:`fused_linear_log_probs`.

    Raises:
        ValueError: If an option is out of range, or the dtypes of `hidden` and `lm_head` differ.

    Example:
        >>> hidden, lm_head = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> tokens, mask = torch.tensor([[0, 0]]), torch.tensor([[True, True]])
        >>> fused_linear_log_probs_and_entropy(hidden, lm_head, tokens, mask).entropy
        tensor([[0.3653, 0.6931]])
    """
    hidden, lm_head, bias = _full_precision_of_float16(hidden, lm_head, bias)
    head = _head(hidden, lm_head, temperature, logit_softcap, chunk_tokens, vocab_offset, vocab_reduce)
    tokens = _tokens(mask, active_tokens)
    log_probs, entropy = _log_probs(hidden, lm_head, bias, token_ids, tokens, head, entropy=True)
    return LogProbsAndEntropy(tokens.to_batch(log_probs, mask, 0.0), tokens.to_batch(entropy, mask, 0.0))


@typechecked
def fused_linear_grpo_loss(
    hidden: Float[Tensor, "batch time hidden_dim"],
    lm_head: Float[Tensor, "vocab hidden_dim"],
    token_ids: Int[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    ref_log_probs: Float[Tensor, "batch time"] | None = None,
    surrogate: Surrogate = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_ratio: float = 5.0,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    reduction: Reduction = "token_mean",
    normalizer: float | Float[Tensor, ""] | None = None,
    active: Active = "real",
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
    vocab_columns: int | None = None,
    vocab_offset: int = 0,
    vocab_reduce: VocabReduce | None = None,
) -> LossOutput:
    r"""GRPO's loss and metrics, as of :func:`~srpo_core.grpo_loss`, from hidden states in one pass over the vocabulary.

    The loss and its gradients are made together in the forward, in three matrix products (6NHV, where a loss that makes
    the logits again in backward needs four) and without a [tokens, vocab] tensor: peak memory is flat in the number of
    tokens. Backward scales the gradients, once; a second backward is an error. A loss that is scaled after the fact
    (``loss / accumulation_steps``) costs one more pass over the gradients: prefer `normalizer`.

    ======================  ========================================================================================
    one pass, 6NHV          ``clip``, ``cispo``, ``sapo``, with any KL penalty and reduction; ``gspo`` and
                            ``gspo_token`` where a response fits into one gradient product, `chunk_tokens` in full and
                            four times as many in half precision; then padding is computed as well
    two passes, 8NHV        ``gspo`` and ``gspo_token`` otherwise: :func:`fused_linear_log_probs`, then the loss
    frozen lm_head, 4NHV    every surrogate
    without gradient, 2NHV  every surrogate
    ======================  ========================================================================================

    Which one is taken follows from the arguments; the results are the same. Compiles whole; no host sync.

    Args:
        hidden: See :func:`fused_linear_log_probs`.
        lm_head: See there.
        token_ids: See there.
        old_log_probs: See :func:`~srpo_core.grpo_loss`; best from :func:`fused_linear_log_probs`.
        advantages: Credit of each token, as from :func:`~srpo_core.srpo_advantages`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN. A packed ``[1, tokens]`` batch
            is one response to ``sequence_mean`` and to GSPO, so both need a padded one.
        bias: See :func:`fused_linear_log_probs`.
        temperature: See there.
        logit_softcap: See there.
        ref_log_probs: See :func:`~srpo_core.grpo_loss`, as all up to `normalizer`.
        surrogate: See there.
        clip_low: See there.
        clip_high: See there.
        dual_clip: See there.
        max_ratio: See there.
        temperature_positive: See there.
        temperature_negative: See there.
        kl_coef: See there.
        kl_estimator: See there.
        reduction: See :func:`~srpo_core.aggregate`.
        normalizer: See there.
        active: Compute every ``real`` token, or only ``credited`` ones, whose advantage is not 0. Loss and gradient
            are the same, at a cost in proportion; metrics count the others as unchanged (ratio 1). ``credited`` needs
            `kl_coef` 0 and a surrogate that treats each token by itself.
        active_tokens: See :func:`fused_linear_log_probs`; of the tokens that `active` names.
        chunk_tokens: See :func:`fused_linear_log_probs`.
        vocab_columns: Approximate the gradients: the two products keep this many tokens of the vocabulary, at least
            those of one gradient product, and take the others together, as one of rank one. The loss stays exact.
            About 1.6 times faster at a quarter of the vocabulary, and closer than bfloat16 rounding where the model is
            sure; with flat logits it is far off, so watch ``vocab/dropped``. None: exact.
        vocab_offset: See there.
        vocab_reduce: See there.

    Returns:
        As :func:`~srpo_core.grpo_loss`; with `vocab_columns` also ``vocab/dropped/mean`` and ``vocab/dropped/max``, the
        probability of the tokens taken together.

    Raises:
        ValueError: As :func:`~srpo_core.grpo_loss` and :func:`fused_linear_log_probs`, and if `active` does not fit.
        RuntimeError: From backward, the second time.

    Example:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
        >>> lm_head = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> loss, metrics = fused_linear_grpo_loss(
        ...     hidden, lm_head, torch.tensor([[0, 0]]), torch.tensor([[-0.1269, -0.6931]]),
        ...     torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]))
        >>> loss.backward()
        >>> lm_head.grad
        tensor([[-0.0596, -0.7500],
                [ 0.0596,  0.7500]])
    """
    hidden, lm_head, bias = _full_precision_of_float16(hidden, lm_head, bias)
    head = _head(
        hidden, lm_head, temperature, logit_softcap, chunk_tokens, vocab_offset, vocab_reduce, columns=vocab_columns
    )
    token_options: dict[str, Any] = {
        "surrogate": surrogate,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "max_ratio": max_ratio,
        "temperature_positive": temperature_positive,
        "temperature_negative": temperature_negative,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
    }
    sum_options: dict[str, Any] = {"reduction": reduction, "normalizer": normalizer}

    def loss_of(log_probs: Tensor) -> LossOutput:
        return grpo_loss(
            log_probs, old_log_probs, advantages, mask, ref_log_probs=ref_log_probs, **token_options, **sum_options
        )

    computed = mask
    if choose("active", active, {"real": False, "credited": True}):
        if kl_coef > 0.0 or surrogate in _SEQUENCE_LEVEL:
            raise ValueError(
                f"active='credited' with kl_coef={kl_coef} and surrogate={surrogate!r}: a token without an advantage "
                "has a gradient there; pass active='real'"
            )
        computed = mask & (advantages != 0)
    # A token that is not computed keeps ratio 1: without an advantage its loss is 0 whatever its log-prob.
    unchanged = old_log_probs.detach()
    trains_head = torch.is_grad_enabled() and (lm_head.requires_grad or (bias is not None and bias.requires_grad))
    by_response = surrogate in _SEQUENCE_LEVEL
    if not trains_head or (by_response and not 0 < mask.shape[1] <= head.span):
        tokens = _tokens(computed, active_tokens)
        log_probs, _ = _log_probs(hidden, lm_head, bias, token_ids, tokens, head)
        return loss_of(tokens.to_batch(log_probs, computed, unchanged))

    tokens = _every_token(mask) if by_response else _tokens(computed, active_tokens)
    shape = (-1, mask.shape[1]) if by_response else (1, -1)
    # Aggregation is linear in the token losses, so its gradient is the share of each.
    zeros = torch.zeros(mask.shape, dtype=head.dtype, device=mask.device)
    shares = torch.func.grad(lambda losses: aggregate(losses, mask, **sum_options))(zeros)

    def derivatives(part: slice, log_probs: Tensor) -> Tensor:
        def of(values: Tensor) -> Tensor:
            return tokens.take(values.flatten(), part).view(shape)

        fixed = (of(old_log_probs), of(advantages), of(mask))
        ref, share = None if ref_log_probs is None else of(ref_log_probs), of(shares)

        def loss(log_probs: Tensor) -> Tensor:
            losses, penalty = token_losses(log_probs.view(shape), *fixed, ref_log_probs=ref, **token_options)
            if penalty is not None and kl_coef > 0.0:
                losses = losses + kl_coef * penalty
            return (share * losses).sum()

        return torch.func.grad(loss)(log_probs)

    swept = _sweep(
        hidden.detach().flatten(0, 1),
        lm_head.detach(),
        None if bias is None else bias.detach(),
        token_ids.flatten(),
        tokens,
        head,
        derivatives=derivatives,
        needs=tuple(x is not None and x.requires_grad for x in (hidden, lm_head, bias)),
        multiple=mask.shape[1] if by_response else 1,
    )
    with torch.no_grad():
        loss, metrics = loss_of(tokens.to_batch(swept.log_probs, computed, unchanged))
        if swept.dropped is not None:
            dropped = tokens.to_batch(swept.dropped, computed, 0.0)
            metrics["vocab/dropped/mean"] = masked_mean(dropped, computed)
            metrics["vocab/dropped/max"] = masked_max(dropped, computed, empty=0.0)
    loss = _WithGradients.apply(loss, hidden.flatten(0, 1), lm_head, bias, *swept.gradients)
    return LossOutput(loss, metrics)


@typechecked
def fused_linear_srpo_loss(
    hidden: Float[Tensor, "batch time hidden_dim"],
    lm_head: Float[Tensor, "vocab hidden_dim"],
    token_ids: Int[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    corrupted_log_probs: Float[Tensor, "batch time"] | None,
    counterfactual_log_probs: Float[Tensor, "batch time"] | None,
    roles: Int[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    broken: Int[Tensor, " batch"] | None = None,
    strength: float = 1.0,
    visual_score: Score = "log_ratio",
    consistency_score: Score = "log_ratio",
    score_clip: float = 5.0,
    visual_divergence: Float[Tensor, "batch time"] | None = None,
    consistency_divergence: Float[Tensor, "batch time"] | None = None,
    perception_use: Float[Tensor, "batch time"] | None = None,
    use: Use = "product",
    baseline: Baseline = "token",
    weight_map: WeightMap = "exp_tanh",
    renormalization: Renormalization = "trajectory",
    scale: Scale = "fixed",
    visual_scale: float = 1.0,
    consistency_scale: float = 1.0,
    bound: float = math.log(2.0),
    sign: Sign = "symmetric",
    mix: float = 1.0,
    ref_log_probs: Float[Tensor, "batch time"] | None = None,
    surrogate: Surrogate = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_ratio: float = 5.0,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    reduction: Reduction = "token_mean",
    normalizer: float | Float[Tensor, ""] | None = None,
    active: Active = "real",
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
    vocab_columns: int | None = None,
    vocab_offset: int = 0,
    vocab_reduce: VocabReduce | None = None,
) -> LossOutput:
    r"""SRPO's loss straight from hidden states: :func:`~srpo_core.srpo_loss` in one pass over the vocabulary.

    The credit of :func:`~srpo_core.srpo_loss`, then :func:`fused_linear_grpo_loss`; `strength` 0 is its GRPO bit for
    bit. A packed ``[1, tokens]`` batch holds many responses in a row, and credit is theirs: call
    :func:`~srpo_core.srpo_advantages` on the padded log-probs and pack its advantages for
    :func:`fused_linear_grpo_loss`.

    Args:
        hidden: See :func:`fused_linear_log_probs`.
        lm_head: See :func:`fused_linear_log_probs`.
        token_ids: See :func:`fused_linear_log_probs`.
        old_log_probs: See :func:`~srpo_core.srpo_loss`.
        corrupted_log_probs: See :func:`~srpo_core.srpo_loss`.
        counterfactual_log_probs: See :func:`~srpo_core.srpo_loss`.
        roles: See :func:`~srpo_core.srpo_loss`.
        advantages: See :func:`~srpo_core.srpo_loss`.
        mask: See :func:`~srpo_core.srpo_loss`.
        bias: See :func:`fused_linear_log_probs`.
        temperature: See :func:`fused_linear_log_probs`.
        logit_softcap: See :func:`fused_linear_log_probs`.
        broken: See :func:`~srpo_core.srpo_loss`.
        strength: See :func:`~srpo_core.srpo_loss`.
        visual_score: See :func:`~srpo_core.srpo_loss`.
        consistency_score: See :func:`~srpo_core.srpo_loss`.
        score_clip: See :func:`~srpo_core.srpo_loss`.
        visual_divergence: See :func:`~srpo_core.srpo_loss`.
        consistency_divergence: See :func:`~srpo_core.srpo_loss`.
        perception_use: See :func:`~srpo_core.srpo_loss`.
        use: See :func:`~srpo_core.srpo_loss`.
        baseline: See :func:`~srpo_core.srpo_loss`.
        weight_map: See :func:`~srpo_core.srpo_loss`.
        renormalization: See :func:`~srpo_core.srpo_loss`.
        scale: See :func:`~srpo_core.srpo_loss`.
        visual_scale: See :func:`~srpo_core.srpo_loss`.
        consistency_scale: See :func:`~srpo_core.srpo_loss`.
        bound: See :func:`~srpo_core.srpo_loss`.
        sign: See :func:`~srpo_core.srpo_loss`.
        mix: See :func:`~srpo_core.srpo_loss`.
        ref_log_probs: See :func:`~srpo_core.srpo_loss`.
        surrogate: See :func:`~srpo_core.srpo_loss`.
        clip_low: See :func:`~srpo_core.srpo_loss`.
        clip_high: See :func:`~srpo_core.srpo_loss`.
        dual_clip: See :func:`~srpo_core.srpo_loss`.
        max_ratio: See :func:`~srpo_core.srpo_loss`.
        temperature_positive: See :func:`~srpo_core.srpo_loss`.
        temperature_negative: See :func:`~srpo_core.srpo_loss`.
        kl_coef: See :func:`~srpo_core.srpo_loss`.
        kl_estimator: See :func:`~srpo_core.srpo_loss`.
        reduction: See :func:`~srpo_core.srpo_loss`.
        normalizer: See :func:`~srpo_core.srpo_loss`.
        active: See :func:`fused_linear_grpo_loss`.
        active_tokens: See :func:`fused_linear_grpo_loss`.
        chunk_tokens: See :func:`fused_linear_grpo_loss`.
        vocab_columns: See :func:`fused_linear_grpo_loss`.
        vocab_offset: See :func:`fused_linear_grpo_loss`.
        vocab_reduce: See :func:`fused_linear_grpo_loss`.

    Returns:
        ``loss``, and the ``metrics`` of :func:`fused_linear_grpo_loss` and :func:`~srpo_core.srpo_loss`.

    Raises:
        ValueError: As those two.
        RuntimeError: From backward, the second time.

    Example:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
        >>> lm_head = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> old, roles = torch.tensor([[-0.1269, -0.6931]]), torch.tensor([[Role.PERCEPTION, Role.REASONING]])
        >>> loss, metrics = fused_linear_srpo_loss(
        ...     hidden, lm_head, torch.tensor([[0, 0]]), old, old - torch.tensor([[2.0, 0.0]]), None, roles,
        ...     torch.tensor([1.0]), torch.tensor([[True, True]]))
        >>> metrics["weight/perception/mean"]
        tensor(1.5510)

    References:
        SRPO, arXiv:2605.07274, as its abstract describes it; formulas and defaults are this project's choices.
    """
    credit = step_credit(
        old_log_probs,
        corrupted_log_probs,
        counterfactual_log_probs,
        roles,
        advantages,
        mask,
        surrogate=surrogate,
        broken=broken,
        strength=strength,
        visual_score=visual_score,
        consistency_score=consistency_score,
        score_clip=score_clip,
        visual_divergence=visual_divergence,
        consistency_divergence=consistency_divergence,
        perception_use=perception_use,
        use=use,
        baseline=baseline,
        weight_map=weight_map,
        renormalization=renormalization,
        scale=scale,
        visual_scale=visual_scale,
        consistency_scale=consistency_scale,
        bound=bound,
        sign=sign,
        mix=mix,
    )
    loss, metrics = fused_linear_grpo_loss(
        hidden,
        lm_head,
        token_ids,
        old_log_probs,
        credit.advantages,
        mask,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        ref_log_probs=ref_log_probs,
        surrogate=surrogate,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        max_ratio=max_ratio,
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        reduction=reduction,
        normalizer=normalizer,
        active=active,
        active_tokens=active_tokens,
        chunk_tokens=chunk_tokens,
        vocab_columns=vocab_columns,
        vocab_offset=vocab_offset,
        vocab_reduce=vocab_reduce,
    )
    return LossOutput(loss, metrics | credit.metrics)


@typechecked
def fused_linear_kl(
    hidden: Float[Tensor, "batch time hidden_dim"],
    other_hidden: Float[Tensor, "batch time hidden_dim"],
    lm_head: Float[Tensor, "vocab hidden_dim"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "batch time"]:
    r"""KL, in nats, from the next-token distribution of one context to another's: ``full_kl`` from hidden states.

    :math:`\sum_v p_v (\log p_v - \log q_v)` with :math:`p` of `hidden` and :math:`q` of `other_hidden`: the
    ``full_kl`` of :func:`~srpo_core.token_divergence`, at the cost of two products (4NHV) and without a
    [tokens, vocab] tensor. A score, for `visual_divergence` and `consistency_divergence`: detached; 0 at padding.

    Args:
        hidden: Last hidden states under the original context, already shifted by one.
        other_hidden: Under the changed one.
        lm_head: Weight of the output layer, in the dtype of `hidden`.
        mask: True at the tokens to score; elsewhere the inputs may hold anything, even NaN.
        bias: Of the output layer.
        temperature: Divides the logits of both, above 0.
        logit_softcap: See :func:`fused_linear_log_probs`.
        active_tokens: See there.
        chunk_tokens: See there.

    Raises:
        ValueError: If an option is out of range, or dtypes differ.

    Example:
        >>> fused_linear_kl(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), torch.eye(2),
        ...                 torch.tensor([[True]]))
        tensor([[0.4621]])
    """
    options = (bias, temperature, logit_softcap, active_tokens, chunk_tokens)
    return _divergence(hidden, other_hidden, lm_head, mask, full_kl, *options)


@typechecked
def fused_linear_jsd(
    hidden: Float[Tensor, "batch time hidden_dim"],
    other_hidden: Float[Tensor, "batch time hidden_dim"],
    lm_head: Float[Tensor, "vocab hidden_dim"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "batch time"]:
    """Jensen-Shannon divergence, nats, between the next-token distributions of two contexts; at most log 2.

    The ``jsd`` of :func:`~srpo_core.token_divergence` from hidden states, as :func:`fused_linear_kl` is its
    ``full_kl``. Detached; 0 at padding.

    Args:
        hidden: See :func:`fused_linear_kl`.
        other_hidden: See there.
        lm_head: See there.
        mask: See there.
        bias: See there.
        temperature: See there.
        logit_softcap: See there.
        active_tokens: See there.
        chunk_tokens: See there.

    Raises:
        ValueError: If an option is out of range, or dtypes differ.

    Example:
        >>> fused_linear_jsd(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), torch.eye(2),
        ...                  torch.tensor([[True]]))
        tensor([[0.1109]])
    """
    options = (bias, temperature, logit_softcap, active_tokens, chunk_tokens)
    return _divergence(hidden, other_hidden, lm_head, mask, jsd, *options)


class _Head(NamedTuple):
    """How hidden states become logits, ``softcap(hidden @ lm_head.T + bias) / temperature``, and how many at a time."""

    temperature: float
    softcap: float | None
    vocab_offset: int
    vocab_reduce: VocabReduce | None
    chunk: int  # tokens whose logits share a buffer, in `dtype`
    span: int  # tokens of one gradient product
    columns: int | None  # tokens of the vocabulary that a gradient product keeps
    dtype: torch.dtype  # at least float32


class _Tokens(NamedTuple):
    """Which tokens of the flattened batch to compute. Where not `real` a place is only there to fill a static size."""

    places: Tensor
    real: Tensor | None
    missing: Tensor | None  # whether there are more than `places`

    def take(self, values: Tensor, part: slice) -> Tensor:
        """Values of a part of the tokens, 0 at fillers whatever they hold."""
        taken = values[self.places[part]]
        if self.real is None:
            return taken
        real = self.real[part]
        return taken.masked_fill(~(real if values.ndim == 1 else real[:, None]), 0)

    def to_batch(self, values: Tensor, mask: Tensor, other: Tensor | float) -> Tensor:
        """Values of the tokens at their places, `other` elsewhere."""
        if self.real is not None:
            values = torch.where(self.real, values, 0.0)
        if self.missing is not None:
            values = torch.where(self.missing, torch.nan, values)
        batch = values.new_zeros(mask.numel()).index_add(0, self.places, values).view(mask.shape)
        return torch.where(mask, batch, other)


def _every_token(mask: Tensor) -> _Tokens:
    return _Tokens(torch.arange(mask.numel(), device=mask.device), mask.flatten(), None)


def _tokens(mask: Tensor, count: int | None) -> _Tokens:
    """The tokens under the mask, if the host can know without waiting how many they are, else all."""
    flat = mask.flatten()
    on_host = flat.device.type == "cpu" and not torch.compiler.is_compiling()
    if count is not None:
        if on_host and flat.sum() > count:
            raise ValueError(
                f"active_tokens is {count}, but {flat.sum()} tokens are to be computed; pass at least that"
            )
        places = flat.nonzero_static(size=count, fill_value=-1)[:, 0]
        return _Tokens(places.clamp(min=0), places >= 0, flat.sum() > count)
    return _Tokens(flat.nonzero()[:, 0], None, None) if on_host else _every_token(mask)


class _Gradients(NamedTuple):
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class _Sweep(NamedTuple):
    log_probs: Tensor
    entropy: Tensor | None
    dropped: Tensor | None  # probability that the gradients took as one, with `columns`
    gradients: _Gradients


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    tokens: _Tokens,
    head: _Head,
    *,
    derivatives: Callable[[slice, Tensor], Tensor] | None = None,
    needs: tuple[bool, ...] = (False, False, False),
    multiple: int = 1,
    entropy: bool = False,
) -> _Sweep:
    """Log-probs of tokens and, given the `derivatives` of a loss with respect to them, the gradients that it `needs`.

    `derivatives` is asked for one span of tokens at a time, a whole number of `multiple`.
    """
    count, vocab = len(tokens.places), len(weight)
    logits = weight.new_empty(min(head.chunk, count), vocab, dtype=head.dtype)
    # In full precision the derivatives take the place of the logits; in half, those of several chunks have their own.
    deltas = weight.new_empty(min(head.span, count), vocab) if derivatives and weight.dtype != head.dtype else None
    slopes = torch.empty_like(logits) if derivatives and head.softcap else None
    log_probs, scales = (weight.new_empty(count, dtype=head.dtype) for _ in range(2))
    entropies = torch.empty_like(log_probs) if entropy else None
    dropped = torch.empty_like(log_probs) if derivatives and head.columns else None
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    grad_bias = weight.new_zeros(vocab, dtype=head.dtype) if needs[2] else None
    grad_weight = None

    spans = list(_slices(0, count, head.span, multiple))
    for span in spans:
        inputs = tokens.take(hidden, span)
        delta = logits[: len(inputs)] if deltas is None else deltas[: len(inputs)]
        for part in _slices(span.start, span.stop, head.chunk):
            rows = slice(part.start - span.start, part.stop - span.start)
            here = logits[: part.stop - part.start]
            _write_logits(here, inputs[rows], weight, bias, head, slopes)
            log_probs[part], scales[part], of_part = _softmax(
                here, tokens.take(token_ids, part), head, slopes, here if deltas is None else delta[rows], entropy
            )
            if entropies is not None and of_part is not None:
                entropies[part] = of_part
        if derivatives is None:
            continue
        factor = derivatives(span, log_probs[span]) * scales[span] / -head.temperature
        inputs = (inputs * factor[:, None]).to(weight.dtype)
        if grad_bias is not None:
            grad_bias += factor.to(delta.dtype) @ delta
        if dropped is not None and head.columns is not None:
            kept, rest, spread = _compact(delta, factor, tokens.take(token_ids, span), head.columns)
            dropped[span] = rest * scales[span]
            delta, rest, spread = delta.index_select(1, kept), rest.to(weight.dtype), spread.to(weight.dtype)
            if grad_hidden is not None:
                product = torch.addr(delta @ weight[kept], rest, spread @ weight)
                grad_hidden.index_add_(0, tokens.places[span], product.mul_(factor[:, None]))
            if needs[1]:
                grad_weight = torch.zeros_like(weight, dtype=head.dtype) if grad_weight is None else grad_weight
                grad_weight.index_add_(0, kept, (delta.t() @ inputs).to(head.dtype))
                grad_weight.addr_(spread.to(head.dtype), (rest @ inputs).to(head.dtype))
            continue
        if grad_hidden is not None:
            grad_hidden.index_add_(0, tokens.places[span], (delta @ weight).mul_(factor[:, None]))
        if needs[1] and (len(spans) == 1 or (grad_weight is None and deltas is None)):
            grad_weight = delta.t() @ inputs
        elif needs[1]:
            grad_weight = torch.zeros_like(weight, dtype=head.dtype) if grad_weight is None else grad_weight
            _add_product(grad_weight, delta.t(), inputs)

    if grad_hidden is not None and head.vocab_reduce is not None:
        grad_hidden = head.vocab_reduce(grad_hidden, "sum")
    if needs[1]:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
    if grad_bias is not None:
        grad_bias = grad_bias.to(weight.dtype)
    return _Sweep(log_probs, entropies, dropped, _Gradients(grad_hidden, grad_weight, grad_bias))


def _compact(delta: Tensor, factor: Tensor, token_ids: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the vocabulary worth a product; each row's sum over the others, and how that spreads over them.

    The columns left out become one product of rank one, which keeps the sum of every row and nearly that of every
    column. Sampled tokens, whose own derivative is the greatest of their row, always stay.
    """
    mass = (factor.abs().to(delta.dtype) @ delta).to(factor.dtype)
    kept = mass.index_fill(0, token_ids, torch.inf).topk(columns, sorted=False).indices
    left = mass.index_fill(0, kept, 0.0)
    rest = delta.sum(1, dtype=factor.dtype) - delta.index_select(1, kept).sum(1, dtype=factor.dtype)
    return kept, rest, left / left.sum().clamp(min=torch.finfo(left.dtype).tiny)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _divergence(
    hidden: Tensor,
    other_hidden: Tensor,
    lm_head: Tensor,
    mask: Tensor,
    divergence: Callable[[Tensor, Tensor, int], Tensor],
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    active_tokens: int | None,
    chunk_tokens: int | None,
) -> Tensor:
    hidden, other_hidden, lm_head, bias = _full_precision_of_float16(hidden, other_hidden, lm_head, bias)
    head = _head(hidden, lm_head, temperature, logit_softcap, chunk_tokens)
    if other_hidden.dtype != hidden.dtype:
        raise ValueError(f"other_hidden is {other_hidden.dtype} and hidden {hidden.dtype}; pass both in one dtype")
    tokens = _tokens(mask, active_tokens)
    count = len(tokens.places)
    buffers = [lm_head.new_empty(min(head.chunk, count), len(lm_head), dtype=head.dtype) for _ in range(2)]
    values = lm_head.new_empty(count, dtype=head.dtype)
    for part in _slices(0, count, head.chunk):
        logits, other_logits = (buffer[: part.stop - part.start] for buffer in buffers)
        _write_logits(logits, tokens.take(hidden.flatten(0, 1), part), lm_head, bias, head, None)
        _write_logits(other_logits, tokens.take(other_hidden.flatten(0, 1), part), lm_head, bias, head, None)
        for rows in _cached_rows(logits):
            log_p, log_q = logits[rows].log_softmax(-1), other_logits[rows].log_softmax(-1)
            values[part.start + rows.start : part.start + rows.stop] = divergence(log_p, log_q, 0).clamp(min=0.0)
    return tokens.to_batch(values, mask, 0.0)


def _write_logits(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head, slopes: Tensor | None
) -> None:
    """Write the logits and, where there is room for them, the slopes of the soft-cap."""
    scale = 1.0 / head.temperature
    if hidden.dtype == out.dtype and bias is None and head.softcap is None:
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
        return
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif out.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    elif torch.compiler.is_compiling():
        torch.mm(hidden.to(out.dtype), weight.to(out.dtype).t(), out=out)
    else:
        hidden = hidden.to(out.dtype)
        # One buffer for all: memory that is new each time costs more than the cast.
        cast = weight.new_empty(min(_CAST_ROWS, len(weight)), weight.shape[1], dtype=out.dtype)
        with _bfloat16_products():
            for rows in _slices(0, len(weight), _CAST_ROWS):
                torch.mm(hidden, cast[: rows.stop - rows.start].copy_(weight[rows]).t(), out=out[:, rows])
    if bias is not None:
        out.add_(bias)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_()
        if slopes is not None:
            slopes = slopes[: len(out)]
            torch.addcmul(torch.ones((), dtype=out.dtype, device=out.device), out, out, value=-1, out=slopes)
        scale *= head.softcap
    if scale != 1.0:
        out.mul_(scale)


def _softmax(
    logits: Tensor, ids: Tensor, head: _Head, slopes: Tensor | None, out: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Log-prob of each token; the scale of its row of `out`, the derivative of -log-prob by the logits; the entropy.

    Everything is relative to the *other* tokens of the vocabulary. With their greatest logit :math:`m` and
    :math:`g = \log \sum_{v \ne y} e^{z_v} - z_y`, the log-prob is :math:`-\log(1 + e^g)`, never above 0, and
    :math:`1 - p = \sigma(g)` keeps its digits however sure the model is. `out` is :math:`e^{z_v - m}`, and at the
    token minus the sum of the others. `logits` are overwritten.
    """
    ids = ids[:, None] - head.vocab_offset
    owned = None
    if head.vocab_reduce is not None:
        owned, ids = (ids >= 0) & (ids < logits.shape[1]), ids.clamp(0, logits.shape[1] - 1)
    parts = []
    for some in _cached_rows(logits) if head.vocab_reduce is None else [slice(0, len(logits))]:
        here, chosen, mine = logits[some], ids[some], None if owned is None else owned[some]
        target = here.gather(1, chosen)
        _put(here, chosen, -torch.inf, mine)
        # A bound where every other token is barred, or there is none.
        top = here.amax(1, keepdim=True).clamp(min=torch.finfo(here.dtype).min)
        if head.vocab_reduce is not None:
            top = head.vocab_reduce(top, "max")
        here.sub_(top)
        shifted = here.clone() if entropy else None
        others = here.exp_().sum(1, keepdim=True)
        mixed = others if shifted is None else _dot(here, shifted)
        if head.vocab_reduce is not None and mine is not None:
            target = torch.where(mine, target, 0.0)
            target, others, mixed = head.vocab_reduce(torch.cat([target, others, mixed], dim=1), "sum").split(1, dim=1)
        _put(here, chosen, -others, mine)
        if slopes is not None:
            here.mul_(slopes[some])
        if out is not logits:
            out[some] = here
        parts.append(torch.cat([top, target, others, mixed], dim=1))
    top, target, others, mixed = torch.cat(parts).unbind(1)
    log_others = others.log()
    gap = top + log_others - target
    log_prob, rest = F.logsigmoid(-gap), torch.sigmoid(gap)
    scale = rest / others.clamp(min=torch.finfo(others.dtype).tiny)
    if not entropy:
        return log_prob, scale, None
    # H = h(p) + (1 - p) H(others), where a certain event adds nothing.
    entropy_of_others = log_others - mixed / others
    surprise = torch.sigmoid(-gap) * F.softplus(gap) + rest * (entropy_of_others - F.logsigmoid(gap))
    return log_prob, scale, torch.where(gap.isinf(), torch.where(gap > 0, entropy_of_others, 0.0), surprise)


def _cached_rows(logits: Tensor) -> list[slice]:
    """Rows that are worth finishing before the next ones are touched."""
    rows = len(logits)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = max(1, _CACHED_BYTES // (logits.shape[1] * logits.element_size()))
    return [slice(start, min(start + rows, len(logits))) for start in range(0, len(logits), rows)]


def _put(matrix: Tensor, columns: Tensor, values: Tensor | float, where: Tensor | None) -> None:
    """Write a value into one column of each row, of the rows `where` it says."""
    if where is not None:
        values = torch.where(where, values, matrix.gather(1, columns))
    matrix.scatter_(1, columns, values)


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Row sums of the products, an infinite value of weight 0 adding nothing."""
    return (weights * values.clamp(min=torch.finfo(values.dtype).min)).sum(1, keepdim=True)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let float32 products use the bfloat16 units: exact where both factors were bfloat16, and several times faster."""
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows in _slices(0, len(total), _CAST_ROWS):
            total[rows] += left[rows] @ right


def _slices(start: int, stop: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """As few slices of at most `size` as cover the range, of equal length or nearly, in whole numbers of `multiple`."""
    units = (stop - start) // multiple
    count = -(-units // (size // multiple))
    for i in range(count):
        yield slice(start + i * units // count * multiple, start + (i + 1) * units // count * multiple)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *gradients: Tensor | None):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError(
                "a fused loss was sent backward twice; its gradients are made once, in the forward: compute it again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # A pass over the gradients is saved where looking at the number costs nothing.
        if grad_loss.device.type != "cpu" or torch.compiler.is_compiling() or grad_loss != 1.0:
            gradients = tuple(None if x is None else x.mul_(grad_loss) for x in gradients)
        return None, *gradients, None, None, None


class _LogProbs(torch.autograd.Function):
    """Log-probs (and entropies) of tokens. With a frozen head the derivative by the hidden states is made at once."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, token_ids, places, real, head, entropy):
        tokens = _Tokens(places, real, None)
        ctx.head = head
        ctx.frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        ahead = ctx.frozen and ctx.needs_input_grad[0]
        swept = _sweep(
            hidden,
            weight,
            bias,
            token_ids,
            tokens,
            head,
            derivatives=(lambda part, log_probs: torch.ones_like(log_probs)) if ahead else None,
            needs=(ahead, False, False),
            entropy=entropy,
        )
        if ahead:
            ctx.save_for_backward(swept.gradients.hidden, places, real)
        else:
            ctx.save_for_backward(hidden, weight, bias, token_ids, places, real)
        entropies = swept.log_probs.new_zeros(0) if swept.entropy is None else swept.entropy
        ctx.mark_non_differentiable(entropies)
        return swept.log_probs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        rest = (None,) * 5
        if ctx.frozen:
            slope, places, real = ctx.saved_tensors
            grad = grad if real is None else torch.where(real, grad, 0.0)
            grad = grad.new_zeros(len(slope)).index_add(0, places, grad)
            return (slope * grad[:, None]).to(slope.dtype), None, None, *rest
        hidden, weight, bias, token_ids, places, real = ctx.saved_tensors
        swept = _sweep(
            hidden,
            weight,
            bias,
            token_ids,
            _Tokens(places, real, None),
            ctx.head,
            derivatives=lambda part, log_probs: grad[part],
            needs=ctx.needs_input_grad[:3],
        )
        return *swept.gradients, *rest


def _log_probs(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    tokens: _Tokens,
    head: _Head,
    *,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    return _LogProbs.apply(
        hidden.flatten(0, 1), lm_head, bias, token_ids.flatten(), tokens.places, tokens.real, head, entropy
    )


def _full_precision_of_float16(*tensors: Tensor | None) -> tuple[Any, ...]:
    # The gradients are made before a loss scaler can lift them over float16's smallest number.
    return tuple(x.float() if x is not None and x.dtype == torch.float16 else x for x in tensors)


def _head(
    hidden: Tensor,
    lm_head: Tensor,
    temperature: float,
    softcap: float | None,
    chunk: int | None,
    vocab_offset: int = 0,
    vocab_reduce: VocabReduce | None = None,
    columns: int | None = None,
) -> _Head:
    if hidden.dtype != lm_head.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and lm_head {lm_head.dtype}; pass lm_head.to(hidden.dtype), its gradient follows"
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"logit_softcap must be above 0, got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk}")
    if vocab_offset and vocab_reduce is None:
        raise ValueError(f"vocab_offset is {vocab_offset} without a vocab_reduce; a shard of the vocabulary needs both")
    dtype = at_least_float32(lm_head.dtype)
    full = lm_head.dtype == dtype
    if chunk is None:
        chunk = 256 if hidden.device.type == "cpu" else 1024
    span = chunk if full else 4 * chunk
    if columns is not None:
        least = min(span, hidden.shape[0] * hidden.shape[1])
        if not least <= columns <= len(lm_head):
            raise ValueError(
                f"vocab_columns must be in [{least}, {len(lm_head)}], from the tokens of one gradient product to the "
                f"vocabulary, got {columns}"
            )
        if vocab_reduce is not None:
            raise ValueError("vocab_columns needs the whole vocabulary; pass it without vocab_reduce")
    return _Head(temperature, softcap, vocab_offset, vocab_reduce, chunk, span, columns, dtype)
