"""The fused losses: the logits variant and the float64 reference, chunks, padding, precision, memory, compilation."""

import inspect
import math
import threading
from dataclasses import dataclass, replace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from srpo_core import (
    fused_linear_grpo_loss,
    fused_linear_jsd,
    fused_linear_kl,
    fused_linear_log_probs,
    fused_linear_log_probs_and_entropy,
    fused_linear_srpo_loss,
    grpo_loss,
    shared_baseline_weights,
    srpo_loss,
    token_divergence,
    token_entropy,
    token_log_probs,
)

SURROGATES = {
    "clip": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5},
    "cispo": {"max_ratio": 1.1},
    "sapo": {"temperature_positive": 0.8, "temperature_negative": 1.3},
    "gspo_token": {"clip_low": 0.05, "clip_high": 0.1},
    "gspo": {"clip_low": 0.05, "clip_high": 0.1},
}
TOKEN_RATIO = ["clip", "cispo", "sapo"]
REDUCTIONS = ["token_mean", "sequence_mean", "constant", "sum"]
surrogates = pytest.mark.parametrize("name", SURROGATES)


@dataclass
class Problem:
    hidden: torch.Tensor
    lm_head: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    advantages: torch.Tensor  # one per response
    mask: torch.Tensor
    options: dict  # temperature, logit_softcap

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.lm_head, self.bias) if x is not None and x.requires_grad]

    @property
    def token_advantages(self):
        return torch.where(self.mask, self.advantages[:, None], torch.nan)

    def logits(self, dtype=torch.float64):
        """As a model would compute them; padding made harmless, as a model's output is."""
        hidden, lm_head = self.hidden.to(dtype), self.lm_head.to(dtype)
        logits = torch.where(self.mask[..., None], hidden, 0.0) @ lm_head.T
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        cap = self.options["logit_softcap"]
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def ids(self):
        return torch.where(self.mask, self.token_ids, 0)

    def log_probs(self, dtype=torch.float64):
        return token_log_probs(self.logits(dtype), self.ids(), temperature=self.options["temperature"])

    def fused(self, **options):
        advantages = options.pop("advantages", self.token_advantages)
        return fused_linear_grpo_loss(
            self.hidden,
            self.lm_head,
            self.token_ids,
            self.old,
            advantages,
            self.mask,
            bias=self.bias,
            ref_log_probs=self.ref,
            **(self.options | options),
        )

    def plain(self, dtype=torch.float64, **options):
        return grpo_loss(
            self.log_probs(dtype), self.old, self.token_advantages, self.mask, ref_log_probs=self.ref, **options
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
        {"temperature": temperature, "logit_softcap": softcap},
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
    )


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-11, "atol": 1e-12} | tolerance))


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


@surrogates
@settings(max_examples=25)
@given(
    made=problems(),
    chunk=st.sampled_from([1, 2, 3, 7, 100]),
    reduction=st.sampled_from(REDUCTIONS),
    kl=st.sampled_from([(0.0, "k3"), (0.1, "k3"), (0.1, "k2"), (0.1, "k1")]),
)
def test_equals_the_logits_variant(made, name, chunk, reduction, kl):
    """Loss, every metric and every gradient, whatever the shape, the chunks and the options; NaN under the mask."""
    options = {"surrogate": name, "kl_coef": kl[0], "kl_estimator": kl[1], "reduction": reduction, **SURROGATES[name]}
    options["normalizer"] = 7.0 if reduction == "constant" else None
    loss, metrics = made.plain(**options)
    fused = made.fused(**options, chunk_tokens=chunk)
    close(fused.loss, loss)
    assert fused.metrics.keys() == metrics.keys()
    for key, value in metrics.items():
        close(fused.metrics[key], value)
    for actual, expected in zip(gradients(fused.loss, made.leaves), gradients(loss, made.leaves), strict=True):
        close(actual, expected)


