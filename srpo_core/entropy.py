"""The entropy of next-token distributions from hidden states, with a gradient and without a [tokens, vocab] tensor."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srpo_core.output_layer import OutputLayer
from srpo_core.products import add_product, slices, write_logits
from srpo_core.typechecking import typechecked
from srpo_core.vocabulary import Head, Tokens, cached_rows, head_of, tokens_of

__all__ = ["fused_linear_entropy"]


@typechecked
def fused_linear_entropy(
    hidden: Float[Tensor, "batch time hidden_dim"],
    output: OutputLayer,
    mask: Bool[Tensor, "batch time"],
    *,
    active_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "batch time"]:
    r"""Entropy, in nats, of each next-token distribution, with a gradient; 0 at padding.

    .. math:: H_t = -\sum_v p_{t, v} \log p_{t, v}

    The value is that of :func:`~srpo_core.fused.fused_linear_log_probs_and_entropy`, which has no gradient. Subtract a
    small multiple of its mean from a loss, and training keeps the policy from becoming sure too early. The backward
    pass computes the logits again, so that value and gradients take four matrix products (8NHV operations) beside those
    of the loss, and three with a frozen weight.

    Args:
        hidden: The last hidden states, already shifted by one.
        output: How hidden states become logits; its weight and bias get gradients where they require them.
        mask: True at the tokens to score. Elsewhere `hidden` may hold anything, even NaN, and the gradient is 0.
        active_tokens: The number of tokens under `mask`, or a larger number, as in
            :func:`~srpo_core.fused_linear_log_probs`.
        chunk_tokens: How many tokens have their logits in memory at a time, at least 1. None: 256 on a CPU, 1024
            elsewhere.

    Raises:
        ValueError: If a number is out of range, `hidden` and the weight differ in dtype or hidden size, or the output
            layer is a shard of the vocabulary.

    Example:
        >>> from srpo_core import aggregate
        >>> from srpo_core.entropy import fused_linear_entropy
        >>> hidden, mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[True, True]])
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> entropy = fused_linear_entropy(hidden, OutputLayer(weight), mask)
        >>> entropy.detach()
        tensor([[0.3653, 0.6931]])
        >>> bonus = 0.01 * aggregate(entropy, mask)
        >>> (-bonus).backward()
        >>> weight.grad
        tensor([[ 0.0010,  0.0000],
                [-0.0010,  0.0000]])
    """
    hidden, weight, bias, head = head_of(hidden, output, chunk_tokens)
    if head.vocab_reduce is not None:
        raise ValueError("an entropy with a gradient needs the whole vocabulary; pass an output layer without a shard")
    tokens = tokens_of(mask, active_tokens)
    entropy = _Entropy.apply(hidden.flatten(0, 1), weight, bias, tokens.places, tokens.real, head)
    return tokens.to_batch(entropy, mask, 0.0)


class _Swept(NamedTuple):
    entropy: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tokens,
    head: Head,
    *,
    grad: Tensor | None = None,
    needs: tuple[bool, ...] = (False, False, False),
) -> _Swept:
    """Entropies and, given the derivative of a loss by each of them, the gradients that it `needs`."""
    count = len(tokens.places)
    logits = weight.new_empty(min(head.chunk, count), len(weight), dtype=head.dtype)
    slopes = torch.empty_like(logits) if grad is not None and head.softcap else None
    entropy = weight.new_empty(count, dtype=head.dtype)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=head.dtype) if needs[1] else None
    grad_bias = weight.new_zeros(len(weight), dtype=head.dtype) if needs[2] else None
    for part in slices(0, count, head.chunk):
        inputs, here = tokens.take(hidden, part), logits[: part.stop - part.start]
        write_logits(here, inputs, weight, bias, temperature=head.temperature, softcap=head.softcap, slopes=slopes)
        for rows in cached_rows(here):
            log_p = here[rows].log_softmax(-1)
            p = log_p.exp()
            log_p.masked_fill_(log_p == -torch.inf, 0.0)  # an impossible token adds nothing
            of_rows = -(p * log_p).sum(-1)
            entropy[part.start + rows.start : part.start + rows.stop] = of_rows
            if grad is not None:
                # Minus the derivative of the entropy by the logits.
                here[rows] = p.mul_(log_p.add_(of_rows[:, None]))
        if grad is None:
            continue
        delta = here if slopes is None else here.mul_(slopes[: len(here)])
        factor = grad[part] / -head.temperature
        if grad_bias is not None:
            grad_bias += factor @ delta
        delta = delta.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden.index_add_(0, tokens.places[part], (delta @ weight).mul_(factor[:, None]))
        if grad_weight is not None:
            add_product(grad_weight, delta.t(), (inputs * factor[:, None]).to(weight.dtype))
    return _Swept(
        entropy, grad_hidden, *(None if each is None else each.to(weight.dtype) for each in (grad_weight, grad_bias))
    )


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, places, real, head):
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, places, real)
        return _sweep(hidden, weight, bias, Tokens(places, real, None), head).entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, places, real = ctx.saved_tensors
        tokens = Tokens(places, real, None)
        swept = _sweep(hidden, weight, bias, tokens, ctx.head, grad=grad, needs=ctx.needs_input_grad[:3])
        return swept.hidden, swept.weight, swept.bias, None, None, None
