"""The fused losses: the logits variant and the float64 reference, chunks, padding, precision, memory, compilation."""

import math
import threading
from dataclasses import dataclass, field, fields, replace

import pytest
import reference
import torch
from helpers import SURROGATES, close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from srpo_core import (
    OutputLayer,
    fused_linear_grpo_loss,
    fused_linear_log_probs,
    grpo_loss,
    role_advantages,
    shared_baseline_weights,
    srpo_advantages,
    srpo_loss,
    token_divergence,
    token_log_probs,
)
from srpo_core.fused import fused_linear_divergence, fused_linear_log_probs_and_entropy
from srpo_core.log_probs import token_entropy
from srpo_core.options import LossOptions, SRPOConfig
from srpo_core.output_layer import VocabShard

DEFAULTS = LossOptions()
TOKEN_RATIO = ["clip", "cispo", "sapo"]
REDUCTIONS = ["token_mean", "sequence_mean", "sequence_sum", "constant", "sum"]
surrogates = pytest.mark.parametrize("name", SURROGATES)


@dataclass
class Problem:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    advantages: torch.Tensor  # one per response
    mask: torch.Tensor
    of_logits: dict = field(default_factory=dict)  # temperature, logit_softcap, logit_scale

    @property
    def output(self):
        return OutputLayer(self.weight, bias=self.bias, **self.of_logits)

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    @property
    def temperature(self):
        return self.of_logits.get("temperature", 1.0)

    @property
    def token_advantages(self):
        return torch.where(self.mask, self.advantages[:, None], torch.nan)

    def logits(self, dtype=torch.float64, hidden=None):
        """As a model would compute them; padding made harmless, as a model's output is."""
        hidden = self.hidden if hidden is None else hidden
        logits = torch.where(self.mask[..., None], hidden.to(dtype), 0.0) @ self.weight.to(dtype).T
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        logits = logits * self.of_logits.get("logit_scale", 1.0)
        cap = self.of_logits.get("logit_softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def ids(self):
        return torch.where(self.mask, self.token_ids, 0)

    def log_probs(self, dtype=torch.float64):
        return token_log_probs(self.logits(dtype), self.ids(), temperature=self.temperature)

    def fused(self, options=None, *, advantages=None, **how):
        return fused_linear_grpo_loss(
            self.hidden,
            self.output,
            self.token_ids,
            self.token_advantages if advantages is None else advantages,
            self.mask,
            DEFAULTS if options is None else options,  # no default: torch 2.11 cannot trace that of a method
            old_log_probs=self.old,
            ref_log_probs=self.ref,
            **how,
        )

    def fused_log_probs(self, **how):
        return fused_linear_log_probs(self.hidden, self.output, self.token_ids, self.mask, **how)

    def fused_entropy(self, **how):
        return fused_linear_log_probs_and_entropy(self.hidden, self.output, self.token_ids, self.mask, **how)

    def plain(self, options=DEFAULTS, *, dtype=torch.float64, normalizer=None):
        return grpo_loss(
            self.log_probs(dtype),
            self.token_advantages,
            self.mask,
            options,
            old_log_probs=self.old,
            ref_log_probs=self.ref,
            normalizer=normalizer,
        )


def problem(
    seed=0,
    batch=3,
    time=5,
    width=8,
    vocab=37,
    *,
    dtype=torch.float64,
    spread=1.0,
    real=0.7,
    bias=True,
    off_policy=0.2,
    temperature=0.8,
    softcap=None,
    scale=1.0,
):
    """A small model's last layer: NaN under the mask, ids there that no vocabulary has."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.rand(batch, time, generator=g) < real
    hidden = torch.where(mask[..., None], randn(batch, time, width), torch.nan).to(dtype).requires_grad_()
    made = Problem(
        hidden,
        (spread * randn(vocab, width)).to(dtype).requires_grad_(),
        randn(vocab).to(dtype).requires_grad_() if bias else None,
        torch.where(mask, torch.randint(vocab, (batch, time), generator=g), -100),
        mask,
        mask,
        randn(batch).to(dtype),
        mask,
        {"temperature": temperature, "logit_softcap": softcap, "logit_scale": scale},
    )
    log_probs = made.log_probs().detach()
    made.old, made.ref = (torch.where(mask, log_probs + off_policy * randn(batch, time), torch.nan) for _ in range(2))
    return made


@st.composite
def problems(draw):
    shape = [draw(st.integers(low, high)) for low, high in ((1, 4), (1, 6), (1, 9), (1, 40))]
    return problem(
        draw(st.integers(0, 2**32 - 1)),
        *shape,
        spread=draw(st.sampled_from([0.0, 1.0, 8.0])),
        real=draw(st.sampled_from([0.0, 0.5, 1.0])),
        bias=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 0.7])),
        softcap=draw(st.sampled_from([None, 3.0])),
        scale=draw(st.sampled_from([1.0, 0.25])),
    )


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


@surrogates
@settings(max_examples=25)
@given(
    made=problems(),
    chunk=st.sampled_from([1, 2, 3, 7, 100]),
    reduction=st.sampled_from(REDUCTIONS),
    kl=st.sampled_from([(0.0, "k3"), (0.1, "k3"), (0.1, "k2"), (0.1, "k1"), (0.1, "abs")]),
    correction=st.sampled_from(["none", "ratio"]),
    threshold=st.sampled_from([None, None, 0.0, 0.05]),
)
def test_fused_linear_grpo_loss_equals_the_logits_variant(made, name, chunk, reduction, kl, correction, threshold):
    """Loss, every metric and every gradient, whatever the shape, the chunks and the options; NaN under the mask."""
    options = LossOptions(
        surrogate=SURROGATES[name],
        kl_coef=kl[0],
        kl_estimator=kl[1],
        kl_correction=correction,
        off_policy_threshold=threshold,
        reduction=reduction,
    )
    normalizer = 7.0 if reduction == "constant" else None
    loss, metrics = made.plain(options, normalizer=normalizer)
    fused = made.fused(options, normalizer=normalizer, chunk_tokens=chunk)
    close(fused.loss, loss)
    assert fused.metrics.keys() == metrics.keys()
    for key, value in metrics.items():
        close(fused.metrics[key], value)
    for actual, expected in zip(gradients(fused.loss, made.leaves), gradients(loss, made.leaves), strict=True):
        close(actual, expected)


@surrogates
@given(made=problems(), reduction=st.sampled_from(["token_mean", "sequence_mean"]))
@settings(max_examples=15)
def test_fused_linear_grpo_loss_equals_the_reference(made, name, reduction):
    """Against plain loops from the hidden states on, which share no code with the package."""
    temperature, cap, scale = made.of_logits.values()
    log_probs = []
    for hidden, ids, mask in zip(made.hidden.tolist(), made.token_ids.tolist(), made.mask.tolist(), strict=True):
        row = []
        for state, token, real in zip(hidden, ids, mask, strict=True):
            if not real:
                row.append(0.0)
                continue
            logits = [math.fsum(x * w for x, w in zip(state, column, strict=True)) for column in made.weight.tolist()]
            if made.bias is not None:
                logits = [z + b for z, b in zip(logits, made.bias.tolist(), strict=True)]
            logits = [scale * z for z in logits]
            if cap is not None:
                logits = [cap * math.tanh(z / cap) for z in logits]
            top = max(logits)
            total = math.fsum(math.exp((z - top) / temperature) for z in logits)
            row.append((logits[token] - top) / temperature - math.log(total))
        log_probs.append(row)
    lists = [x.tolist() for x in (made.old, made.token_advantages, made.mask)]
    parameters = {each.name: getattr(SURROGATES[name], each.name) for each in fields(SURROGATES[name]) if each.init}
    policy = reference.surrogate(log_probs, *lists, name, **parameters)
    penalty = reference.kl_penalty(log_probs, made.ref.tolist(), lists[2])
    summed = [reference.aggregate(losses, lists[2], reduction) for losses in (policy, penalty)]
    options = LossOptions(surrogate=SURROGATES[name], kl_coef=0.2, reduction=reduction)
    close(made.fused(options, chunk_tokens=3).loss, summed[0] + 0.2 * summed[1], atol=1e-10)


class AtOnce(torch.autograd.Function):
    """Lets gradcheck go backward as often as it likes: the fused loss itself refuses the second time."""

    @staticmethod
    def forward(ctx, loss_of, *leaves):
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            loss = loss_of(*leaves)
        ctx.gradients = torch.autograd.grad(loss, leaves)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad_loss):
        return None, *(grad_loss * gradient for gradient in ctx.gradients)


@pytest.mark.parametrize("more", [{}, {"kl_correction": "ratio", "off_policy_threshold": 0.0}], ids=["", "corrected"])
@pytest.mark.parametrize("name", ["clip", "sapo", "gspo"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(name, softcap, more):
    made = problem(1, 2, 3, 3, 5, off_policy=0.03, real=0.8, softcap=softcap, scale=0.5)
    made.hidden = torch.where(made.mask[..., None], made.hidden.detach(), 0.5).requires_grad_()

    def loss(*leaves):
        made.hidden, made.weight, made.bias = leaves
        return made.fused(LossOptions(surrogate=name, kl_coef=0.1, **more), chunk_tokens=3).loss

    assert gradcheck(lambda *leaves: AtOnce.apply(loss, *leaves), (made.hidden, made.weight, made.bias))


@pytest.mark.parametrize("name", ["cispo", "vespo", "gspo_token"])
def test_gradients_of_losses_with_a_stopped_ratio(name):
    """Their value is not their primitive, so gradcheck cannot: differences of the log-probs instead."""
    made = problem(1, 2, 3, 3, 5, off_policy=0.03)
    old = torch.where(made.mask, made.old, 0.0)
    log_ratio = torch.where(made.mask, made.log_probs().detach() - old, 0.0)
    if name == "cispo":
        ratio = log_ratio.exp().clamp(max=5.0)
    elif name == "vespo":
        w = log_ratio.sum(1).exp()
        ratio = torch.where(made.advantages > 0, w**2 * (3 - 3 * w).exp(), w**3 * (2 - 2 * w).exp())[:, None]
    else:
        ratio = (log_ratio.sum(1) / made.mask.sum(1).clamp(min=1)).exp()[:, None]
    share = torch.where(made.mask, -ratio * made.advantages[:, None], 0.0) / made.mask.sum()
    actual = gradients(made.fused(LossOptions(surrogate=name), chunk_tokens=3).loss, [made.hidden])[0]
    step = 1e-6
    for i in made.hidden.isfinite().nonzero().tolist():
        place, ends = tuple(i), []
        for sign in (1, -1):
            shifted = made.hidden.detach().clone()
            shifted[place] += sign * step
            with torch.no_grad():
                ends.append(replace(made, hidden=shifted).fused_log_probs())
        expected = (share * (ends[0] - ends[1])).sum() / (2 * step)
        close(actual[place], expected, rtol=1e-6, atol=1e-9)


@given(made=problems(), chunk=st.sampled_from([1, 4, 100]))
def test_fused_linear_log_probs_and_entropy_equal_those_of_the_logits(made, chunk):
    log_probs = made.fused_log_probs(chunk_tokens=chunk)
    expected = torch.where(made.mask, made.log_probs(), 0.0)
    close(log_probs, expected, rtol=1e-11)
    assert (log_probs <= 0).all()
    both = made.fused_entropy(chunk_tokens=chunk)
    assert torch.equal(both.log_probs, log_probs)
    entropy = token_entropy(made.logits(), temperature=made.temperature)
    close(both.entropy, torch.where(made.mask, entropy, 0.0).detach(), atol=1e-10)
    assert not both.entropy.requires_grad
    seed = torch.randn(log_probs.shape, dtype=torch.float64)
    for actual, wanted in zip(
        torch.autograd.grad(log_probs, made.leaves, seed, retain_graph=True),
        torch.autograd.grad(expected, made.leaves, seed),
        strict=True,
    ):
        close(actual, wanted, rtol=1e-11)


@pytest.mark.parametrize(("kind", "top_k"), [("full_kl", 64), ("reverse_kl", 64), ("jsd", 64), ("topk_kl", 3)])
@given(made=problems(), chunk=st.sampled_from([1, 4, 100]))
def test_fused_linear_divergence_equals_that_of_the_logits(made, chunk, kind, top_k):
    g = torch.Generator().manual_seed(7)
    other = torch.randn(made.hidden.shape, generator=g, dtype=torch.float64)
    other = torch.where(made.mask[..., None], other, torch.nan)
    actual = fused_linear_divergence(
        made.hidden, made.output, made.mask, other_hidden=other, kind=kind, top_k=top_k, chunk_tokens=chunk
    )
    logits, other_logits = (made.logits(hidden=hidden).detach() for hidden in (made.hidden, other))
    expected = token_divergence(logits, other_logits=other_logits, kind=kind, top_k=top_k, temperature=made.temperature)
    close(actual, torch.where(made.mask, expected, 0.0), atol=1e-10)
    assert (actual >= 0).all()
    assert not actual.requires_grad


def test_fused_linear_divergence_of_a_known_number_of_tokens():
    made = problem(7)
    other = torch.where(made.mask[..., None], 0.5, torch.nan).double() * torch.ones_like(made.hidden)
    plain = fused_linear_divergence(made.hidden, made.output, made.mask, other_hidden=other)
    for count in (int(made.mask.sum()), made.mask.numel()):
        some = fused_linear_divergence(
            made.hidden, made.output, made.mask, other_hidden=other, active_tokens=count, chunk_tokens=4
        )
        close(some, plain)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [0.0625, 3.0])
def test_a_logit_scale_is_a_scaled_model(bias, softcap, scale):
    """It stands between the linear layer and the cap, so scaling weight and bias by hand is the same."""
    made = problem(21, bias=bias, softcap=softcap, scale=scale)
    by_hand = replace(
        made,
        weight=(scale * made.weight.detach()).requires_grad_(),
        bias=(scale * made.bias.detach()).requires_grad_() if bias else None,
        of_logits=made.of_logits | {"logit_scale": 1.0},
    )
    close(made.fused_log_probs(), by_hand.fused_log_probs(), rtol=1e-11)
    close(made.fused_entropy().entropy, by_hand.fused_entropy().entropy, rtol=1e-11)
    options = LossOptions(kl_coef=0.1)
    loss, expected = made.fused(options).loss, by_hand.fused(options).loss
    close(loss, expected, rtol=1e-11)
    of_hidden, *of_output = gradients(loss, made.leaves)
    expected_of_hidden, *expected_of_output = gradients(expected, by_hand.leaves)
    close(of_hidden, expected_of_hidden, rtol=1e-11)
    for actual, wanted in zip(of_output, expected_of_output, strict=True):
        close(actual, scale * wanted, rtol=1e-11)
    # And it is not a no-op.
    assert (made.fused_log_probs() - replace(by_hand, weight=made.weight).fused_log_probs()).abs().max() > 0.01


# Precision: errors relative to float64


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@surrogates
def test_float32_is_within_5e_6_of_float64_or_as_close_as_float32_logits_come(name, spread):
    made = problem(3, 4, 24, 64, 1000, dtype=torch.float32, spread=spread)
    options = LossOptions(surrogate=SURROGATES[name], kl_coef=0.05)
    truth, naive = made.plain(options).loss, made.plain(options, dtype=torch.float32).loss
    fused = made.fused(options, chunk_tokens=20).loss
    close(fused.double(), truth, rtol=1e-4, atol=1e-5)
    for actual, expected, logits in zip(*(gradients(x, made.leaves) for x in (fused, truth, naive)), strict=True):
        expected = expected.double()
        assert relative_error(actual, expected) < max(5e-6, 1.5 * relative_error(logits, expected))


def test_a_sure_token_keeps_its_gradient_in_float32():
    """At p = 1 - 1e-9 a derivative of P - 1 is rounding; the sum of the others is not."""
    weight = torch.zeros(50, 2)
    weight[7, 0] = 1.0
    hidden = torch.tensor([[[24.6, 1.0]]])
    zero = torch.zeros(1, 1)
    made = Problem(hidden, weight, None, torch.tensor([[7]]), zero, zero, torch.ones(1), torch.ones(1, 1).bool())
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = gradients(made.plain().loss, made.leaves)
    for actual, wanted in zip(gradients(made.fused().loss, made.leaves), expected, strict=True):
        assert wanted.norm() < 1e-6
        # Float32 holds the log-sum-exp, 24.6, to 16 eps: so much of a probability of 1e-9 is rounding.
        assert relative_error(actual, wanted.double()) < 16 * torch.finfo(torch.float32).eps


@surrogates
def test_bfloat16_rows_are_within_1_percent(name):
    made = problem(3, 4, 24, 64, 1000, dtype=torch.bfloat16, spread=0.5)
    options = LossOptions(surrogate=SURROGATES[name], kl_coef=0.05)
    loss, _ = made.plain(options)
    fused = made.fused(options, chunk_tokens=10)
    for actual, expected in zip(gradients(fused.loss, made.leaves), gradients(loss, made.leaves), strict=True):
        expected = expected.double().flatten(0, -2) if expected.ndim > 1 else expected.double()[None]
        actual = actual.double().view(expected.shape)
        # Rows that are nothing but cancellation are left out: their size is that of the rounding of their terms.
        large = expected.norm(dim=1) > 1e-2 * expected.norm(dim=1).max()
        assert ((actual - expected).norm(dim=1) / expected.norm(dim=1))[large].max() < 1e-2


def test_bfloat16_log_probs_come_from_float32_logits():
    made = problem(3, 4, 24, 64, 1000, dtype=torch.bfloat16, spread=1.0, bias=False)
    truth = torch.where(made.mask, made.log_probs(), 0.0).detach()
    ours = made.fused_log_probs()
    naive_logits = torch.where(made.mask[..., None], made.hidden, 0.0) @ made.weight.T
    naive = torch.where(made.mask, token_log_probs(naive_logits, made.ids(), temperature=0.8), 0.0)
    assert (ours - truth).abs().max() < 2e-5 * truth.abs().max()
    assert (naive - truth).abs().max() > 100 * (ours - truth).abs().max()
    if hasattr(torch.backends.mkldnn, "matmul"):  # from torch 2.9
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_float16_gradients_do_not_underflow():
    made = problem(3, 2, 6, 16, 300, dtype=torch.float16, spread=0.3)
    options = LossOptions(reduction="constant")
    loss, _ = made.plain(options, normalizer=1e9)
    ours = made.fused(options, normalizer=1e9)
    scale = 2.0**24
    for actual, expected in zip(
        gradients(ours.loss * scale, made.leaves), gradients(loss * scale, made.leaves), strict=True
    ):
        assert actual.dtype == torch.float16
        assert relative_error(actual, expected.double()) < 1e-2


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_little(offset):
    made = problem(4, dtype=torch.float64)
    shifted = replace(made, bias=made.bias + offset).fused_log_probs()
    close(shifted, made.fused_log_probs(), atol=1e-9)
    assert (shifted <= 0).all()


def test_extreme_logits_are_finite_and_exact():
    """Probabilities beyond float32's smallest number, tokens that are barred, and a vocabulary of one."""
    hidden, mask = torch.ones(1, 3, 1), torch.ones(1, 3).bool()
    steep = OutputLayer(torch.tensor([[400.0], [0.0], [-900.0], [0.0]]))
    assert fused_linear_log_probs(hidden, steep, torch.tensor([[1, 2, 0]]), mask).tolist() == [[-400.0, -1300.0, 0.0]]
    weight = torch.zeros(3, 1, requires_grad=True)
    barred = OutputLayer(weight, bias=torch.tensor([0.0, 0.0, -math.inf]))
    both = fused_linear_log_probs_and_entropy(hidden, barred, torch.tensor([[0, 1, 0]]), mask)
    close(both.log_probs, torch.full((1, 3), -math.log(2)), rtol=1e-6, atol=0)
    close(both.entropy, torch.full((1, 3), math.log(2)), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(both.log_probs.sum(), weight)
    assert gradient.isfinite().all()
    alone = fused_linear_log_probs_and_entropy(hidden, OutputLayer(torch.ones(1, 1)), torch.zeros(1, 3).long(), mask)
    assert alone.log_probs.tolist() == alone.entropy.tolist() == [[0.0, 0.0, 0.0]]


# Barred tokens: logits of minus infinity, and log-probs of minus infinity under the other policies


def barred_problem(seed=45, batch=4, time=9, value=-math.inf, **how):
    """A third of the vocabulary is barred by the bias; some sampled tokens are, and some by the other policies."""
    made = problem(seed, batch, time, vocab=36, **{"bias": True, "spread": 0.5} | how)
    g = torch.Generator().manual_seed(seed)

    def some(share):
        return made.mask & (torch.rand(made.mask.shape, generator=g) < share)

    made.bias = made.bias.detach().index_fill(0, torch.arange(0, 36, 3), value).requires_grad_()
    allowed = made.token_ids - made.token_ids.remainder(3) + 1
    made.token_ids = torch.where(made.mask, torch.where(some(0.3), allowed - 1, allowed), -100)
    by_policy = made.mask & (made.token_ids.remainder(3) == 0)
    log_probs = torch.where(by_policy, -2.0, made.log_probs().detach() + 0.1)
    # Of what the policy bars another one bars the half, and few others: each is a factor of e^20 to GSPO's mean.
    made.old, made.ref = (
        torch.where(made.mask, log_probs, torch.nan).masked_fill((by_policy & some(0.5)) | some(0.1), value)
        for _ in range(2)
    )
    return made


def barred_tokens(made):
    """By the policy, and by it or the one that sampled."""
    by_policy = made.mask & (made.token_ids.remainder(3) == 0)
    return by_policy, by_policy | (made.mask & made.old.isneginf())


def assert_same_loss(fused, plain, made):
    close(fused.loss, plain.loss)
    for key, value in plain.metrics.items():
        assert value.isfinite()
        close(fused.metrics[key], value)
    expected = gradients(plain.loss, made.leaves)
    for actual, wanted in zip(gradients(fused.loss, made.leaves), expected, strict=True):
        assert wanted.isfinite().all()
        close(actual, wanted)


WAYS = {
    "one pass": {},
    "small chunks": {"chunk_tokens": 4},  # in which no response of GSPO's fits: two passes
    "padded": {"active_tokens": 36},
    "all columns": {"vocab_columns": 36},
}


@surrogates
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
def test_barred_tokens_of_the_fused_loss_are_those_of_the_logits(name, way, frozen):
    """Loss, metrics and gradients in every way to compute them; a barred token alone sends its hidden state nothing."""
    made = barred_problem()
    by_policy, barred = barred_tokens(made)
    by_old = made.mask & made.old.isneginf()
    assert (by_policy & by_old).any()
    assert (by_policy & ~by_old).any()
    assert (by_old & ~by_policy).any()
    if frozen:
        made.weight.requires_grad_(False)
        made.bias.requires_grad_(False)
    options = LossOptions(surrogate=SURROGATES[name], kl_coef=0.1)
    assert_same_loss(made.fused(options, **WAYS[way]), made.plain(options), made)
    (gradient,) = gradients(made.fused(options, **WAYS[way]).loss, [made.hidden])
    assert (gradient[by_policy] == 0).all()
    (gradient,) = gradients(made.fused(LossOptions(surrogate=name), **WAYS[way]).loss, [made.hidden])
    assert (gradient[barred] == 0).all()
    with torch.no_grad():
        close(made.fused(options, **WAYS[way]).loss, made.plain(options).loss)


@pytest.mark.parametrize("name", TOKEN_RATIO)
def test_barred_tokens_may_be_left_out_with_those_without_credit(name):
    made = barred_problem()
    advantages = torch.where(torch.arange(9) % 2 == 0, made.token_advantages, 0.0)
    options = LossOptions(surrogate=name)
    credited = made.fused(options, advantages=advantages, active="credited")
    real = made.fused(options, advantages=advantages)
    close(credited.loss, real.loss)
    for actual, expected in zip(gradients(credited.loss, made.leaves), gradients(real.loss, made.leaves), strict=True):
        close(actual, expected)
    assert all(metric.isfinite() for metric in credited.metrics.values())


@surrogates
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, -math.inf) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        # What masks also write for it. Float16's lowest number is a logit like any other in the float32 of the softmax.
        *((dtype, torch.finfo(dtype).min) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_barred_tokens_in_every_precision(name, dtype, value):
    made = barred_problem(value=value, dtype=dtype)
    by_policy = barred_tokens(made)[0]
    options = LossOptions(surrogate=SURROGATES[name], kl_coef=0.1)
    fused, plain = made.fused(options), made.plain(options)
    close(fused.loss.double(), plain.loss.double(), rtol=1e-4, atol=1e-5)
    expected = gradients(plain.loss, made.leaves)
    for actual, wanted in zip(gradients(fused.loss, made.leaves), expected, strict=True):
        assert actual.isfinite().all()
        assert relative_error(actual, wanted.double()) < (1e-5 if dtype == torch.float32 else 2e-2)
    (gradient,) = gradients(made.fused(options).loss, [made.hidden])
    assert (gradient[by_policy] == 0).all()


@pytest.mark.parametrize("name", ["clip", "gspo_token"])
def test_dropped_columns_and_shards_pass_barred_tokens_by(name):
    made = barred_problem()
    some = made.fused(LossOptions(surrogate=name), vocab_columns=32, chunk_tokens=18)
    close(some.loss, made.plain(LossOptions(surrogate=name)).loss)
    assert all(gradient.isfinite().all() for gradient in gradients(some.loss, made.leaves))
    made.of_logits["shard"] = VocabShard(0, lambda values, how: values)
    options = LossOptions(surrogate=name, kl_coef=0.1)
    sharded = made.fused(options)
    del made.of_logits["shard"]
    assert_same_loss(sharded, made.plain(options), made)


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_log_probs_and_entropy_of_barred_tokens(frozen):
    """Minus infinity at the token, the entropy of the others, and a gradient of 0 where the loss sends one of 0."""
    made = barred_problem()
    if frozen:
        made.weight.requires_grad_(False)
        made.bias.requires_grad_(False)
    by_policy = barred_tokens(made)[0]
    both = made.fused_entropy(chunk_tokens=5)
    assert torch.equal(both.log_probs.isneginf(), by_policy)
    close(both.entropy, torch.where(made.mask, token_entropy(made.logits(), temperature=0.8), 0.0).detach())
    sent = torch.where(by_policy, 0.0, 1.0).double()
    actual = torch.autograd.grad(both.log_probs, made.leaves, sent)
    expected = torch.autograd.grad(torch.where(made.mask, made.log_probs(), 0.0), made.leaves, sent)
    for gradient, wanted in zip(actual, expected, strict=True):
        close(gradient, wanted)
    assert (actual[0][by_policy] == 0).all()


def test_the_fused_loss_of_barred_tokens_equals_plain_loops():
    """From the log-probs on, which are those of a softmax over the tokens that are not barred."""
    made = barred_problem()
    log_probs = torch.where(made.mask, made.log_probs().detach(), 0.0).tolist()
    lists = [x.tolist() for x in (made.old, made.token_advantages, made.mask)]
    kl = reference.kl_penalty(log_probs, made.ref.tolist(), lists[2])
    for name in SURROGATES:
        policy = reference.aggregate(reference.surrogate(log_probs, *lists, name), lists[2])
        fused = made.fused(LossOptions(surrogate=name, kl_coef=0.2))
        close(fused.loss, policy + 0.2 * reference.aggregate(kl, lists[2]))


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(surrogate="cispo", kl_coef=0.1, reduction="sequence_mean"),
        LossOptions(surrogate="gspo_token", kl_coef=0.1),  # in two passes
    ],
    ids=lambda options: options.surrogate.name,
)
def test_barred_tokens_compile_whole(options, fresh_compiler):
    made = barred_problem(dtype=torch.float32)
    eager, compiled = eager_and_compiled(made, options, {"chunk_tokens": 12}, backend="aot_eager")
    torch.testing.assert_close(compiled, eager)
    assert eager[0].isfinite()
    assert all(gradient.isfinite().all() for gradient in eager[2])