@surrogates
@given(made=problems(), reduction=st.sampled_from(["token_mean", "sequence_mean"]))
@settings(max_examples=15)
def test_equals_the_reference(made, name, reduction):
    """Against plain loops from the hidden states on, which share no code with the package."""
    cap, temperature = made.options["logit_softcap"], made.options["temperature"]
    log_probs = []
    for hidden, ids, mask in zip(made.hidden.tolist(), made.token_ids.tolist(), made.mask.tolist(), strict=True):
        row = []
        for state, token, real in zip(hidden, ids, mask, strict=True):
            if not real:
                row.append(0.0)
                continue
            logits = [math.fsum(x * w for x, w in zip(state, column, strict=True)) for column in made.lm_head.tolist()]
            if made.bias is not None:
                logits = [z + b for z, b in zip(logits, made.bias.tolist(), strict=True)]
            if cap is not None:
                logits = [cap * math.tanh(z / cap) for z in logits]
            top = max(logits)
            total = math.fsum(math.exp((z - top) / temperature) for z in logits)
            row.append((logits[token] - top) / temperature - math.log(total))
        log_probs.append(row)
    lists = [x.tolist() for x in (made.old, made.token_advantages, made.mask)]
    policy = reference.surrogate(log_probs, *lists, name, **SURROGATES[name])
    penalty = reference.kl_penalty(log_probs, made.ref.tolist(), lists[2])
    expected = reference.aggregate(policy, lists[2], reduction) + 0.2 * reference.aggregate(
        penalty, lists[2], reduction
    )
    actual = made.fused(surrogate=name, kl_coef=0.2, reduction=reduction, chunk_tokens=3, **SURROGATES[name]).loss
    close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)


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


