"""Logits -> log-probabilities, entropies and divergences of next-token distributions."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.masking import at_least_float32
from srpo_core.options import DivergenceKind
from srpo_core.typechecking import typechecked

__all__ = ["divergence_of", "token_divergence", "token_entropy", "token_log_probs"]


@typechecked
def token_log_probs(
    logits: Float[Tensor, "batch time vocab"],
    token_ids: Int[Tensor, "batch time"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "batch time"]:
    r"""Log-probability, in nats, of each token under the logits that predict it.

    .. math:: \log \pi(y_t) = z_{y_t} / T - \log \sum_v e^{z_v / T}

    The computation is in float32 (float64 stays float64), and no result is above zero, whatever offset the logits
    share. Logits of :math:`-\infty` bar tokens. If such a token was sampled all the same, its log-probability is
    :math:`-\infty`, and the losses of this package have gradient 0 at every logit of its row. A row is NaN where a
    logit is plus infinity, also by the division by :math:`T`, or where all tokens are barred.

    Args:
        logits: ``logits[b, t]`` predicts ``token_ids[b, t]``: the model's output, already shifted by one.
        token_ids: The tokens to score, each in [0, vocab), also at padding.
        temperature: The temperature with which the rollout was sampled, above 0.

    Raises:
        ValueError: If `temperature` is not above 0.

    Example:
        >>> token_log_probs(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), torch.tensor([[0, 0]]))
        tensor([[-0.6931, -0.1269]])
    """
    logits = _scaled(logits, temperature)
    nats = F.cross_entropy(logits.flatten(0, 1), token_ids.flatten(), reduction="none")
    return -nats.unflatten(0, token_ids.shape)


@typechecked
def token_entropy(
    logits: Float[Tensor, "batch time vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "batch time"]:
    r"""Entropy, in nats, of each next-token distribution: :math:`-\sum_v p_v \log p_v`, in [0, log vocab].

    Args:
        logits: Next-token logits; :math:`-\infty` bars a token.
        temperature: What the logits are divided by, above 0.

    Raises:
        ValueError: If `temperature` is not above 0.

    Example:
        >>> token_entropy(torch.zeros(1, 1, 4))
        tensor([[1.3863]])
    """
    log_p = _scaled(logits, temperature).log_softmax(-1)
    return -_expectation(log_p, log_p)


@typechecked
def token_divergence(
    logits: Float[Tensor, "batch time vocab"],
    *,
    other_logits: Float[Tensor, "batch time vocab"],
    kind: DivergenceKind = "full_kl",
    temperature: float = 1.0,
    top_k: int = 64,
) -> Float[Tensor, "batch time"]:
    r"""How far, in nats, each next-token distribution moved when its context was changed.

    With :math:`p` the distribution under the original context and :math:`q` that under the changed one:
    ``full_kl`` is :math:`\mathrm{KL}(p \| q)`, ``reverse_kl`` is :math:`\mathrm{KL}(q \| p)`, ``jsd`` the
    Jensen-Shannon divergence (at most log 2), and ``topk_kl`` is :math:`\mathrm{KL}(p \| q)` after all but the
    `top_k` likeliest tokens of :math:`p` are pooled in one bucket, so it never exceeds ``full_kl``.
    Unlike a log-ratio, a divergence does not depend on which token was sampled.

    Args:
         logits: Next-token logits under the original context.
        other_logits: Next-token logits under the changed context.
        kind: Which divergence.
        temperature: What both logits are divided by, above 0.
        top_k: How many of the likeliest tokens ``topk_kl`` keeps apart, at least 1.

    Raises:
        ValueError: If `kind` is unknown, or `temperature` or `top_k` out of range.

    Example:
        >>> logits, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> token_divergence(logits, other_logits=other)
        tensor([[0.4621]])
    """
    divergence = divergence_of(kind, top_k)
    log_p = _scaled(logits, temperature).log_softmax(-1)
    log_q = _scaled(other_logits, temperature).log_softmax(-1)
    return divergence(log_p, log_q)


def divergence_of(kind: str, top_k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence of a kind, as a function of the log-probabilities of two distributions, [..., vocab]."""
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    kinds = {"full_kl": _full_kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "topk_kl": partial(_topk_kl, top_k=top_k)}
    divergence = choose("kind", kind, kinds)
    # A divergence is never negative; its rounding can be.
    return lambda log_p, log_q: divergence(log_p, log_q).clamp(min=0.0)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logits = logits.to(at_least_float32(logits.dtype))
    return logits if temperature == 1.0 else logits / temperature


def _expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Mean of `values` under `log_p`, where an impossible token adds nothing, whatever its value."""
    impossible = log_p == -torch.inf
    return (log_p.exp() * values.masked_fill(impossible, 0.0)).sum(-1)


def _full_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _expectation(log_p, log_p - log_q)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _expectation(log_q, log_q - log_p)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_half = -0.6931471805599453
    # Of minus infinity twice the gradient of logaddexp is NaN, though such a token adds nothing.
    barred = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_mean = torch.logaddexp(log_p.masked_fill(barred, 0.0), log_q.masked_fill(barred, 0.0)) + log_half
    return 0.5 * (_expectation(log_p, log_p - log_mean) + _expectation(log_q, log_q - log_mean))


def _topk_kl(log_p: Tensor, log_q: Tensor, *, top_k: int) -> Tensor:
    kept = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1).indices

    def pooled(log_probs: Tensor) -> Tensor:
        left = log_probs.scatter(-1, kept, -torch.inf)
        # Where nothing is left the gradient of logsumexp is NaN.
        empty = (left == -torch.inf).all(-1, keepdim=True)
        tail = left.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
        return torch.cat([log_probs.gather(-1, kept), tail], dim=-1)

    return _full_kl(pooled(log_p), pooled(log_q))
