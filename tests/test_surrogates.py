"""Surrogates: the reference, gradients, metrics of their own, what is refused, and how to add one."""

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import helpers
import pytest
import reference
import torch
from barred import barred_batches
from batches import batches
from helpers import as_lists, close
from hypothesis import given, settings
from torch.autograd import gradcheck

from srpo_core import LossOptions, SRPOConfig, grpo_loss, shared_baseline_weights
from srpo_core.checked import option
from srpo_core.surrogates import CISPO, GSPO, SAPO, VESPO, Clip, GSPOToken, Surrogate

SURROGATES = [*helpers.SURROGATES.values()]
TOKEN_WEIGHTED = [surrogate for surrogate in SURROGATES if not surrogate.is_one_ratio]


def each_of(surrogates):
    return pytest.mark.parametrize("surrogate", surrogates, ids=lambda surrogate: surrogate.name)


def parameters(surrogate):
    return {each.name: getattr(surrogate, each.name) for each in fields(surrogate) if each.init}


def losses_of(surrogate, batch, advantages=None):
    advantages = batch.token_advantages if advantages is None else advantages
    return surrogate(batch.log_probs, advantages, batch.mask, old_log_probs=batch.old_log_probs)


def inputs(batch):
    """In the order of the reference."""
    return as_lists(batch.log_probs, batch.old_log_probs, batch.token_advantages, batch.mask)


@each_of(SURROGATES)
@given(batch=batches())
def test_surrogates_equal_the_reference(batch, surrogate):
    for chosen in (type(surrogate)(), surrogate):
        expected = reference.surrogate(*inputs(batch), surrogate.name, **parameters(chosen))
        close(losses_of(chosen, batch), expected)


@each_of(SURROGATES)
@given(batch=batches())
def test_metrics_of_each_surrogate_equal_plain_loops(batch, surrogate):
    """Its own and no other's; with a spread at which every clip is reached."""
    batch = replace(batch, log_probs=batch.old_log_probs + 3.0 * (batch.log_probs - batch.old_log_probs))
    for chosen in (type(surrogate)(), surrogate):
        expected = reference.surrogate_metrics(*inputs(batch), surrogate.name, **parameters(chosen))
        args = (batch.log_probs.clone().requires_grad_(), batch.token_advantages, batch.mask)
        metrics = grpo_loss(*args, LossOptions(surrogate=chosen), old_log_probs=batch.old_log_probs).metrics
        of_every_loss = {"loss/policy", "ratio/mean", "ratio/min", "ratio/max", "kl/old"}
        assert metrics.keys() - of_every_loss == expected.keys()
        for name, value in expected.items():
            close(metrics[name], value)
            assert metrics[name].ndim == 0
            assert not metrics[name].requires_grad