# Which tokens are computed


@surrogates
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn_from_is_a_zero_loss_with_zero_gradients(name, shape, reduction):
    made = problem(0, *shape, real=0.0)
    normalizer = 3.0 if reduction == "constant" else None
    options = LossOptions(surrogate=name, reduction=reduction, kl_coef=0.1)
    loss, metrics = made.fused(options, normalizer=normalizer)
    loss.backward()
    assert loss.item() == 0.0
    assert all((leaf.grad == 0).all() for leaf in made.leaves)
    assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize("count", ["exact", "padded"])
@surrogates
def test_a_known_number_of_tokens_changes_nothing(name, count):
    made = problem(5, 4, 7)
    active = int(made.mask.sum()) + (0 if count == "exact" else 3)
    options = LossOptions(surrogate=name, kl_coef=0.1)
    results = [made.fused(options, chunk_tokens=5, active_tokens=count) for count in (None, active)]
    close(results[1].loss, results[0].loss)
    pairs = [gradients(result.loss, made.leaves) for result in results]
    for actual, expected in zip(*pairs, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("name", TOKEN_RATIO)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tokens_without_credit_may_be_left_out(name, reduction):
    made = problem(6, 6, 7)
    advantages = torch.where(torch.arange(6)[:, None] % 2 == 0, made.token_advantages, 0.0)
    options, normalizer = LossOptions(surrogate=name, reduction=reduction), 9.0 if reduction == "constant" else None
    real, credited = (
        made.fused(options, advantages=advantages, active=active, normalizer=normalizer)
        for active in ("real", "credited")
    )
    close(credited.loss, real.loss)
    for actual, expected in zip(gradients(credited.loss, made.leaves), gradients(real.loss, made.leaves), strict=True):
        close(actual, expected)
    computed = made.mask & (advantages != 0)
    log_ratio = torch.where(computed, made.log_probs().detach() - made.old, 0.0)
    close(credited.metrics["ratio/max"], log_ratio[made.mask].exp().max())


@pytest.mark.parametrize(
    ("name", "how", "frozen", "products"),
    [
        ("clip", {}, [], 3),
        ("cispo", {"chunk_tokens": 5}, [], 3),
        ("gspo", {"chunk_tokens": 5}, [], 4),  # in two passes
        ("vespo", {"chunk_tokens": 5}, [], 4),
        ("clip", {}, ["weight"], 2),
        ("gspo_token", {}, ["weight"], 2),
        ("clip", {}, ["hidden", "weight"], 1),
        ("clip", {"active": "credited"}, [], 3),
    ],
    ids=str,
)
def test_the_cost_is_a_few_products_of_the_tokens_that_count(name, how, frozen, products):
    """What the table of `fused_linear_grpo_loss` says, each product being 2NHV operations; padding costs nothing."""
    made = problem(6, 8, 16, real=0.3, bias=False)
    for leaf in frozen:
        getattr(made, leaf).requires_grad_(False)
    advantages, counted = made.token_advantages, made.mask
    if how.get("active") == "credited":
        advantages = torch.where(torch.arange(16) % 2 == 0, advantages, 0.0)
        counted = made.mask & (advantages != 0)
    assert 0 < counted.sum() < 0.5 * made.mask.numel()
    # The counter does not know a product that is added in place.
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: mm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss = made.fused(LossOptions(surrogate=name), advantages=advantages, **how).loss
        if loss.requires_grad:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * counted.sum() * made.weight.numel()


def test_a_packed_batch_is_a_padded_one():
    made = problem(8, 3, 6)
    packed = Problem(
        made.hidden.detach()[made.mask][None].requires_grad_(),
        made.weight,
        made.bias,
        *[x[made.mask][None] for x in (made.token_ids, made.old, made.ref)],
        made.advantages,
        torch.ones(1, int(made.mask.sum())).bool(),
        made.of_logits,
    )
    advantages = made.token_advantages[made.mask][None]
    options = LossOptions(kl_coef=0.1)
    padded, one_row = made.fused(options), packed.fused(options, advantages=advantages)
    close(one_row.loss, padded.loss)
    close(gradients(one_row.loss, [packed.hidden])[0][0], gradients(padded.loss, [made.hidden])[0][made.mask])


# Who trains what


def test_only_what_trains_gets_a_gradient_and_a_frozen_head_changes_no_number():
    made = problem(9)
    options = LossOptions(kl_coef=0.1)
    expected = gradients(made.plain(options).loss, made.leaves)
    for frozen in ([], ["weight"], ["bias"], ["weight", "bias"], ["hidden"], ["hidden", "bias"]):
        some = problem(9)
        for name in frozen:
            getattr(some, name).requires_grad_(False)
        loss, _ = some.fused(options, chunk_tokens=4)
        loss.backward()
        for name, wanted in zip(("hidden", "weight", "bias"), expected, strict=True):
            gradient = getattr(some, name).grad
            if name in frozen:
                assert gradient is None
            else:
                close(gradient, wanted)
    with torch.no_grad():
        assert not made.fused().loss.requires_grad


def test_tied_embeddings_add_up():
    made = problem(10, real=1.0, bias=False)
    inputs = torch.randint(len(made.weight), made.mask.shape)

    def model(fused):
        made.hidden = made.weight[inputs].tanh()
        return (made.fused() if fused else made.plain()).loss

    close(gradients(model(True), [made.weight])[0], gradients(model(False), [made.weight])[0])


def test_a_scaled_loss_scales_its_gradients_and_a_second_backward_is_an_error():
    made = problem(11)
    plain = gradients(made.fused().loss, made.leaves)
    for actual, expected in zip(gradients(made.fused().loss * 3.0, made.leaves), plain, strict=True):
        close(actual, 3.0 * expected)
    loss = made.fused().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice.*compute the loss again"):
        loss.backward()


class NewMemory(TorchDispatchMode):
    """Bytes of every tensor that an operation allocates: a view and an operation in place allocate nothing."""

    def __enter__(self):
        self.sizes = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        new = (tensor.untyped_storage() for tensor in tensors_in(result))
        self.sizes += [storage.nbytes() for storage in new if storage.data_ptr() not in known]
        return result


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_backward_copies_no_gradient():
    """They were made in the forward; a second one of the weight would be the largest tensor of the step."""
    made = problem(11, bias=False)
    for factor in (1.0, 3.0):
        loss = factor * made.fused().loss
        with NewMemory() as new:
            loss.backward()
        made.weight.grad = None
        assert max(new.sizes) < made.hidden.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 7])