@pytest.mark.parametrize("name", ["clip", "sapo", "gspo"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(name, softcap):
    made = problem(1, 2, 3, 3, 5, off_policy=0.03, real=0.8, softcap=softcap)
    made.hidden = torch.where(made.mask[..., None], made.hidden.detach(), 0.5).requires_grad_()

    def loss(*leaves):
        made.hidden, made.lm_head, made.bias = leaves
        return made.fused(surrogate=name, kl_coef=0.1, chunk_tokens=3).loss

    assert gradcheck(lambda *leaves: AtOnce.apply(loss, *leaves), (made.hidden, made.lm_head, made.bias))


@pytest.mark.parametrize("name", ["cispo", "gspo_token"])
def test_gradients_of_losses_with_a_stopped_ratio(name):
    """Their value is not their primitive, so gradcheck cannot: differences of the log-probs instead."""
    made = problem(1, 2, 3, 3, 5, off_policy=0.03)
    old = torch.where(made.mask, made.old, 0.0)
    log_ratio = torch.where(made.mask, made.log_probs().detach() - old, 0.0)
    if name == "cispo":
        ratio = log_ratio.exp().clamp(max=5.0)
    else:
        ratio = (log_ratio.sum(1) / made.mask.sum(1).clamp(min=1)).exp()[:, None]
    share = torch.where(made.mask, -ratio * made.advantages[:, None], 0.0) / made.mask.sum()
    actual = gradients(made.fused(surrogate=name, chunk_tokens=3).loss, [made.hidden])[0]
    step = 1e-6
    for i in made.hidden.isfinite().nonzero().tolist():
        place, ends = tuple(i), []
        for sign in (1, -1):
            shifted = made.hidden.detach().clone()
            shifted[place] += sign * step
            ends.append(fused_linear_log_probs(shifted, made.lm_head.detach(), made.token_ids, made.mask,
                                               bias=made.bias.detach(), temperature=0.8))  # fmt: skip
        expected = (share * (ends[0] - ends[1])).sum() / (2 * step)
        close(actual[place], expected, rtol=1e-6, atol=1e-9)


@given(made=problems(), chunk=st.sampled_from([1, 4, 100]))
def test_log_probs_and_entropy_equal_those_of_the_logits(made, chunk):
    args = (made.hidden, made.lm_head, made.token_ids, made.mask)
    options = made.options | {"bias": made.bias, "chunk_tokens": chunk}
    log_probs = fused_linear_log_probs(*args, **options)
    expected = torch.where(made.mask, made.log_probs(), 0.0)
    close(log_probs, expected)
    assert (log_probs <= 0).all()
    both = fused_linear_log_probs_and_entropy(*args, **options)
    assert torch.equal(both.log_probs, log_probs)
    entropy = token_entropy(made.logits(), temperature=made.options["temperature"])
    close(both.entropy, torch.where(made.mask, entropy, 0.0).detach(), rtol=1e-9, atol=1e-10)
    assert not both.entropy.requires_grad
    seed = torch.randn(log_probs.shape, dtype=torch.float64)
    for actual, wanted in zip(
        torch.autograd.grad(log_probs, made.leaves, seed, retain_graph=True),
        torch.autograd.grad(expected, made.leaves, seed),
        strict=True,
    ):
        close(actual, wanted)


@given(problems(), st.sampled_from([1, 4, 100]))
def test_divergences_equal_those_of_the_logits(made, chunk):
    other = problem(7, *made.hidden.shape, len(made.lm_head))
    other.hidden = torch.where(made.mask[..., None], other.hidden.detach().nan_to_num(0.3), torch.nan)
    logits = made.logits().detach()
    made_other = Problem(other.hidden, *[getattr(made, name) for name in ("lm_head", "bias")], *[None] * 4, made.mask,
                         made.options)  # fmt: skip
    other_logits = made_other.logits().detach()
    for function, kind in ((fused_linear_kl, "full_kl"), (fused_linear_jsd, "jsd")):
        actual = function(
            made.hidden, other.hidden, made.lm_head, made.mask, bias=made.bias, chunk_tokens=chunk, **made.options
        )
        expected = token_divergence(logits, other_logits, kind=kind, temperature=made.options["temperature"])
        close(actual, torch.where(made.mask, expected, 0.0), rtol=1e-9, atol=1e-10)
        assert not actual.requires_grad


# What the issue of precision comes to: relative errors against float64


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@surrogates
def test_float32_is_within_5e_6_of_float64_or_as_close_as_float32_logits_come(name, spread):
    made = problem(3, 4, 24, 64, 1000, dtype=torch.float32, spread=spread)
    options = {"surrogate": name, "kl_coef": 0.05, **SURROGATES[name]}
    truth, naive = made.plain(**options).loss, made.plain(torch.float32, **options).loss
    fused = made.fused(**options, chunk_tokens=20).loss
    close(fused.double(), truth, rtol=1e-4, atol=1e-5)
    for actual, expected, logits in zip(*(gradients(x, made.leaves) for x in (fused, truth, naive)), strict=True):
        expected = expected.double()
        assert relative_error(actual, expected) < max(5e-6, 1.5 * relative_error(logits, expected))


def test_a_sure_token_keeps_its_gradient_in_float32():
    """At p = 1 - 1e-9 a derivative of P - 1 is rounding; the sum of the others is not."""
    lm_head = torch.zeros(50, 2)
    lm_head[7, 0] = 1.0
    hidden = torch.tensor([[[24.6, 1.0]]])
    made = Problem(hidden, lm_head, None, torch.tensor([[7]]), *[torch.zeros(1, 1)] * 2, torch.ones(1),
                   torch.ones(1, 1).bool(), {"temperature": 1.0, "logit_softcap": None})  # fmt: skip
    hidden.requires_grad_()
    lm_head.requires_grad_()
    expected = gradients(made.plain().loss, [hidden.requires_grad_(), lm_head])
    for actual, wanted in zip(gradients(made.fused().loss, [hidden, lm_head]), expected, strict=True):
        assert wanted.norm() < 1e-6
        assert relative_error(actual, wanted.double()) < 1e-6


@surrogates
def test_bfloat16_rows_are_within_1_percent(name):
    made = problem(3, 4, 24, 64, 1000, dtype=torch.bfloat16, spread=0.5)
    options = {"surrogate": name, "kl_coef": 0.05, **SURROGATES[name]}
    loss, _ = made.plain(**options)
    fused = made.fused(**options, chunk_tokens=10)
    for actual, expected in zip(gradients(fused.loss, made.leaves), gradients(loss, made.leaves), strict=True):
        expected = expected.double().flatten(0, -2) if expected.ndim > 1 else expected.double()[None]
        actual = actual.double().view(expected.shape)
        # Rows that are nothing but cancellation are left out: their size is that of the rounding of their terms.
        large = expected.norm(dim=1) > 1e-2 * expected.norm(dim=1).max()
        assert ((actual - expected).norm(dim=1) / expected.norm(dim=1))[large].max() < 1e-2


def test_bfloat16_log_probs_come_from_float32_logits():
    made = problem(3, 4, 24, 64, 1000, dtype=torch.bfloat16, spread=1.0, bias=False)
    truth = torch.where(made.mask, made.log_probs(), 0.0).detach()
    ours = fused_linear_log_probs(made.hidden, made.lm_head, made.token_ids, made.mask, temperature=0.8)
    naive_logits = torch.where(made.mask[..., None], made.hidden, 0.0) @ made.lm_head.T
    naive = torch.where(made.mask, token_log_probs(naive_logits, made.ids(), temperature=0.8), 0.0)
    assert (ours - truth).abs().max() < 2e-5 * truth.abs().max()
    assert (naive - truth).abs().max() > 100 * (ours - truth).abs().max()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_float16_gradients_do_not_underflow():
    made = problem(3, 2, 6, 16, 300, dtype=torch.float16, spread=0.3)
    loss, _ = made.plain(reduction="constant", normalizer=1e9)
    ours = made.fused(reduction="constant", normalizer=1e9)
    scale = 2.0**24
    for actual, expected in zip(
        gradients(ours.loss * scale, made.leaves), gradients(loss * scale, made.leaves), strict=True
    ):
        assert actual.dtype == torch.float16
        assert relative_error(actual, expected.double()) < 1e-2


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_little(offset):
    made = problem(4, dtype=torch.float64)
    shifted = fused_linear_log_probs(
        made.hidden, made.lm_head, made.token_ids, made.mask, bias=made.bias + offset, temperature=0.8
    )
    plain = fused_linear_log_probs(
        made.hidden, made.lm_head, made.token_ids, made.mask, bias=made.bias, temperature=0.8
    )
    close(shifted, plain, rtol=1e-9, atol=1e-9)
    assert (shifted <= 0).all()


def test_extreme_logits_are_finite_and_exact():
    """Probabilities beyond float32's smallest number, tokens that are barred, and a vocabulary of one."""
    hidden, mask = torch.ones(1, 3, 1), torch.ones(1, 3).bool()
    log_probs = fused_linear_log_probs(
        hidden, torch.tensor([[400.0], [0.0], [-900.0], [0.0]]), torch.tensor([[1, 2, 0]]), mask
    )
    assert log_probs.tolist() == [[-400.0, -1300.0, 0.0]]
    lm_head, bias = torch.zeros(3, 1, requires_grad=True), torch.tensor([0.0, 0.0, -math.inf])
    both = fused_linear_log_probs_and_entropy(hidden, lm_head, torch.tensor([[0, 1, 0]]), mask, bias=bias)
    close(both.log_probs, torch.full((1, 3), -math.log(2)), rtol=1e-6, atol=0)
    close(both.entropy, torch.full((1, 3), math.log(2)), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(both.log_probs.sum(), lm_head)
    assert gradient.isfinite().all()
    alone = fused_linear_log_probs_and_entropy(hidden, torch.ones(1, 1), torch.zeros(1, 3).long(), mask)
    assert alone.log_probs.tolist() == alone.entropy.tolist() == [[0.0, 0.0, 0.0]]


# Which tokens are computed


@surrogates
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn_from_is_a_zero_loss_with_zero_gradients(name, shape, reduction):
    made = problem(0, *shape, real=0.0)
    normalizer = 3.0 if reduction == "constant" else None
    loss, metrics = made.fused(surrogate=name, reduction=reduction, normalizer=normalizer, kl_coef=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert all((leaf.grad == 0).all() for leaf in made.leaves)
    assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize("count", ["exact", "padded"])
@surrogates
def test_a_known_number_of_tokens_changes_nothing(name, count):
    made = problem(5, 4, 7)
    active = int(made.mask.sum()) + (0 if count == "exact" else 3)
    results = [made.fused(surrogate=name, kl_coef=0.1, chunk_tokens=5, active_tokens=n) for n in (None, active)]
    close(results[1].loss, results[0].loss)
    pairs = [gradients(result.loss, made.leaves) for result in results]
    for actual, expected in zip(*pairs, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("name", TOKEN_RATIO)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tokens_without_credit_may_be_left_out(name, reduction):
    made = problem(6, 6, 7)
    advantages = torch.where(torch.arange(6)[:, None] % 2 == 0, made.token_advantages, 0.0)
    options = {"surrogate": name, "reduction": reduction, "normalizer": 9.0 if reduction == "constant" else None}
    real, credited = (made.fused(advantages=advantages, active=active, **options) for active in ("real", "credited"))
    close(credited.loss, real.loss)
    for actual, expected in zip(gradients(credited.loss, made.leaves), gradients(real.loss, made.leaves), strict=True):
        close(actual, expected)
    computed = made.mask & (advantages != 0)
    log_ratio = torch.where(computed, made.log_probs().detach() - made.old, 0.0)
    close(credited.metrics["ratio/max"], log_ratio[made.mask].exp().max())


def test_padding_is_not_computed():
    """The cost follows the real tokens: the products see them and no others."""
    made = problem(6, 8, 16, real=0.3)
    seen = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name in ("aten::mm", "aten::addmm"):
                seen.append(max(x.shape[0] for x in args if isinstance(x, torch.Tensor) and x.ndim == 2))
            return function(*args, **(kwargs or {}))

    made.bias = None
    with Count():
        made.fused(chunk_tokens=1000)
    assert made.mask.sum() < 0.5 * made.mask.numel()
    assert max(seen) <= max(int(made.mask.sum()), len(made.lm_head))
    assert len(seen) == 3


def test_a_packed_batch_is_a_padded_one():
    made = problem(8, 3, 6)
    packed = Problem(
        made.hidden.detach()[made.mask][None].requires_grad_(),
        made.lm_head,
        made.bias,
        *[x[made.mask][None] for x in (made.token_ids, made.old, made.ref)],
        made.advantages,
        torch.ones(1, int(made.mask.sum())).bool(),
        made.options,
    )
    advantages = made.token_advantages[made.mask][None]
    padded, one_row = made.fused(kl_coef=0.1), packed.fused(advantages=advantages, kl_coef=0.1)
    close(one_row.loss, padded.loss)
    close(gradients(one_row.loss, [packed.hidden])[0][0], gradients(padded.loss, [made.hidden])[0][made.mask])


# Who trains what


def test_only_what_trains_gets_a_gradient_and_a_frozen_head_changes_no_number():
    made = problem(9)
    expected = gradients(made.plain(kl_coef=0.1).loss, made.leaves)
    for frozen in ([], ["lm_head"], ["bias"], ["lm_head", "bias"], ["hidden"], ["hidden", "bias"]):
        some = problem(9)
        for name in frozen:
            getattr(some, name).requires_grad_(False)
        loss, _ = some.fused(kl_coef=0.1, chunk_tokens=4)
        loss.backward()
        for name, wanted in zip(("hidden", "lm_head", "bias"), expected, strict=True):
            gradient = getattr(some, name).grad
            if name in frozen:
                assert gradient is None
            else:
                close(gradient, wanted)
    with torch.no_grad():
        assert not made.fused().loss.requires_grad


def test_tied_embeddings_add_up():
    made = problem(10, real=1.0, bias=False)
    inputs = torch.randint(len(made.lm_head), made.mask.shape)

    def model(fused):
        made.hidden = made.lm_head[inputs].tanh()
        return (made.fused() if fused else made.plain()).loss

    close(gradients(model(True), [made.lm_head])[0], gradients(model(False), [made.lm_head])[0])


def test_a_scaled_loss_scales_its_gradients_and_a_second_backward_is_an_error():
    made = problem(11)
    plain = gradients(made.fused().loss, made.leaves)
    for actual, expected in zip(gradients(made.fused().loss * 3.0, made.leaves), plain, strict=True):
        close(actual, 3.0 * expected)
    loss = made.fused().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="sent backward twice.*compute it again"):
        loss.backward()


def test_the_gradient_of_the_weight_is_handed_over_without_a_copy():
    made = problem(11, bias=False)
    loss = made.fused().loss
    buffer = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert made.lm_head.grad.data_ptr() == buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 7])
def test_on_policy_the_ratio_is_exactly_one(dtype, chunk):
    """Log-probs with and without a gradient come from one routine, in the same chunks."""
    made = problem(12, 5, 40, 32, 200, dtype=dtype, bias=False)
    with torch.no_grad():
        made.old = fused_linear_log_probs(
            made.hidden, made.lm_head, made.token_ids, made.mask, temperature=0.8, chunk_tokens=chunk
        )
    for name in TOKEN_RATIO:
        metrics = made.fused(surrogate=name, chunk_tokens=chunk).metrics
        assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0


# SRPO


def rollout(seed=13, batch=4, time=9):
    made = problem(seed, batch, time, dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    roles = torch.where(made.mask, torch.randint(0, 3, made.mask.shape, generator=g), 99)
    others = [made.old + torch.randn(made.mask.shape, generator=g) for _ in range(2)]
    return made, (made.old, *others, roles, made.advantages, made.mask)


def fused_srpo(made, args, **options):
    return fused_linear_srpo_loss(made.hidden, made.lm_head, made.token_ids, *args, bias=made.bias, **options)


def test_strength_0_is_grpo_bit_for_bit():
    made, args = rollout()
    srpo = fused_srpo(made, args, strength=0.0, chunk_tokens=5)
    grpo = fused_linear_grpo_loss(
        made.hidden,
        made.lm_head,
        made.token_ids,
        made.old,
        made.advantages[:, None].expand_as(made.old),
        made.mask,
        bias=made.bias,
        chunk_tokens=5,
    )
    assert torch.equal(srpo.loss, grpo.loss)
    for actual, expected in zip(gradients(srpo.loss, made.leaves), gradients(grpo.loss, made.leaves), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [*TOKEN_RATIO, "gspo_token"])
def test_fused_srpo_equals_srpo(name):
    made, args = rollout()
    options = {"surrogate": name, "baseline": "median", "scale": "batch_rms", "kl_coef": 0.1, "ref_log_probs": made.ref}
    made.options["temperature"] = 1.0
    plain = srpo_loss(made.log_probs(), *args, **options)
    fused = fused_srpo(made, args, chunk_tokens=4, **options)
    close(fused.loss.double(), plain.loss, rtol=1e-5, atol=1e-6)
    assert fused.metrics.keys() == plain.metrics.keys()
    for key, value in plain.metrics.items():
        close(fused.metrics[key].double(), value.double(), rtol=1e-4, atol=1e-5)
    for actual, expected in zip(gradients(fused.loss, made.leaves), gradients(plain.loss, made.leaves), strict=True):
        assert relative_error(actual, expected.double()) < 1e-5


@pytest.mark.parametrize("name", [*TOKEN_RATIO, "gspo_token"])
def test_a_weighted_advantage_is_a_weighted_loss(name):
    """The gradient of the weighted batch is the weighted sum of the gradients of its tokens."""
    made, (_, visual, consistency, roles, _, mask) = rollout()
    weights = shared_baseline_weights(visual - made.old, consistency - made.old, roles, mask)
    weighted = made.fused(surrogate=name, advantages=weights * made.token_advantages, reduction="sum")
    losses, parts = 0.0, [torch.zeros_like(leaf) for leaf in made.leaves]
    for row, time in mask.nonzero().tolist():
        alone = torch.zeros_like(made.token_advantages)
        alone[row, time] = made.token_advantages[row, time]
        part = made.fused(surrogate=name, advantages=alone, reduction="sum")
        losses += weights[row, time] * part.loss.detach()
        for total, gradient in zip(parts, gradients(part.loss, made.leaves), strict=True):
            total += weights[row, time] * gradient
    close(weighted.loss, losses, rtol=1e-5, atol=1e-5)
    for actual, expected in zip(gradients(weighted.loss, made.leaves), parts, strict=True):
        close(actual, expected, rtol=1e-4, atol=1e-5)


def test_srpo_options_and_defaults_are_those_of_srpo_loss():
    def options(function):
        return {
            name: (parameter.default, str(parameter.annotation))
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    fused = options(fused_linear_srpo_loss)
    assert options(srpo_loss).items() <= fused.items()
    assert options(fused_linear_grpo_loss).items() <= fused.items()
    assert options(grpo_loss).items() <= options(fused_linear_grpo_loss).items()


# Approximate products


def test_every_column_is_the_exact_gradient_and_few_are_close_where_the_model_is_sure():
    made = problem(14, 4, 16, 32, 2000, dtype=torch.float32, spread=1.5, bias=False)
    made.token_ids = torch.distributions.Categorical(logits=made.logits().nan_to_num().detach()).sample()
    log_probs = made.log_probs().detach()
    made.old, made.ref = (torch.where(made.mask, log_probs, torch.nan) for _ in range(2))
    exact = made.fused(chunk_tokens=24)
    wanted = gradients(exact.loss, made.leaves)
    for columns, tolerance in ((2000, 1e-5), (500, 4e-3)):
        some = made.fused(chunk_tokens=24, vocab_columns=columns)
        assert torch.equal(some.loss, exact.loss)
        for actual, expected in zip(gradients(some.loss, made.leaves), wanted, strict=True):
            assert relative_error(actual, expected.double()) < tolerance
        assert 0 <= some.metrics["vocab/dropped/mean"] + 1e-6 <= some.metrics["vocab/dropped/max"] + 1e-5
    assert some.metrics["vocab/dropped/max"] > 1e-6


def test_dropped_columns_keep_the_sum_of_each_row():
    """A hidden state that moves all logits alike is not moved by the tokens that were taken together."""
    made = problem(14, 2, 16, 32, 500, dtype=torch.float64, spread=0.05, bias=False)
    some = made.fused(vocab_columns=200, chunk_tokens=16)
    (gradient,) = gradients(some.loss, [made.lm_head])
    close(gradient.sum(0), torch.zeros(32, dtype=torch.float64), atol=1e-12)
    assert some.metrics["vocab/dropped/mean"] > 0.3


# Shards of the vocabulary


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_shards_of_the_vocabulary_make_the_whole(softcap, frozen):
    """Three threads, each with its part of the head, and a reduction that meets at a barrier."""
    made = problem(15)
    made.options["logit_softcap"] = softcap
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
        mine = problem(15)
        hidden = mine.hidden.detach().requires_grad_()
        lm_head, bias = (x.detach()[part].clone().requires_grad_(not frozen) for x in (mine.lm_head, mine.bias))
        shard = Problem(hidden, lm_head, bias, *[getattr(mine, x) for x in ("token_ids", "old", "ref", "advantages",
                                                                            "mask")], made.options)  # fmt: skip
        loss, metrics = shard.fused(kl_coef=0.1, chunk_tokens=4, vocab_offset=part.start, vocab_reduce=reduce)
        loss.backward()
        both = fused_linear_log_probs_and_entropy(
            hidden.detach(), lm_head.detach(), mine.token_ids, mine.mask, bias=bias.detach(), vocab_offset=part.start,
            vocab_reduce=reduce, **made.options,
        )  # fmt: skip
        results[rank] = (loss.detach(), metrics["ratio/max"], hidden.grad, lm_head.grad, bias.grad, both.entropy)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loss, metrics = made.plain(kl_coef=0.1)
    hidden, lm_head, bias = gradients(loss, made.leaves)
    entropy = torch.where(made.mask, token_entropy(made.logits(), temperature=0.8), 0.0).detach()
    for actual in results:
        for value, expected in zip((*actual[:3], actual[5]), (loss.detach(), metrics["ratio/max"], hidden, entropy),
                                   strict=True):  # fmt: skip
            close(value, expected, rtol=1e-9, atol=1e-10)
    if frozen:
        assert all(actual[3] is actual[4] is None for actual in results)
    else:
        close(torch.cat([actual[3] for actual in results]), lm_head)
        close(torch.cat([actual[4] for actual in results]), bias)


# torch.compile


def compiled_inputs(**options):
    return problem(16, 3, 5, 16, 64, **{"dtype": torch.float32, "real": 0.8} | options)


def run(made, leaves, options):
    made = replace(made, hidden=leaves[0], lm_head=leaves[1], bias=leaves[2])
    return made.fused(advantages=made.advantages[:, None].expand_as(made.old), **{"chunk_tokens": 8} | options)


def eager_and_compiled(made, options, **how):
    torch.compiler.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, **how)):
        leaves = [x.detach().clone().requires_grad_() for x in made.leaves]
        loss, metrics = function(made, leaves, options)
        (2.0 * loss).backward()
        results.append((loss.detach(), metrics, [leaf.grad for leaf in leaves]))
    with pytest.raises(RuntimeError):
        loss.backward()
    return results


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "clip", "kl_coef": 0.1, "active_tokens": 14},
        {"surrogate": "cispo", "reduction": "sequence_mean"},
        {"surrogate": "sapo", "vocab_columns": 30, "active_tokens": 13},
        {"surrogate": "gspo"},
        {"surrogate": "gspo_token", "chunk_tokens": 4},  # in two passes
    ],
    ids=lambda options: options["surrogate"],
)
def test_compiled_whole_equals_eager(options):
    eager, compiled = eager_and_compiled(compiled_inputs(), options, backend="aot_eager")
    torch.testing.assert_close(compiled, eager)


