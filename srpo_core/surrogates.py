"""Objectives of a single token. Each is a small object that owns its parameters, its formula and its metrics.

To add one, write a subclass of :class:`Surrogate` with a `name`; the options then accept this name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srpo_core.checked import CheckedOptions, OptionError, option
from srpo_core.masking import MAX_LOG_RATIO, is_barred, log_ratio_of, masked_mean
from srpo_core.typechecking import typechecked

__all__ = ["CISPO", "GSPO", "SAPO", "VESPO", "Clip", "GSPOToken", "Surrogate"]


@dataclass(frozen=True, kw_only=True)
class Surrogate(CheckedOptions):
    """A policy-gradient loss of each token, as a function of importance ratios and advantages.

    Called with tensors it gives the loss of each token, not yet averaged. A subclass has a `name` and :meth:`losses`.
    """

    #: What stands for the surrogate, with its defaults, in YAML and on a command line. It is a field, so that what
    #: ``asdict`` makes of a surrogate makes the same one again.
    name: str = field(default="", init=False, repr=False, compare=False)
    #: Whether the loss of a token depends on the other tokens of its response.
    is_sequence_level: ClassVar[bool] = False
    #: Whether a response has one ratio and one gradient for all its tokens, so that token weights do nothing.
    is_one_ratio: ClassVar[bool] = False
    refusal_of_weights: ClassVar[str] = ""
    _by_name: ClassVar[dict[str, type["Surrogate"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Its own name only: a variant of a surrogate that inherits the name must not take its place.
        if name := vars(cls).get("name"):
            Surrogate._by_name[name] = cls

    @staticmethod
    def known() -> dict[str, type["Surrogate"]]:
        """All surrogates by their names, those of the user included."""
        return dict(Surrogate._by_name)

    @staticmethod
    def named(value: str | Mapping[str, Any]) -> "Surrogate":
        """The surrogate of a name, with its defaults, or of a mapping of its ``name`` and its parameters.

        Raises:
            ValueError: If there is no such surrogate, or a parameter is unknown or out of range.

        Example:
            >>> Surrogate.named("cispo"), Surrogate.named({"name": "clip", "low": 0.1})
            (CISPO(max_ratio=5.0, min_ratio=0.0), Clip(low=0.1, high=0.2, dual=None))
        """
        parameters = {"name": value} if isinstance(value, str) else dict(value)
        name = parameters.pop("name", None)
        if not isinstance(name, str) or name not in Surrogate._by_name:
            known = ", ".join(map(repr, Surrogate._by_name))
            raise ValueError(f"must be one of {known}, a mapping with such a 'name', or a Surrogate, got {value!r}")
        return Surrogate._by_name[name].of(parameters)

    @typechecked
    def __call__(
        self,
        log_probs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        *,
        old_log_probs: Float[Tensor, "batch time"],
    ) -> Float[Tensor, "batch time"]:
        r"""Loss of each token, 0 at padding.

        Args:
            log_probs: Log-probability, nats, of each sampled token under the policy being trained. The only input with
                a gradient. Minus infinity is legal, here and in `old_log_probs`: the token was barred, for example by a
                top-k filter. A token that both policies bar has ratio 1, one that a single policy bars has ratio
                :math:`e^{\pm 20}`. Its gradient is 0, and so is its loss where the log-probability itself is a factor
                of the loss.
            advantages: The advantage of each token; a positive one makes the token likelier.
            mask: True at response tokens. Elsewhere the inputs may hold anything, even NaN; loss and gradient there
                are 0.
            old_log_probs: The same tokens under the policy that sampled them, nats.

        Raises:
            ValueError: If `log_probs` has no gradient and `advantages` or `old_log_probs` has one.
        """
        _check_what_is_trained(log_probs, advantages=advantages, old_log_probs=old_log_probs)
        log_ratio, advantages = masked_log_ratio(log_probs, advantages, mask, old_log_probs=old_log_probs)
        barred = is_barred(log_probs)
        log_probs = log_probs.to(log_ratio.dtype)
        log_probs = torch.where(is_barred(old_log_probs), log_probs.detach(), log_probs)
        return self.losses(log_ratio, torch.where(mask & ~barred, log_probs, 0.0), advantages, mask)

    def losses(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Loss of each token: all tensors are 0 at padding, and `log_probs` is 0 at barred tokens as well.

        A token that either policy bars has a gradient through neither `log_ratio` nor `log_probs`.
        """
        raise NotImplementedError

    def metrics(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What this surrogate did to how many tokens, as 0-d tensors."""
        return {}


def _check_what_is_trained(log_probs: Tensor, **others: Tensor) -> None:
    if log_probs.requires_grad or not torch.is_grad_enabled():
        return
    for name, other in others.items():
        if other.requires_grad:
            raise ValueError(
                f"{name} requires a gradient and log_probs does not, so nothing would be trained: pass the "
                f"log-probabilities of the policy being trained as log_probs, and detach {name}"
            )


def masked_log_ratio(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, *, old_log_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-ratio and advantages, 0 at padding: masked first, so that padding has ratio 1 and credit 0 all the way."""
    log_ratio = log_ratio_of(log_probs, old_log_probs.detach(), mask)
    return log_ratio, torch.where(mask, advantages.detach().to(log_ratio.dtype), 0.0)


def ratio_of(log_ratio: Tensor) -> Tensor:
    """The importance ratio, which saturates at e^±20."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    """One number where the advantage is positive, the other one elsewhere."""
    # Not torch.where of two Python numbers: that rounds them to the default dtype.
    return torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)


def _clip_shares(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Shares of the real tokens that a clip holds back."""
    return {
        "clip/low": masked_mean(((ratio < 1.0 - low) & (advantages < 0)).to(ratio.dtype), mask),
        "clip/high": masked_mean(((ratio > 1.0 + high) & (advantages > 0)).to(ratio.dtype), mask),
    }


@dataclass(frozen=True, kw_only=True)
class Clip(Surrogate):
    r"""PPO's clipped surrogate.

    .. math:: \ell_t = -\min(\rho_t A_t,\ \operatorname{clip}(\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_t),
        \qquad \rho_t = \pi(y_t) / \pi_\text{old}(y_t)

    With `dual` :math:`d`, :math:`\ell_t \le -d A_t` where :math:`A_t < 0`. Metrics: ``clip/low`` and ``clip/high``, the
    shares of tokens that the clip holds back, and with `dual` ``clip/dual``.

    Raises:
        ValueError: If a parameter is out of range.

    Example:
        >>> Clip()(torch.tensor([[-1.0, -0.5]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[True, True]]),
        ...        old_log_probs=torch.tensor([[-1.0, -1.0]]))
        tensor([[-2.0000, -2.4000]])

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate widths: DAPO, arXiv:2503.14476, eq. 10; dual clip:
        Ye et al. 2020, arXiv:1912.09729.
    """

    name = "clip"
    low: float = option(0.2, "How far a ratio may fall below 1.", at_least=0.0, below=1.0)
    high: float = option(0.2, "How far a ratio may rise above 1.", at_least=0.0)
    dual: float | None = option(
        None, "Largest ratio that counts where the advantage is negative; None: any.", above=1.0
    )

    def losses(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        losses = _clipped(ratio_of(log_ratio), advantages, self.low, self.high)
        if self.dual is not None:
            losses = torch.where(advantages < 0, torch.minimum(losses, -self.dual * advantages), losses)
        return losses

    def metrics(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        ratio = ratio_of(log_ratio)
        metrics = _clip_shares(ratio, advantages, mask, self.low, self.high)
        if self.dual is not None:
            metrics["clip/dual"] = masked_mean(((ratio > self.dual) & (advantages < 0)).to(ratio.dtype), mask)
        return metrics


@dataclass(frozen=True, kw_only=True)
class CISPO(Surrogate):
    r"""REINFORCE whose importance weight is truncated, so that no token loses its gradient.

    .. math:: \ell_t = -\operatorname{sg}[\operatorname{clip}(\rho_t, \rho_{\min}, \rho_{\max})]\, A_t \log \pi(y_t)

    Metrics: ``clip/high``, the share of tokens whose weight is truncated, and with `min_ratio` ``clip/low``, the share
    whose weight is raised.

    Raises:
        ValueError: If a parameter is out of range.

    Example:
        >>> CISPO()(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), torch.tensor([[True]]),
        ...         old_log_probs=torch.tensor([[-1.0]]))
        tensor([[2.]])

    References:
        MiniMax-M1, arXiv:2506.13585, section 3.1; by default only the upper bound, as in its experiments.
    """

    name = "cispo"
    max_ratio: float = option(5.0, "Largest importance weight.", above=0.0)
    min_ratio: float = option(0.0, "Smallest importance weight, at most `max_ratio`; 0: no bound.", at_least=0.0)

    def losses(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio_of(log_ratio).clamp(self.min_ratio, self.max_ratio).detach() * advantages * log_probs

    def metrics(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        ratio = ratio_of(log_ratio)
        metrics = {"clip/high": masked_mean((ratio > self.max_ratio).to(ratio.dtype), mask)}
        if self.min_ratio > 0.0:
            metrics["clip/low"] = masked_mean((ratio < self.min_ratio).to(ratio.dtype), mask)
        return metrics

    def _check_together(self) -> None:
        super()._check_together()
        if self.min_ratio > self.max_ratio:
            raise OptionError(
                lambda named: (
                    f"{named('min_ratio')} must be at most {named('max_ratio')} {self.max_ratio}, got {self.min_ratio}"
                )
            )


@dataclass(frozen=True, kw_only=True)
class SAPO(Surrogate):
    r"""A soft gate in place of the clip.

    .. math:: \ell_t = -\frac{4}{k} \sigma(k (\rho_t - 1))\, A_t, \qquad
        k = k_+ \text{ where } A_t > 0,\ k_- \text{ elsewhere}

    Metric: ``gate/mean``, the mean slope of the gate, :math:`4 \sigma (1 - \sigma)`, which is 1 on policy and falls
    towards 0 where a clip would hold a token back.

    Raises:
        ValueError: If a parameter is out of range.

    Example:
        >>> SAPO()(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), torch.tensor([[True]]),
        ...        old_log_probs=torch.tensor([[-1.0]]))
        tensor([[-4.]])

    References:
        SAPO, arXiv:2511.20347.
    """

    name = "sapo"
    temperature_positive: float = option(1.0, "Sharpness of the gate where the advantage is positive.", above=0.0)
    temperature_negative: float = option(
        1.05, "Its sharpness elsewhere; larger forgets off-policy mistakes sooner.", above=0.0
    )

    def losses(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        temperature = self._temperature(advantages)
        gate = torch.sigmoid(temperature * (ratio_of(log_ratio) - 1.0)) * 4.0 / temperature
        return -gate * advantages

    def metrics(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        opened = torch.sigmoid(self._temperature(advantages) * (ratio_of(log_ratio) - 1.0))
        return {"gate/mean": masked_mean(4.0 * opened * (1.0 - opened), mask, empty=1.0)}

    def _temperature(self, advantages: Tensor) -> Tensor:
        return _by_sign(advantages, self.temperature_positive, self.temperature_negative)


@dataclass(frozen=True, kw_only=True)
class VESPO(Surrogate):
    r"""REINFORCE whose importance weight is that of the whole response, reshaped by a gamma kernel.

    .. math:: \ell_t = -\operatorname{sg}[\varphi(w)]\, A_t \log \pi(y_t), \qquad
        \varphi(w) = w^k e^{\lambda (1 - w)}, \qquad w = \prod_j \rho_j

    :math:`\varphi` is 1 on policy. It falls towards 0 where the response has become far likelier or far less likely,
    and is kept within :math:`e^{\pm 20}`. The shape :math:`k` and the rate :math:`\lambda` depend on the sign of the
    advantage. Token weights act on the gradient of each token.

    Metric: ``gate/mean``, the mean of :math:`\varphi` over tokens.

    Raises:
        ValueError: If a parameter is out of range.

    Example:
        >>> VESPO()(torch.tensor([[-1.0, -0.5]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[True, True]]),
        ...         old_log_probs=torch.tensor([[-1.0, -1.0]]))
        tensor([[0.7765, 0.3882]])

    References:
        VESPO, arXiv:2602.10693.
    """

    name = "vespo"
    is_sequence_level: ClassVar[bool] = True
    shape_positive: float = option(2.0, "Power of the ratio where the advantage is positive.", at_least=0.0)
    rate_positive: float = option(3.0, "How fast the kernel falls for large ratios there.", above=0.0)
    shape_negative: float = option(3.0, "Power of the ratio elsewhere.", at_least=0.0)
    rate_negative: float = option(2.0, "How fast the kernel falls for large ratios elsewhere.", above=0.0)

    def losses(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -self._gate(log_ratio, advantages).detach() * advantages * log_probs

    def metrics(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"gate/mean": masked_mean(self._gate(log_ratio, advantages), mask, empty=1.0)}

    def _gate(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        of_response = log_ratio.sum(1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        shape = _by_sign(advantages, self.shape_positive, self.shape_negative)
        rate = _by_sign(advantages, self.rate_positive, self.rate_negative)
        # expm1: near policy 1 - w would lose the digits that the rate multiplies.
        return ratio_of(shape * of_response - rate * torch.expm1(of_response))


@dataclass(frozen=True, kw_only=True)
class _SequenceClip(Surrogate):
    """What both variants of GSPO share: the clip widths, and the mean log-ratio of a response."""

    is_sequence_level: ClassVar[bool] = True
    low: float = option(
        0.2, "How far a ratio may fall below 1; GSPO's own width is far below PPO's, 3e-4.", at_least=0.0, below=1.0
    )
    high: float = option(0.2, "How far it may rise above 1; GSPO's own width is 4e-4.", at_least=0.0)

    def metrics(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        ratio = ratio_of(masked_mean(log_ratio, mask, dim=1)[:, None])
        return _clip_shares(ratio, advantages, mask, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class GSPOToken(_SequenceClip):
    r"""GSPO-token: the ratio of the sequence, with a gradient and an advantage per token.

    .. math:: \ell_t = -\min(\bar\rho_t A_t,\ \operatorname{clip}(\bar\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_t), \qquad
        \bar\rho_t = \operatorname{sg}\Bigl[\exp \frac{1}{|y|} \sum_j \log \rho_j\Bigr]
        \frac{\pi(y_t)}{\operatorname{sg}[\pi(y_t)]}

    Metrics: ``clip/low`` and ``clip/high``, the shares of tokens that the clip of their sequence holds back.

    Raises:
        ValueError: If a parameter is out of range.

    Example:
        >>> GSPOToken()(torch.tensor([[-1.0, -0.8]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]),
        ...             old_log_probs=torch.tensor([[-1.0, -1.0]]))
        tensor([[-1.1052, -2.2103]])

    References:
        GSPO, arXiv:2507.18071, eq. 13-14.
    """

    name = "gspo_token"

    def losses(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        of_sequence = masked_mean(log_ratio, mask, dim=1)[:, None].detach()
        ratio = ratio_of(of_sequence + log_ratio - log_ratio.detach())
        return _clipped(ratio, advantages, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class GSPO(_SequenceClip):
    r"""GSPO: one ratio and one advantage for the whole sequence.

    .. math:: \ell_t = -\min(\bar\rho A,\ \operatorname{clip}(\bar\rho, 1-\epsilon_l, 1+\epsilon_h) A), \qquad
        \bar\rho = \exp \frac{1}{|y|} \sum_j \log \rho_j

    Token weights have no effect here, because :math:`\bar\rho` moves all tokens of a response alike: only the mean of
    the weights would count, which is 1. Advantages that differ inside a response are refused on the CPU; on an
    accelerator this check would stall the step.
    Metrics: those of :class:`GSPOToken`.

    Raises:
        ValueError: If a parameter is out of range, or the advantages of a response differ (CPU, eager mode).

    Example:
        >>> GSPO()(torch.tensor([[-1.0, -0.8]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[True, True]]),
        ...        old_log_probs=torch.tensor([[-1.0, -1.0]]))
        tensor([[-2.2103, -2.2103]])

    References:
        GSPO, arXiv:2507.18071, eq. 5-7.
    """

    name = "gspo"
    is_one_ratio: ClassVar[bool] = True
    refusal_of_weights: ClassVar[str] = (
        "GSPO's sequence-level ratio moves every token of a response alike, so token weights of mean one have no "
        "effect: use surrogate='gspo_token', or strength=0"
    )

    def losses(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and advantages.device.type == "cpu":
            mean = masked_mean(advantages, mask, dim=1)[:, None]
            if ((advantages - mean).abs() > 1e-5 * mean.abs())[mask].any():
                raise ValueError(f"advantages differ inside a response; {self.refusal_of_weights}")
        return _clipped(ratio_of(masked_mean(log_ratio, mask, dim=1)[:, None]), advantages, self.low, self.high)