def test_on_policy_the_ratio_is_exactly_one(dtype, chunk):
    """Log-probs with and without a gradient come from one routine, in the same chunks."""
    made = problem(12, 5, 40, 32, 200, dtype=dtype, bias=False)
    with torch.no_grad():
        made.old = made.fused_log_probs(chunk_tokens=chunk)
    for name in TOKEN_RATIO:
        metrics = made.fused(LossOptions(surrogate=name), chunk_tokens=chunk).metrics
        assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0


# SRPO


def rollout(seed=13, batch=4, time=9):
    """A problem, the positional arguments of `srpo_advantages`, and the log-probs of the other contexts."""
    made = problem(seed, batch, time, dtype=torch.float32, temperature=1.0)
    g = torch.Generator().manual_seed(seed)
    roles = torch.where(made.mask, torch.randint(0, 3, made.mask.shape, generator=g), 99)
    others = [made.old + torch.randn(made.mask.shape, generator=g) for _ in range(2)]
    contexts = dict(zip(("corrupted_log_probs", "counterfactual_log_probs"), others, strict=True))
    return made, (made.old, made.advantages, roles, made.mask), contexts


def test_strength_0_is_fused_grpo_bit_for_bit():
    made, args, contexts = rollout()
    credit = srpo_advantages(*args, SRPOConfig(strength=0.0), **contexts)
    srpo = made.fused(advantages=credit.advantages, chunk_tokens=5)
    grpo = made.fused(advantages=made.advantages[:, None].expand_as(made.old), chunk_tokens=5)
    assert torch.equal(srpo.loss, grpo.loss)
    for actual, expected in zip(gradients(srpo.loss, made.leaves), gradients(grpo.loss, made.leaves), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [*TOKEN_RATIO, "gspo_token"])