def test_compiled_by_inductor_equals_eager(cpp_compiler):
    eager, compiled = eager_and_compiled(compiled_inputs(softcap=3.0), {"chunk_tokens": 16})
    torch.testing.assert_close(compiled, eager)


def test_compiled_bfloat16_equals_eager():
    eager, compiled = eager_and_compiled(compiled_inputs(dtype=torch.bfloat16), {}, backend="aot_eager")
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-4)


def test_scores_compile_whole():
    torch.compiler.reset()
    made = compiled_inputs()
    args = (made.lm_head, made.mask)
    calls = {
        "log_probs": lambda: fused_linear_log_probs(made.hidden, made.lm_head, made.ids(), made.mask),
        "entropy": lambda: fused_linear_log_probs_and_entropy(made.hidden, made.lm_head, made.ids(), made.mask).entropy,
        "kl": lambda: fused_linear_kl(made.hidden, -made.hidden, *args),
        "jsd": lambda: fused_linear_jsd(made.hidden, -made.hidden, *args),
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
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest.append(tensor.untyped_storage().nbytes())
            return result

    with Largest():
        made.fused(surrogate=name, chunk_tokens=8).loss.backward()
    assert max(largest) == 8 * 3000 * 4


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"logit_softcap": -1.0}, "logit_softcap must be above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"active_tokens": 1}, r"active_tokens is 1, but \d+ tokens are to be computed; pass at least that"),
        ({"vocab_offset": 3}, "vocab_offset is 3 without a vocab_reduce"),
        ({"vocab_columns": 2}, r"vocab_columns must be in \[15, 37\].* got 2"),
        ({"vocab_columns": 40}, r"vocab_columns must be in \[15, 37\].* got 40"),
        ({"active": "credited", "kl_coef": 0.1}, "active='credited' with kl_coef=0.1.*pass active='real'"),
        ({"active": "credited", "surrogate": "gspo_token"}, "active='credited' with .*surrogate='gspo_token'"),
        ({"kl_coef": -0.1}, "kl_coef must be at least 0"),
        ({"reduction": "constant"}, "normalizer is None"),
        ({"clip_low": 1.0}, "clip_low must be in"),
    ],
)
def test_options_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        problem(19).fused(**change)