@pytest.mark.parametrize(
    ("surrogate", "expected"),
    [
        # Ratios e^0.5, e^0.1, e^-0.5, e^-0.1 and e^2, the last two of negative advantage; sequence ratio e^0.4.
        (Clip(), {"clip/low": 0.0, "clip/high": 0.2}),
        (Clip(low=0.05, dual=3.0), {"clip/low": 0.2, "clip/high": 0.2, "clip/dual": 0.2}),
        (CISPO(), {"clip/high": 0.2}),
        (CISPO(max_ratio=1.01), {"clip/high": 0.6}),
        (CISPO(min_ratio=0.7), {"clip/high": 0.2, "clip/low": 0.2}),
        # The ratio of the response is e^2: e^(2k + rate (1 - e^2)), of which two have a negative advantage.
        (
            VESPO(rate_positive=0.5, rate_negative=0.25),
            {"gate/mean": (3 * math.exp(4 + 0.5 * (1 - math.exp(2))) + 2 * math.exp(6 + 0.25 * (1 - math.exp(2)))) / 5},
        ),
        (GSPOToken(), {"clip/low": 0.0, "clip/high": 0.6}),
    ],
)
def test_metrics_by_hand(surrogate, expected):
    log_ratio = torch.tensor([[0.5, 0.1, -0.5, -0.1, 2.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    metrics = surrogate.metrics(log_ratio, advantages, torch.ones(1, 5).bool())
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        close(metrics[name], value)


def test_gate_mean_of_sapo_is_one_on_policy_and_falls_off_it():
    advantages, mask = torch.ones(1, 2), torch.ones(1, 2).bool()
    assert SAPO().metrics(torch.zeros(1, 2), advantages, mask)["gate/mean"] == 1.0
    off = SAPO().metrics(torch.full((1, 2), 1.5), advantages, mask)["gate/mean"]
    gate = 1 / (1 + math.exp(-(math.exp(1.5) - 1)))
    close(off, 4 * gate * (1 - gate), rtol=1e-6)
    assert SAPO().metrics(torch.zeros(1, 2), advantages, ~mask)["gate/mean"] == 1.0


@each_of(TOKEN_WEIGHTED)
@given(batch=batches())
def test_a_weighted_advantage_is_a_weighted_loss(batch, surrogate):
    """Value, gradient and every clip mask, so nothing but the size of a token's update changes."""
    weights = shared_baseline_weights(batch.scores, batch.roles, batch.mask)
    log_probs = batch.log_probs.clone().requires_grad_()
    batch = replace(batch, log_probs=log_probs)
    plain = losses_of(surrogate, batch)
    weighted = losses_of(surrogate, batch, weights * batch.token_advantages)
    close(weighted, weights * plain.detach())
    (plain_gradient,) = torch.autograd.grad(plain.sum(), log_probs)
    (weighted_gradient,) = torch.autograd.grad(weighted.sum(), log_probs)
    close(weighted_gradient, weights * plain_gradient)


@each_of(SURROGATES)
def test_gradients_away_from_kinks(surrogate):
    g = torch.Generator().manual_seed(3)
    old = -torch.rand(3, 4, generator=g, dtype=torch.float64)
    log_probs = (old + 0.03 * torch.randn(3, 4, generator=g, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None].expand(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    if surrogate.name in ("cispo", "vespo", "gspo_token"):
        # Their values hold a stopped gradient: take the written derivative.
        loss = surrogate(log_probs, advantages, mask, old_log_probs=old)
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        log_ratio = torch.where(mask, log_probs.detach() - old, 0.0)
        if surrogate.name == "cispo":
            ratio = log_ratio.exp().clamp(surrogate.min_ratio, surrogate.max_ratio)
        elif surrogate.name == "vespo":
            w = log_ratio.sum(1).exp()[:, None]
            up = w**surrogate.shape_positive * (surrogate.rate_positive * (1 - w)).exp()
            down = w**surrogate.shape_negative * (surrogate.rate_negative * (1 - w)).exp()
            ratio = torch.where(advantages > 0, up, down)
        else:
            ratio = (log_ratio.sum(1) / mask.sum(1)).exp()[:, None]
        close(gradient, torch.where(mask, -ratio * advantages, 0.0))
    else:
        assert gradcheck(lambda x: surrogate(x, advantages, mask, old_log_probs=old), (log_probs,))


def test_cispo_raises_a_small_weight_to_its_lower_bound_by_hand():
    log_probs = torch.tensor([[-3.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0, -1.0, -4.0]], dtype=torch.float64)
    losses = CISPO(min_ratio=0.5, max_ratio=2.0)(log_probs, torch.ones_like(old), old < 0, old_log_probs=old)
    losses.sum().backward()
    assert losses.tolist() == [[1.5, 1.0, 2.0]]
    assert log_probs.grad.tolist() == [[-0.5, -1.0, -2.0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_vespo_weighs_a_response_by_the_product_of_its_ratios_by_hand(sign):
    """Ratios 2 and 3/4, so w is 3/2; on policy the weight is exactly 1."""
    old = torch.tensor([[-2.0, -1.0, math.nan], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    gone = torch.tensor([[2.0, 0.75, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    log_probs, mask = (old + gone).requires_grad_(), ~old.isnan()
    losses = VESPO()(log_probs, torch.full_like(old, sign), mask, old_log_probs=old)
    (slopes,) = torch.autograd.grad(losses.sum(), log_probs)
    phi = 1.5**2 * math.exp(3 * -0.5) if sign > 0 else 1.5**3 * math.exp(2 * -0.5)
    close(slopes, [[-sign * phi, -sign * phi, 0.0], [-sign] * 3])
    close(losses, torch.where(mask, slopes * log_probs.detach(), 0.0))


def test_vespo_of_a_response_that_has_moved_far_is_almost_0_in_either_direction():
    for nats in (-30.0, 30.0):
        weight = VESPO().metrics(torch.full((1, 3), nats), torch.ones(1, 3), torch.ones(1, 3).bool())["gate/mean"]
        close(weight, math.exp(-20), rtol=1e-6)


@given(batch=batches())
def test_bounds_that_are_off_leave_cispo_as_it_was_bit_for_bit(batch):
    """The formula without a lower bound, in float32."""
    batch = replace(batch, log_probs=batch.log_probs.float(), old_log_probs=batch.old_log_probs.float())
    advantages = batch.token_advantages.float()
    log_ratio = torch.where(batch.mask, batch.log_probs - batch.old_log_probs, 0.0)
    log_probs, credit = (torch.where(batch.mask, each, 0.0) for each in (batch.log_probs, advantages))
    expected = -log_ratio.clamp(-20, 20).exp().clamp(max=5.0) * credit * log_probs
    assert torch.equal(losses_of(CISPO(), batch, advantages), expected)


def test_clipped_tokens_have_no_gradient_and_the_dual_clip_frees_runaway_ones():
    log_probs = torch.tensor([[0.5, -0.5, 0.5, -0.5, 2.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0]])
    losses = Clip(dual=3.0)(log_probs, advantages, torch.ones(1, 5).bool(), old_log_probs=torch.zeros(1, 5))
    losses.sum().backward()
    assert (log_probs.grad != 0).tolist() == [[False, True, True, False, False]]
    assert losses[0, 4].item() == 3.0


@each_of(TOKEN_WEIGHTED)
def test_runaway_ratios_saturate(surrogate):
    log_probs = torch.tensor([[500.0, -500.0]], requires_grad=True)
    losses = surrogate(log_probs, -torch.ones(1, 2), torch.ones(1, 2).bool(), old_log_probs=torch.zeros(1, 2))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert log_probs.grad.isfinite().all()


# Barred tokens: a log-prob of minus infinity


@each_of(SURROGATES)
@given(batch=barred_batches())
def test_surrogates_of_barred_tokens_equal_the_reference(batch, surrogate):
    """Value, slope and metrics: barred by both policies, by one or the other, with advantages of either sign."""
    for chosen in (type(surrogate)(), surrogate):
        args, given_ = inputs(batch), parameters(chosen)
        log_probs = batch.log_probs.clone().requires_grad_()
        losses = losses_of(chosen, replace(batch, log_probs=log_probs))
        close(losses, reference.surrogate(*args, chosen.name, **given_))
        (slopes,) = torch.autograd.grad(losses.sum(), log_probs)
        close(slopes, reference.surrogate_slopes(*args, chosen.name, **given_))
        barred = batch.mask & (batch.log_probs.isneginf() | batch.old_log_probs.isneginf())
        assert (slopes[barred] == 0).all()
        options = LossOptions(surrogate=chosen)
        metrics = grpo_loss(
            batch.log_probs, batch.token_advantages, batch.mask, options, old_log_probs=batch.old_log_probs
        ).metrics
        for name, value in reference.surrogate_metrics(*args, chosen.name, **given_).items():
            close(metrics[name], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("surrogate", "loss"),
    # CISPO: -(1 * -1 + 0 + 1 * -2) / 3; SAPO: its gate at ratio 1 is 4 * 1/2.
    [(Clip(), -1.0), (CISPO(), 1.0), (SAPO(), -2.0), (VESPO(), 1.0), (GSPO(), -1.0), (GSPOToken(), -1.0)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_token_that_both_policies_bar_by_hand(surrogate, loss, dtype):
    old = torch.tensor([[-1.0, -math.inf, -2.0]], dtype=dtype)
    log_probs, mask = old.clone().requires_grad_(), torch.ones(1, 3).bool()
    actual, metrics = grpo_loss(
        log_probs, torch.ones_like(old), mask, LossOptions(surrogate=surrogate), old_log_probs=old
    )
    actual.backward()
    assert actual.item() == pytest.approx(loss, abs=1e-6)
    third = pytest.approx(-1 / 3, rel=1e-2 if dtype.itemsize == 2 else 1e-6)
    assert log_probs.grad.tolist() == [[third, 0.0, third]]
    assert metrics["ratio/mean"] == metrics["ratio/min"] == metrics["ratio/max"] == 1.0
    assert metrics["kl/old"] == 0.0


@pytest.mark.parametrize(
    ("new", "old", "advantage", "loss"),
    [
        (-math.inf, -1.0, 2.0, -2.0 * math.exp(-20)),
        (-math.inf, -1.0, -2.0, 2.0 * 0.8),
        (-1.0, -math.inf, 2.0, -2.0 * 1.2),
        (-1.0, -math.inf, -2.0, 2.0 * math.exp(20)),
    ],
)
def test_a_token_that_one_policy_bars_by_hand(new, old, advantage, loss):
    """The ratio saturates at e^-20 or e^20, as that of any other runaway token does."""
    log_probs = torch.tensor([[new, -1.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[advantage, 1.0]], dtype=torch.float64)
    other = torch.tensor([[old, -1.0]], dtype=torch.float64)
    losses = Clip()(log_probs, advantages, torch.ones(1, 2).bool(), old_log_probs=other)
    losses.sum().backward()
    close(losses, [[loss, -1.0]])
    assert log_probs.grad.tolist() == [[0.0, -1.0]]


@each_of(SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_lowest_number_of_a_dtype_bars_a_token_as_minus_infinity_does(surrogate, dtype):
    """Trainers fill masked logits with either; a temperature or a normalizer moves the lowest number a little."""

    def result(value):
        new, old = (
            torch.tensor([row], dtype=dtype) for row in ([value, value, -2.0, -1.5], [value, -1.0, value, -1.6])
        )
        new.requires_grad_()
        losses = surrogate(new, torch.full_like(old, -1.0), torch.ones(1, 4).bool(), old_log_probs=old)
        losses.sum().backward()
        return losses.detach(), new.grad

    expected = result(-math.inf)
    assert all(each.isfinite().all() for each in expected)
    for value in (torch.finfo(dtype).min, 0.7 * max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)):
        for actual, wanted in zip(result(value), expected, strict=True):
            assert torch.equal(actual, wanted)


@each_of(SURROGATES)
@pytest.mark.parametrize("name", ["log_probs", "old_log_probs"])
@pytest.mark.parametrize("others", [-1.0, -math.inf, math.inf])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_plus_infinity_is_no_log_probability_and_makes_the_loss_nan(surrogate, name, others, advantage):
    tensors = dict.fromkeys(("log_probs", "old_log_probs"), torch.tensor([[others, -1.0]]))
    tensors[name] = torch.tensor([[math.inf, -1.0]])
    assert surrogate(advantages=torch.full((1, 2), advantage), mask=torch.ones(1, 2).bool(), **tensors)[0, 0].isnan()
    padding = torch.tensor([[False, True]])
    assert surrogate(advantages=torch.full((1, 2), advantage), mask=padding, **tensors).isfinite().all()


def test_gspo_refuses_token_advantages_and_says_why():
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match=r"advantages differ inside a response; GSPO's sequence-level .*gspo_token"):
        GSPO()(zeros, torch.tensor([[1.5, 0.5]]), mask, old_log_probs=zeros)
    assert GSPO()(zeros, torch.tensor([[1.5, 0.5]]), torch.tensor([[True, False]]), old_log_probs=zeros)[0, 1] == 0


@each_of(TOKEN_WEIGHTED)
@pytest.mark.parametrize("name", ["advantages", "old_log_probs"])
def test_exchanged_tensors_raise_instead_of_training_nothing(surrogate, name):
    """All three have one shape and dtype; what tells them apart is which one has a gradient."""
    policy, other, mask = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2), torch.ones(1, 2).bool()
    tensors = {"log_probs": other, "advantages": other, "old_log_probs": other} | {name: policy}
    with pytest.raises(ValueError, match=f"^{name} requires a gradient and log_probs does not"):
        surrogate(mask=mask, **tensors)
    with torch.no_grad():  # evaluation trains nothing anyway
        surrogate(mask=mask, **tensors)
    both = {"log_probs": torch.zeros(1, 2, requires_grad=True), "advantages": other, "old_log_probs": other}
    surrogate(mask=mask, **(both | {name: policy})).sum().backward()
    assert policy.grad is None  # only the policy being trained gets one


# One of your own


@pytest.fixture
def registry(monkeypatch):
    """What a test defines is forgotten afterwards."""
    monkeypatch.setattr(Surrogate, "_by_name", Surrogate.known())


@pytest.fixture
def leaky(registry):
    """A toy with one parameter: a clip that lets a share of the gradient through."""

    @dataclass(frozen=True, kw_only=True)
    class Leaky(Surrogate):
        name = "leaky"
        leak: float = option(0.1, "Share of the loss that no clip takes.", at_least=0.0, at_most=1.0)

        def losses(self, log_ratio, log_probs, advantages, mask):
            ratio = log_ratio.exp()
            clipped = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            return self.leak * (-ratio * advantages) + (1.0 - self.leak) * clipped

    return Leaky


def test_a_subclass_is_all_that_a_surrogate_with_a_parameter_takes(leaky):
    tight = SRPOConfig(surrogate={"name": "leaky", "leak": 0.0}, reduction="sum")
    assert tight.surrogate == leaky(leak=0.0)

    @settings(max_examples=10)
    @given(batch=batches())
    def check(batch):
        def loss_of(options):
            args = (batch.log_probs, batch.token_advantages, batch.mask)
            return grpo_loss(*args, options, old_log_probs=batch.old_log_probs)

        loss, metrics = loss_of(tight)
        close(loss, loss_of(LossOptions(reduction="sum")).loss)
        assert "clip/high" not in metrics
        half, open_ = (loss_of(replace(tight, surrogate=leaky(leak=leak))).loss for leak in (0.5, 1.0))
        close(half, 0.5 * (loss + open_))

    check()


def test_a_surrogate_of_the_user_is_known_by_its_name_and_checked(leaky):
    assert LossOptions(surrogate="leaky").surrogate == leaky()
    assert Surrogate.known()["leaky"] is leaky
    with pytest.raises(ValueError, match=r"^surrogate.leak must be in \[0, 1\], got 2"):
        LossOptions(surrogate={"name": "leaky", "leak": 2})
    with pytest.raises(ValueError, match="^surrogate must be one of 'clip', .*'leaky'"):
        LossOptions(surrogate="leeky")


def test_a_surrogate_of_the_user_sees_no_infinity(registry):
    """So REINFORCE in one line is right at barred tokens as well."""

    @dataclass(frozen=True, kw_only=True)
    class Reinforce(Surrogate):
        name = "reinforce"

        def losses(self, log_ratio, log_probs, advantages, mask):
            return -log_ratio.detach().exp() * advantages * log_probs

    inf = math.inf
    log_probs = torch.tensor([[-1.0, -inf, -inf, -0.5, math.nan]], requires_grad=True)
    old = torch.tensor([[-1.0, -inf, -1.0, -inf, math.nan]])
    mask = torch.tensor([[True, True, True, True, False]])
    losses = Reinforce()(log_probs, torch.ones(1, 5), mask, old_log_probs=old)
    losses.sum().backward()
    close(losses, [[1.0, 0.0, 0.0, 0.5 * math.exp(20), 0.0]], rtol=1e-6)
    assert log_probs.grad.tolist() == [[-1.0, 0.0, 0.0, 0.0, 0.0]]


def test_the_fixture_forgets_what_a_test_defines():
    assert "leaky" not in Surrogate.known()


def test_a_variant_that_inherits_a_name_does_not_take_its_place(registry):
    class Halved(Clip):
        def losses(self, *args):
            return 0.5 * super().losses(*args)

    assert LossOptions(surrogate="clip").surrogate == Clip()
    assert type(LossOptions(surrogate=Halved()).surrogate) is Halved


def test_known_is_a_copy():
    Surrogate.known().clear()
    assert Surrogate.known().keys() >= {surrogate.name for surrogate in SURROGATES}


def test_the_base_has_no_losses(registry):
    class Unfinished(Surrogate):
        name: ClassVar[str] = "unfinished"  # type: ignore[misc]

    zeros = torch.zeros(1, 2)
    with pytest.raises(NotImplementedError):
        LossOptions(surrogate="unfinished").surrogate(zeros, zeros, zeros.bool(), old_log_probs=zeros)