def test_credit_and_the_fused_loss_are_srpo_loss(name):
    made, (old, advantages, roles, mask), contexts = rollout()
    options = SRPOConfig(surrogate=name, baseline="median", scale="batch_rms", kl_coef=0.1)
    plain = srpo_loss(
        made.log_probs(), advantages, roles, mask, options, old_log_probs=old, ref_log_probs=made.ref, **contexts
    )
    credit = srpo_advantages(old, advantages, roles, mask, options, **contexts)
    fused = made.fused(options, advantages=credit.advantages, chunk_tokens=4)
    close(fused.loss.double(), plain.loss, rtol=1e-5, atol=1e-6)
    metrics = fused.metrics | credit.metrics
    assert metrics.keys() == plain.metrics.keys()
    for key, value in plain.metrics.items():
        close(metrics[key].double(), value.double(), rtol=1e-4, atol=1e-5)
    for actual, expected in zip(gradients(fused.loss, made.leaves), gradients(plain.loss, made.leaves), strict=True):
        assert relative_error(actual, expected.double()) < 1e-5


@pytest.mark.parametrize("name", [*TOKEN_RATIO, "gspo_token"])
def test_a_weighted_advantage_is_a_weighted_loss(name):
    """The gradient of the weighted batch is the weighted sum of the gradients of its tokens."""
    made, (old, advantages, roles, mask), contexts = rollout()
    weights = shared_baseline_weights(old - contexts["corrupted_log_probs"], roles, mask)
    options = LossOptions(surrogate=name, reduction="sum")
    weighted = made.fused(options, advantages=role_advantages(weights, advantages, mask))
    losses, parts = 0.0, [torch.zeros_like(leaf) for leaf in made.leaves]
    for row, time in mask.nonzero().tolist():
        alone = torch.zeros_like(old)
        alone[row, time] = advantages[row]
        part = made.fused(options, advantages=alone)
        losses += weights[row, time] * part.loss.detach()
        for total, gradient in zip(parts, gradients(part.loss, made.leaves), strict=True):
            total += weights[row, time] * gradient
    close(weighted.loss, losses, rtol=1e-5, atol=1e-5)
    for actual, expected in zip(gradients(weighted.loss, made.leaves), parts, strict=True):
        close(actual, expected, rtol=1e-4, atol=1e-5)