def test_more_tokens_than_promised_are_not_lost_in_silence():
    """Where the number cannot be looked at, the loss says so."""
    torch.compiler.reset()
    made = compiled_inputs()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(made, made.leaves, {"active_tokens": int(made.mask.sum()) - 1})
    assert loss.isnan()


def test_wrong_tensors_are_named():
    made = problem(20)
    for name, wrong, message in (
        ("hidden", made.hidden[0], "hidden must be .*needs 3 axes"),
        ("lm_head", made.lm_head[:, :2], "lm_head must be .*hidden_dim"),
        ("token_ids", made.token_ids.double(), "token_ids must be Int"),
        ("mask", made.mask.double(), r"mask must be Bool.*pass mask.bool\(\)"),
        ("bias", made.bias[:3], "bias must be"),
    ):
        other = problem(20)
        setattr(other, name, wrong)
        with pytest.raises(TypeError, match=message):
            fused_linear_log_probs(other.hidden, other.lm_head, other.token_ids, other.mask, bias=other.bias)
    with pytest.raises(ValueError, match=r"hidden is torch.float64 and lm_head torch.float32; pass lm_head.to"):
        fused_linear_log_probs(made.hidden, made.lm_head.float(), made.token_ids, made.mask)
    with pytest.raises(ValueError, match="other_hidden is torch.float32"):
        fused_linear_kl(made.hidden, made.hidden.float(), made.lm_head, made.mask)
