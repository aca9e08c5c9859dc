"""The losses and scores straight from hidden states, without a [tokens, vocab] tensor."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.log_probs import divergence_of
from srpo_core.losses import LossOutput, aggregate, grpo_loss, token_losses
from srpo_core.masking import masked_max, masked_mean
from srpo_core.options import DivergenceKind, LossOptions
from srpo_core.output_layer import OutputLayer
from srpo_core.typechecking import typechecked
from srpo_core.vocabulary import WithGradients, divergences, every_token, head_of, log_probs_of, sweep, tokens_of

__all__ = [
    "LogProbsAndEntropy",
    "fused_linear_divergence",
    "fused_linear_grpo_loss",
    "fused_linear_log_probs",
    "fused_linear_log_probs_and_entropy",
]

Active = Literal["real", "credited"]


class LogProbsAndEntropy(NamedTuple):
    """The log-probability of each token and the entropy of its distribution, detached; both in nats."""

    log_probs: Float[Tensor, "batch time"]
    entropy: Float[Tensor, "batch time"]


@typechecked
def fused_linear_log_probs(
    hidden: Float[Tensor, "batch time hidden_dim"],
    output: OutputLayer,
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "batch time"]:
    r"""Log-probability, in nats, of each token, straight from the hidden state that predicts it; 0 at padding.

    .. math:: \log \pi(y_t) = z_{t, y_t} - \log \sum_v e^{z_{t, v}}

    with the logits :math:`z_t` of :class:`~srpo_core.OutputLayer`. Without a gradient this takes one matrix product
    (2NHV operations). With a frozen weight (LoRA) the derivative with respect to the hidden states is computed at once,
    and any loss of the log-probabilities takes 4NHV. With a trained weight the logits are computed again in the
    backward pass, which makes 8NHV; for a GRPO loss :func:`fused_linear_grpo_loss` needs only 6NHV. The arithmetic is
    the same in every case, so a first update finds an importance ratio of exactly 1.

    Args:
        hidden: ``hidden[b, t]`` predicts ``token_ids[b, t]``: the last hidden states, already shifted by one. A packed
            batch is ``[1, tokens, hidden_dim]``.
        output: How hidden states become logits.
        token_ids: The tokens to score, each in [0, vocab) where `mask` is True.
        mask: True at the tokens to score. Elsewhere the inputs may hold anything, even NaN, and the gradient is 0.
        active_tokens: The number of tokens under `mask`, or a larger number, such as a padded size that keeps one
            compiled graph: only so many are computed. None: the tokens are counted on the CPU in eager mode; elsewhere
            counting would stall the device, so all ``batch * time`` tokens are computed. A number that is too low makes
            the result NaN, and is an error on the CPU.
        chunk_tokens: How many tokens have their logits in memory at a time, in at least float32; at least 1. None: 256
            on a CPU, 1024 elsewhere.

    Raises:
        ValueError: If a number is out of range, or `hidden` and the weight differ in dtype or hidden size.

    Example:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> output = OutputLayer(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> fused_linear_log_probs(hidden, output, torch.tensor([[0, 0]]), torch.tensor([[True, True]]))
        tensor([[-0.1269, -0.6931]])
    """
    hidden, weight, bias, head = head_of(hidden, output, chunk_tokens)
    tokens = tokens_of(mask, active_tokens)
    log_probs, _ = log_probs_of(hidden, weight, bias, token_ids, tokens, head)
    return tokens.to_batch(log_probs, mask, 0.0)


@typechecked
def fused_linear_log_probs_and_entropy(
    hidden: Float[Tensor, "batch time hidden_dim"],
    output: OutputLayer,
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> LogProbsAndEntropy:
    """Log-probs as :func:`fused_linear_log_probs`, and the entropy of each next-token distribution from the same pass.

    Only the log-probs have a gradient. At padding both are 0.

    Args:
        hidden: ``hidden[b, t]`` predicts ``token_ids[b, t]``.
        output: How hidden states become logits.
        token_ids: The tokens to score.
        mask: True at the tokens to score.
        active_tokens: The number of tokens under `mask`, or a larger number.
        chunk_tokens: How many tokens have their logits in memory at a time.

    Raises:
        ValueError: As :func:`fused_linear_log_probs`.

    Example:
        >>> from srpo_core.fused import fused_linear_log_probs_and_entropy
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> output = OutputLayer(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> tokens, mask = torch.tensor([[0, 0]]), torch.tensor([[True, True]])
        >>> fused_linear_log_probs_and_entropy(hidden, output, tokens, mask).entropy
        tensor([[0.3653, 0.6931]])
    """
    hidden, weight, bias, head = head_of(hidden, output, chunk_tokens)
    tokens = tokens_of(mask, active_tokens)
    log_probs, entropy = log_probs_of(hidden, weight, bias, token_ids, tokens, head, entropy=True)
    return LogProbsAndEntropy(tokens.to_batch(log_probs, mask, 0.0), tokens.to_batch(entropy, mask, 0.0))


@typechecked
def fused_linear_divergence(
    hidden: Float[Tensor, "batch time hidden_dim"],
    output: OutputLayer,
    mask: Bool[Tensor, "batch time"],
    *,
    other_hidden: Float[Tensor, "batch time hidden_dim"],
    kind: DivergenceKind = "full_kl",
    top_k: int = 64,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "batch time"]:
    """How far, in nats, each next-token distribution moved when its context was changed, from hidden states.

    The result is that of :func:`~srpo_core.token_divergence`, from two matrix products (4NHV operations) and without a
    [tokens, vocab] tensor. Pass it to :func:`~srpo_core.srpo_advantages` as one of its divergences. It is detached, and
    0 at padding.

    Args:
        hidden: Last hidden states under the original context, already shifted by one.
        output: How hidden states become logits.
        mask: True at the tokens to score; elsewhere the inputs may hold anything, even NaN.
        other_hidden: Last hidden states under the changed context.
        kind: Which divergence, as in :func:`~srpo_core.token_divergence`.
        top_k: How many of the likeliest tokens ``topk_kl`` keeps apart, at least 1.
        active_tokens: The number of tokens under `mask`, or a larger number. None: they are counted on the CPU.
        chunk_tokens: How many tokens have their logits in memory at a time, at least 1. None: 256 on a CPU, 1024
            elsewhere.

    Raises:
        ValueError: If `kind` is unknown, a number is out of range, or dtypes or hidden sizes differ.

    Example:
        >>> from srpo_core.fused import fused_linear_divergence
        >>> fused_linear_divergence(torch.tensor([[[1.0, 0.0]]]), OutputLayer(torch.eye(2)), torch.tensor([[True]]),
        ...                         other_hidden=torch.tensor([[[0.0, 1.0]]]))
        tensor([[0.4621]])
    """
    return divergences(hidden, other_hidden, output, mask, divergence_of(kind, top_k), active_tokens, chunk_tokens)


@typechecked
def fused_linear_grpo_loss(
    hidden: Float[Tensor, "batch time hidden_dim"],
    output: OutputLayer,
    token_ids: Int[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    options: LossOptions = LossOptions(),
    *,
    old_log_probs: Float[Tensor, "batch time"],
    ref_log_probs: Float[Tensor, "batch time"] | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
    active: Active = "real",
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
    vocab_columns: int | None = None,
) -> LossOutput:
    r"""The loss and metrics of :func:`~srpo_core.grpo_loss`, from hidden states in one pass over the vocabulary.

    For SRPO pass the advantages of :func:`~srpo_core.srpo_advantages`. The loss and its gradients are computed together
    in the forward pass, in three matrix products (6NHV operations; a loss that computes the logits again in the
    backward pass needs four products) and without a [tokens, vocab] tensor, so peak memory does not grow with the
    number of tokens. The backward pass only scales the gradients, and a second backward pass is an error. Scaling the
    loss afterwards (``loss / accumulation_steps``) costs one more pass over the gradients, so prefer `normalizer`.

    ======================  ========================================================================================
    one pass, 6NHV          ``clip``, ``cispo``, ``sapo``, with any KL penalty and reduction; ``gspo``, ``gspo_token``,
                            ``vespo`` and `off_policy_threshold` where a response fits into one gradient product,
                            `chunk_tokens` in full and four times as many in half precision; then padding is computed
                            as well
    two passes, 8NHV        the last four otherwise: :func:`fused_linear_log_probs`, then the loss
    frozen weight, 4NHV     every surrogate
    without gradient, 2NHV  every surrogate
    ======================  ========================================================================================

    The arguments decide which one is taken; the results are the same. The function compiles as a whole and never waits
    for an accelerator.

    Args:
        hidden: ``hidden[b, t]`` predicts ``token_ids[b, t]``: the last hidden states, already shifted by one.
        output: How hidden states become logits; its weight and bias get gradients where they require them.
        token_ids: The sampled tokens, each in [0, vocab) where `mask` is True.
        advantages: The advantage of each token.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN. A packed ``[1, tokens]`` batch
            is one response to ``sequence_mean``, ``sequence_sum`` and whatever is of the sequence level, so these need
            a padded one.
        options: The surrogate, the KL penalty, and how the losses of tokens are added up.
        old_log_probs: The same tokens under the policy that sampled them, nats; best from
            :func:`fused_linear_log_probs`.
        ref_log_probs: The same tokens under the reference policy, nats; required where `kl_coef` is above 0.
        normalizer: What the summed loss is divided by, see :func:`~srpo_core.aggregate`.
        active: Whether every ``real`` token is computed, or only the ``credited`` ones, whose advantage is not 0. The
            loss and the gradient are the same, and the cost falls with the number of tokens; the metrics count the
            other tokens as unchanged (ratio 1). ``credited`` needs `kl_coef` 0, no `off_policy_threshold` and a
            surrogate that treats each token by itself.
        active_tokens: As in :func:`fused_linear_log_probs`, counting the tokens that `active` selects.
        chunk_tokens: How many tokens have their logits in memory at a time, at least 1. None: 256 on a CPU, 1024
            elsewhere.
        vocab_columns: A number approximates the gradients: the two gradient products keep this many tokens of the
            vocabulary, at least those of one gradient product, and treat the others together as one product of rank
            one. The loss stays exact. At a quarter of the vocabulary this is about 1.6 times faster. Where the model is
            sure, the error is smaller than that of bfloat16 rounding; where the logits are flat it is large, so watch
            ``vocab/dropped``. None: exact gradients.

    Returns:
        The result of :func:`~srpo_core.grpo_loss`. With `vocab_columns` its metrics also have ``vocab/dropped/mean``
        and ``vocab/dropped/max``, the probability of the tokens that are treated together.

    Raises:
        ValueError: As :func:`~srpo_core.grpo_loss` and :func:`fused_linear_log_probs`, and if `active` does not fit.
        RuntimeError: From a second backward pass.

    Example:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> loss, metrics = fused_linear_grpo_loss(
        ...     hidden, OutputLayer(weight), torch.tensor([[0, 0]]), torch.tensor([[1.0, 3.0]]),
        ...     torch.tensor([[True, True]]), old_log_probs=torch.tensor([[-0.1269, -0.6931]]))
        >>> loss.backward()
        >>> weight.grad
        tensor([[-0.0596, -0.7500],
                [ 0.0596,  0.7500]])
    """
    hidden, weight, bias, head = head_of(hidden, output, chunk_tokens, columns=vocab_columns)

    def loss_of(log_probs: Tensor) -> LossOutput:
        return grpo_loss(
            log_probs,
            advantages,
            mask,
            options,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            normalizer=normalizer,
        )

    computed = mask
    if choose("active", active, {"real": False, "credited": True}):
        if options.kl_coef > 0.0 or options.is_sequence_level:
            raise ValueError(
                f"active='credited' with kl_coef={options.kl_coef}, surrogate={options.surrogate.name!r} and "
                f"off_policy_threshold={options.off_policy_threshold}: a token whose advantage is 0 counts there; pass "
                "active='real'"
            )
        computed = mask & (advantages != 0)
    # A token that is not computed keeps ratio 1: without an advantage its loss is 0 whatever its log-prob.
    unchanged = old_log_probs.detach()
    trains_head = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    by_response = options.is_sequence_level
    if not trains_head or (by_response and not 0 < mask.shape[1] <= head.span):
        tokens = tokens_of(computed, active_tokens)
        log_probs, _ = log_probs_of(hidden, weight, bias, token_ids, tokens, head)
        return loss_of(tokens.to_batch(log_probs, computed, unchanged))

    tokens = every_token(mask) if by_response else tokens_of(computed, active_tokens)
    shape = (-1, mask.shape[1]) if by_response else (1, -1)
    # Aggregation is linear in the token losses, so its gradient is the share of each.
    zeros = torch.zeros(mask.shape, dtype=head.dtype, device=mask.device)

    def summed(losses: Tensor) -> Tensor:
        return aggregate(losses, mask, reduction=options.reduction, normalizer=normalizer)

    shares = torch.func.grad(summed)(zeros)

    def derivatives(part: slice, log_probs: Tensor) -> Tensor:
        def of(values: Tensor) -> Tensor:
            return tokens.take(values.flatten(), part).view(shape)

        fixed = (of(advantages), of(mask), options)
        old, share = of(old_log_probs), of(shares)
        ref = None if ref_log_probs is None else of(ref_log_probs)

        def loss(log_probs: Tensor) -> Tensor:
            losses, penalty = token_losses(log_probs.view(shape), *fixed, old_log_probs=old, ref_log_probs=ref)
            if penalty is not None and options.kl_coef > 0.0:
                losses = losses + options.kl_coef * penalty
            return (share * losses).sum()

        return torch.func.grad(loss)(log_probs)

    swept = sweep(
        hidden.detach().flatten(0, 1),
        weight.detach(),
        None if bias is None else bias.detach(),
        token_ids.flatten(),
        tokens,
        head,
        derivatives=derivatives,
        needs=tuple(x is not None and x.requires_grad for x in (hidden, weight, bias)),
        multiple=mask.shape[1] if by_response else 1,
    )
    with torch.no_grad():
        loss, metrics = loss_of(tokens.to_batch(swept.log_probs, computed, unchanged))
        if swept.dropped is not None:
            dropped = tokens.to_batch(swept.dropped, computed, 0.0)
            metrics["vocab/dropped/mean"] = masked_mean(dropped, computed)
            metrics["vocab/dropped/max"] = masked_max(dropped, computed, empty=0.0)
    loss = WithGradients.apply(loss, hidden.flatten(0, 1), weight, bias, *swept.gradients)
    return LossOutput(loss, metrics)