# Approximate products


def sure_problem():
    """Tokens that were drawn from a model which is sure of most of them."""
    made = problem(14, 4, 16, 32, 2000, dtype=torch.float32, spread=1.5, bias=False)
    made.token_ids = torch.distributions.Categorical(logits=made.logits().nan_to_num().detach()).sample()
    log_probs = made.log_probs().detach()
    made.old, made.ref = (torch.where(made.mask, log_probs, torch.nan) for _ in range(2))
    return made


def test_every_column_is_the_exact_gradient_and_few_are_close_where_the_model_is_sure():
    made = sure_problem()
    exact = made.fused(chunk_tokens=24)
    wanted = gradients(exact.loss, made.leaves)
    for columns, tolerance in ((2000, 1e-5), (500, 4e-3)):
        some = made.fused(chunk_tokens=24, vocab_columns=columns)
        assert torch.equal(some.loss, exact.loss)
        for actual, expected in zip(gradients(some.loss, made.leaves), wanted, strict=True):
            assert relative_error(actual, expected.double()) < tolerance


def test_vocab_dropped_is_the_probability_of_the_columns_left_out():
    """The ones that are kept are those of the sampled tokens and then those with the most mass over all tokens."""
    made = sure_problem()
    probs = torch.softmax(made.logits().detach() / made.temperature, -1)[made.mask]
    ids = made.token_ids[made.mask]
    # A derivative of a logit is the token's probability times the loss's slope: on policy, the advantage.
    mass = (made.token_advantages[made.mask].abs().double()[:, None] * probs).sum(0)
    mass[ids] = math.inf
    metrics = made.fused(chunk_tokens=100, vocab_columns=500).metrics
    left_out = probs.index_fill(1, mass.topk(500).indices, 0.0).sum(1)
    assert left_out.max() > 1e-4
    close(metrics["vocab/dropped/mean"].double(), left_out.mean(), rtol=1e-3, atol=1e-6)
    close(metrics["vocab/dropped/max"].double(), left_out.max(), rtol=1e-3, atol=1e-6)
    everything = made.fused(chunk_tokens=100, vocab_columns=2000).metrics
    close(everything["vocab/dropped/max"], 0.0, atol=1e-6)


