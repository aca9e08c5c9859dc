"""The engine behind the fused losses: one sweep over the vocabulary, without a [tokens, vocab] tensor.

With N tokens, hidden size H and vocabulary V one matrix product is 2NHV operations; a loss and the gradients of hidden
states and weight need three, 6NHV. :func:`sweep` needs no more: it turns a chunk of logits into the derivative of the
log-probs in place, asks how the loss depends on those, and multiplies on. Backward only scales what forward has made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srpo_core.masking import at_least_float32
from srpo_core.output_layer import OutputLayer, VocabReduce
from srpo_core.products import add_product, slices, write_logits

__all__ = [
    "Head",
    "Tokens",
    "WithGradients",
    "cached_rows",
    "divergences",
    "every_token",
    "head_of",
    "log_probs_of",
    "sweep",
    "tokens_of",
]

# A CPU passes over logits in its second-level cache about twice as fast as in memory.
_CACHED_BYTES = 2**20


class Head(NamedTuple):
    """How hidden states become logits, ``softcap(hidden @ weight.T + bias) / temperature``, and how many at a time.

    A logit scale is part of the two numbers: it divides both.
    """

    temperature: float
    softcap: float | None
    vocab_offset: int
    vocab_reduce: VocabReduce | None
    chunk: int  # tokens whose logits share a buffer, in `dtype`
    span: int  # tokens of one gradient product
    columns: int | None  # tokens of the vocabulary that a gradient product keeps
    dtype: torch.dtype  # at least float32


def head_of(
    hidden: Tensor, output: OutputLayer, chunk: int | None, *, columns: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Head]:
    """Hidden states, weight and bias, in float32 if they are in float16, and the static rest; checked together."""
    if hidden.shape[-1] != output.weight.shape[1]:
        raise ValueError(
            f"hidden has hidden_dim={hidden.shape[-1]}, but output.weight has {output.weight.shape[1]}; pass the "
            "hidden states that this output layer reads"
        )
    if hidden.dtype != output.weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and output.weight {output.weight.dtype}; pass an OutputLayer with "
            "weight.to(hidden.dtype), through which the gradient flows"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk}")
    # The gradients are made before a loss scaler can lift them over float16's smallest number.
    weight, bias = output.weight, output.bias
    if weight.dtype == torch.float16:
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    dtype = at_least_float32(weight.dtype)
    if chunk is None:
        chunk = 256 if hidden.device.type == "cpu" else 1024
    span = chunk if weight.dtype == dtype else 4 * chunk
    if columns is not None:
        least = min(span, hidden.shape[0] * hidden.shape[1])
        if not least <= columns <= len(weight):
            raise ValueError(
                f"vocab_columns must be in [{least}, {len(weight)}], from the tokens of one gradient product to the "
                f"vocabulary, got {columns}"
            )
        if output.shard is not None:
            raise ValueError("vocab_columns needs the whole vocabulary; pass it with an output layer without a shard")
    offset, reduce = (0, None) if output.shard is None else output.shard
    softcap = None if output.logit_softcap is None else output.logit_softcap / output.logit_scale
    head = Head(output.temperature / output.logit_scale, softcap, offset, reduce, chunk, span, columns, dtype)
    return hidden, weight, bias, head


class Tokens(NamedTuple):
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
        if self.real is None or self.missing is not None:
            values = values.new_zeros(mask.numel()).index_add(0, self.places, values)
        # Else they are all there in order. Adding them up by their places would be the same, but before torch 2.11
        # inductor compiles that wrongly.
        return torch.where(mask, values.view(mask.shape), other)


def every_token(mask: Tensor) -> Tokens:
    return Tokens(torch.arange(mask.numel(), device=mask.device), mask.flatten(), None)


def tokens_of(mask: Tensor, count: int | None) -> Tokens:
    """The tokens under the mask, if the host can know without waiting how many they are, else all."""
    flat = mask.flatten()
    on_host = flat.device.type == "cpu" and not torch.compiler.is_compiling()
    if count is not None:
        if on_host and flat.sum() > count:
            raise ValueError(
                f"active_tokens is {count}, but {flat.sum()} tokens are to be computed; pass at least that"
            )
        places = flat.nonzero_static(size=count, fill_value=-1)[:, 0]
        return Tokens(places.clamp(min=0), places >= 0, flat.sum() > count)
    return Tokens(flat.nonzero()[:, 0], None, None) if on_host else every_token(mask)


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
def sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    tokens: Tokens,
    head: Head,
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
    deltas = (
        weight.new_empty(min(head.span, count), vocab)
        if derivatives is not None and weight.dtype != head.dtype
        else None
    )
    slopes = torch.empty_like(logits) if derivatives is not None and head.softcap else None
    log_probs, scales = (weight.new_empty(count, dtype=head.dtype) for _ in range(2))
    entropies = torch.empty_like(log_probs) if entropy else None
    dropped = torch.empty_like(log_probs) if derivatives is not None and head.columns else None
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    grad_bias = weight.new_zeros(vocab, dtype=head.dtype) if needs[2] else None
    grad_weight = None

    spans = list(slices(0, count, head.span, multiple))
    for span in spans:
        inputs = tokens.take(hidden, span)
        delta = logits[: len(inputs)] if deltas is None else deltas[: len(inputs)]
        for part in slices(span.start, span.stop, head.chunk):
            rows = slice(part.start - span.start, part.stop - span.start)
            here = logits[: part.stop - part.start]
            write_logits(
                here, inputs[rows], weight, bias, temperature=head.temperature, softcap=head.softcap, slopes=slopes
            )
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
            add_product(grad_weight, delta.t(), inputs)

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
def divergences(
    hidden: Tensor,
    other_hidden: Tensor,
    output: OutputLayer,
    mask: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    active_tokens: int | None,
    chunk_tokens: int | None,
) -> Tensor:
    """A divergence between the next-token distributions of two contexts, at each real token; 0 at padding."""
    if other_hidden.dtype != hidden.dtype:
        raise ValueError(f"other_hidden is {other_hidden.dtype} and hidden {hidden.dtype}; pass both in one dtype")
    hidden, weight, bias, head = head_of(hidden, output, chunk_tokens)
    other_hidden = other_hidden.to(hidden.dtype)
    if head.vocab_reduce is not None:
        raise ValueError("a divergence needs the whole vocabulary; pass an output layer without a shard")
    tokens = tokens_of(mask, active_tokens)
    count = len(tokens.places)
    buffers = [weight.new_empty(min(head.chunk, count), len(weight), dtype=head.dtype) for _ in range(2)]
    values = weight.new_empty(count, dtype=head.dtype)
    for part in slices(0, count, head.chunk):
        written = [buffer[: part.stop - part.start] for buffer in buffers]
        for logits, states in zip(written, (hidden, other_hidden), strict=True):
            states = tokens.take(states.flatten(0, 1), part)
            write_logits(logits, states, weight, bias, temperature=head.temperature, softcap=head.softcap, slopes=None)
        logits, other_logits = written
        for rows in cached_rows(logits):
            log_p, log_q = logits[rows].log_softmax(-1), other_logits[rows].log_softmax(-1)
            values[part.start + rows.start : part.start + rows.stop] = divergence(log_p, log_q)
    return tokens.to_batch(values, mask, 0.0)


def _softmax(
    logits: Tensor, ids: Tensor, head: Head, slopes: Tensor | None, out: Tensor, entropy: bool
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
    for some in cached_rows(logits) if head.vocab_reduce is None else [slice(0, len(logits))]:
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


def cached_rows(logits: Tensor) -> list[slice]:
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


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *gradients: Tensor | None):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called twice on a fused loss, whose gradients are computed once: compute the loss again"
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
        tokens = Tokens(places, real, None)
        ctx.head = head
        ctx.frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        ahead = ctx.frozen and ctx.needs_input_grad[0]
        swept = sweep(
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
        swept = sweep(
            hidden,
            weight,
            bias,
            token_ids,
            Tokens(places, real, None),
            ctx.head,
            derivatives=lambda part, log_probs: grad[part],
            needs=ctx.needs_input_grad[:3],
        )
        return *swept.gradients, *rest


def log_probs_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    tokens: Tokens,
    head: Head,
    *,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens, with a gradient, and their entropies where they are asked for."""
    return _LogProbs.apply(
        hidden.flatten(0, 1), weight, bias, token_ids.flatten(), tokens.places, tokens.real, head, entropy
    )