def test_dropped_columns_keep_the_sum_of_each_row():
    """A hidden state that moves all logits alike is not moved by the tokens that were taken together."""
    made = problem(14, 2, 16, 32, 500, dtype=torch.float64, spread=0.05, bias=False)
    some = made.fused(vocab_columns=200, chunk_tokens=16)
    (gradient,) = gradients(some.loss, [made.weight])
    close(gradient.sum(0), torch.zeros(32, dtype=torch.float64), atol=1e-12)
    assert some.metrics["vocab/dropped/mean"] > 0.3


# Shards of the vocabulary


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_shards_of_the_vocabulary_make_the_whole(softcap, frozen):
    """Three threads, each with its part of the head, and a reduction that meets at a barrier."""
    made = problem(15, softcap=softcap, scale=0.5)
    options = LossOptions(kl_coef=0.1)
    bounds, results, board = [0, 11, 30, 37], [None] * 3, [None] * 3
    barrier = threading.Barrier(3, timeout=60)

    def train(rank):
        def reduce(values, how):
            board[rank] = values
            barrier.wait()
            everyone = torch.stack([x.to(values.dtype) for x in board])
            barrier.wait()
            return everyone.amax(0) if how == "max" else everyone.sum(0)

        part = slice(bounds[rank], bounds[rank + 1])
        hidden = made.hidden.detach().clone().requires_grad_()
        weight, bias = (x.detach()[part].clone().requires_grad_(not frozen) for x in (made.weight, made.bias))
        shard = replace(made, hidden=hidden, weight=weight, bias=bias,
                        of_logits=made.of_logits | {"shard": VocabShard(part.start, reduce)})  # fmt: skip
        loss, metrics = shard.fused(options, chunk_tokens=4)
        loss.backward()
        with torch.no_grad():
            entropy = shard.fused_entropy().entropy
        results[rank] = (loss.detach(), metrics["ratio/max"], hidden.grad, weight.grad, bias.grad, entropy)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loss, metrics = made.plain(options)
    hidden, weight, bias = gradients(loss, made.leaves)
    entropy = torch.where(made.mask, token_entropy(made.logits(), temperature=0.8), 0.0).detach()
    for actual in results:
        for value, expected in zip((*actual[:3], actual[5]), (loss.detach(), metrics["ratio/max"], hidden, entropy),
                                   strict=True):  # fmt: skip
            close(value, expected, rtol=1e-9, atol=1e-10)
    if frozen:
        assert all(actual[3] is actual[4] is None for actual in results)
    else:
        close(torch.cat([actual[3] for actual in results]), weight)
        close(torch.cat([actual[4] for actual in results]), bias)


# torch.compile


def compiled_inputs(**options):
    return problem(16, 3, 5, 16, 64, **{"dtype": torch.float32, "real": 0.8} | options)


def run(made, leaves, options, how):
    made = replace(made, hidden=leaves[0], weight=leaves[1], bias=leaves[2])
    return made.fused(options, advantages=made.advantages[:, None].expand_as(made.old), **{"chunk_tokens": 8} | how)


def eager_and_compiled(made, options, how, **compiling):
    results = []
    for function in (run, torch.compile(run, fullgraph=True, **compiling)):
        leaves = [x.detach().clone().requires_grad_() for x in made.leaves]
        loss, metrics = function(made, leaves, options, how)
        (2.0 * loss).backward()
        results.append((loss.detach(), metrics, [leaf.grad for leaf in leaves]))
    with pytest.raises(RuntimeError):
        loss.backward()
    return results


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (LossOptions(surrogate="clip", kl_coef=0.1), {"active_tokens": 14}),
        (LossOptions(surrogate="sapo"), {"vocab_columns": 30, "active_tokens": 13}),
        (LossOptions(surrogate="gspo"), {}),
        (LossOptions(surrogate="vespo"), {}),
        (LossOptions(off_policy_threshold=0.01, kl_coef=0.1, kl_correction="ratio"), {}),
    ],
    ids=lambda value: value.surrogate.name if isinstance(value, LossOptions) else ",".join(value),
)
def test_compiled_whole_equals_eager(options, how, fresh_compiler):
    eager, compiled = eager_and_compiled(compiled_inputs(scale=0.5), options, how, backend="aot_eager")
    torch.testing.assert_close(compiled, eager)


def test_compiled_by_inductor_equals_eager(cpp_compiler, fresh_compiler):
    made = compiled_inputs(softcap=3.0, scale=0.5)
    eager, compiled = eager_and_compiled(made, LossOptions(), {"chunk_tokens": 16})
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_compiled_bfloat16_equals_eager(fresh_compiler):
    made = compiled_inputs(dtype=torch.bfloat16)
    eager, compiled = eager_and_compiled(made, LossOptions(), {}, backend="aot_eager")
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-4)


def test_scores_compile_whole(fresh_compiler):
    made = compiled_inputs()
    args = (made.hidden, made.output)
    calls = {
        "log_probs": lambda: fused_linear_log_probs(*args, made.ids(), made.mask),
        "entropy": lambda: fused_linear_log_probs_and_entropy(*args, made.ids(), made.mask).entropy,
        "divergence": lambda: fused_linear_divergence(*args, made.mask, other_hidden=-made.hidden, kind="jsd"),
    }
    for name, call in calls.items():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), call(), msg=lambda text, name=name: f"{name}: {text}")


def test_autocast_changes_nothing():
    made = problem(17, dtype=torch.float32)
    plain = made.fused()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made.fused()
    assert torch.equal(cast.loss, plain.loss)
    for actual, expected in zip(gradients(cast.loss, made.leaves), gradients(plain.loss, made.leaves), strict=True):
        assert torch.equal(actual, expected)


# Memory


@pytest.mark.parametrize("name", ["clip", "gspo"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(name):
    made = problem(18, 8, 32, 4, 3000, dtype=torch.float32, bias=False)
    options = LossOptions(surrogate=name)
    with NewMemory() as fused:
        made.fused(options, chunk_tokens=8).loss.backward()
    assert max(fused.sizes) <= 8 * 3000 * 4
    with NewMemory() as plain:  # the probe works: here all logits are seen
        made.plain(options, dtype=torch.float32)
    assert max(plain.sizes) >= 8 * 32 * 3000 * 4


# What is refused


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        ({}, {"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({}, {"active_tokens": 1}, r"active_tokens is 1, but \d+ tokens are to be computed; pass at least that"),
        ({}, {"active": "all"}, "active must be one of 'real', 'credited', got 'all'"),
        ({}, {"vocab_columns": 2}, r"vocab_columns must be in \[15, 37\].* got 2"),
        ({}, {"vocab_columns": 40}, r"vocab_columns must be in \[15, 37\].* got 40"),
        ({"kl_coef": 0.1}, {"active": "credited"}, "active='credited' with kl_coef=0.1.*pass active='real'"),
        ({"surrogate": "gspo_token"}, {"active": "credited"}, "active='credited' with .*surrogate='gspo_token'"),
        ({"off_policy_threshold": 0.1}, {"active": "credited"}, "active='credited' with .*off_policy_threshold=0.1"),
        ({"reduction": "constant"}, {}, "normalizer is None"),
    ],
)
def test_arguments_out_of_range_are_named(options, how, message):
    with pytest.raises(ValueError, match=message):
        problem(19).fused(LossOptions(**options), **how)


def test_a_kl_penalty_without_a_reference_is_refused():
    made = problem(19)
    made.ref = None
    with pytest.raises(ValueError, match="ref_log_probs is None"):
        made.fused(LossOptions(kl_coef=0.1))


def test_a_shard_is_refused_where_the_whole_vocabulary_is_needed():
    made = problem(19)
    made.of_logits["shard"] = VocabShard(0, lambda values, how: values)
    with pytest.raises(ValueError, match="vocab_columns needs the whole vocabulary"):
        made.fused(vocab_columns=30)
    with pytest.raises(ValueError, match="a divergence needs the whole vocabulary"):
        fused_linear_divergence(made.hidden, made.output, made.mask, other_hidden=made.hidden)


def test_more_tokens_than_promised_are_not_lost_in_silence(fresh_compiler):
    """Where the number cannot be looked at, the loss says so."""
    made = compiled_inputs()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(made, made.leaves, LossOptions(), {"active_tokens": int(made.mask.sum()) - 1})
    assert loss.isnan()


def test_wrong_tensors_are_named():
    made = problem(20)
    for change, message in (
        ({"hidden": made.hidden[0]}, "hidden must be .*needs 3 axes"),
        ({"token_ids": made.token_ids.double()}, "token_ids must be Int"),
        ({"mask": made.mask.double()}, r"mask must be Bool.*pass mask.bool\(\)"),
    ):
        with pytest.raises(TypeError, match=message):
            replace(made, **change).fused_log_probs()
    for change, message in (
        ({"hidden": made.hidden[..., :2]}, "hidden has hidden_dim=2, but output.weight has 8; pass the hidden states"),
        ({"weight": made.weight.float()}, r"hidden is torch.float64 and output.weight torch.float32; .*weight.to"),
        ({"bias": made.bias[:3]}, r"bias must have shape \(37,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(made, **change).fused_log_probs()
    with pytest.raises(ValueError, match="other_hidden is torch.float32 and hidden torch.float64"):
        fused_linear_divergence(made.hidden, made.output, made.mask, other_hidden=made.hidden.float())
    with pytest.raises(TypeError, match="output"):
        fused_linear_log_probs(made.hidden, made.weight, made.token_ids, made.mask)
