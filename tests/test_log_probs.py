"""Log-probabilities, entropies, divergences: reference, bounds, offsets, precision, gradients, bad input."""

import math
from functools import partial

import pytest
import torch
from helpers import close
from hypothesis import given
from hypothesis import strategies as st
from reference import divergence as reference_divergence
from reference import softmax as reference_softmax
from torch.autograd import gradcheck

from srpo_core import grpo_loss, token_divergence, token_log_probs
from srpo_core.log_probs import divergence_of, token_entropy

KINDS = ["full_kl", "reverse_kl", "jsd", "topk_kl"]


@st.composite
def logits(draw, count=1):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9)))
    spread = draw(st.sampled_from([0.0, 1.0, 20.0]))
    drawn = [spread * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]
    return (*drawn, torch.randint(shape[-1], shape[:2], generator=g))


@given(logits(), st.sampled_from([0.5, 1.0, 2.0]))
def test_token_log_probs_and_token_entropy_equal_the_reference(drawn, temperature):
    z, ids = drawn
    p = [reference_softmax(row, temperature) for row in z.flatten(0, 1).tolist()]
    close(
        token_log_probs(z, ids, temperature=temperature),
        [math.log(row[v]) for row, v in zip(p, ids.flatten().tolist(), strict=True)],
    )
    close(
        token_entropy(z, temperature=temperature),
        [-sum(x * math.log(x) for x in row if x > 0) for row in p],
    )


@given(logits(count=2), st.sampled_from(KINDS), st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 10))
def test_token_divergence_equals_the_reference(drawn, kind, temperature, top_k):
    z, other, _ = drawn
    expected = [
        reference_divergence(*rows, kind, temperature, top_k)
        for rows in zip(z.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True)
    ]
    actual = token_divergence(z, other_logits=other, kind=kind, temperature=temperature, top_k=top_k)
    close(actual, expected, rtol=1e-7, atol=1e-9)
    assert (actual >= 0).all()


def test_top_k_pools_never_more_than_the_full_divergence_and_jsd_stays_below_log_2():
    g = torch.Generator().manual_seed(0)
    z, other = (5 * torch.randn(8, 8, 50, generator=g, dtype=torch.float64) for _ in range(2))
    full = token_divergence(z, other_logits=other)
    pooled = [token_divergence(z, other_logits=other, kind="topk_kl", top_k=k) for k in (1, 5, 49, 50, 500)]
    for less, more in zip([*pooled], [*pooled[1:], full], strict=True):
        assert (less <= more + 1e-9).all()
    torch.testing.assert_close(pooled[-1], full)
    assert (token_divergence(z, other_logits=other, kind="jsd") <= math.log(2)).all()


def test_impossible_tokens_add_nothing():
    z = torch.tensor([[[0.0, 0.0, -math.inf]]])
    assert token_entropy(z).item() == pytest.approx(math.log(2))
    for kind in KINDS:
        assert token_divergence(z, other_logits=z, kind=kind).item() == 0.0
    assert token_divergence(torch.zeros(1, 1, 3), other_logits=z).item() == math.inf
    assert token_log_probs(z, torch.tensor([[2]])).item() == -math.inf


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_barred_token_without_credit_sends_no_gradient_to_the_logits(dtype, temperature):
    """A loss gives a log-prob of minus infinity the gradient 0, and so the logits that it was made of."""
    z = torch.tensor([[[1.0, 0.0, -math.inf], [1.0, 0.0, -math.inf]]], dtype=dtype, requires_grad=True)
    log_probs = token_log_probs(z, torch.tensor([[2, 0]]), temperature=temperature)
    assert log_probs[0, 0].item() == -math.inf
    grpo_loss(log_probs, torch.ones(1, 2), torch.ones(1, 2).bool(), old_log_probs=log_probs.detach()).loss.backward()
    assert z.grad[0, 0].tolist() == [0.0, 0.0, 0.0]
    p = 1 / (1 + math.exp(-1 / temperature))
    wanted = torch.tensor([p - 1, 1 - p, 0.0]) / temperature / 2
    torch.testing.assert_close(z.grad[0, 1].float(), wanted, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_gradients_of_entropy_and_divergences_pass_barred_tokens_by(kind, top_k):
    """They are those of the vocabulary without the tokens that both contexts bar, which get 0."""
    few, few_other = (
        torch.tensor([[row]], dtype=torch.float64, requires_grad=True) for row in ([0.3, 1.0, -0.2], [1.0, 0.5, 0.0])
    )
    many, many_other = (
        torch.nn.functional.pad(x.detach(), (0, 2), value=-math.inf).requires_grad_() for x in (few, few_other)
    )
    options = {"kind": kind, "top_k": top_k}
    expected = token_divergence(few, other_logits=few_other, **options) + token_entropy(few)
    actual = token_divergence(many, other_logits=many_other, **options) + token_entropy(many)
    close(actual, expected)
    for x, y in zip(
        torch.autograd.grad(actual.sum(), [many, many_other]),
        torch.autograd.grad(expected.sum(), [few, few_other]),
        strict=True,
    ):
        close(x, torch.nn.functional.pad(y, (0, 2)))


@given(logits(), st.sampled_from([0.0, 1e3, -1e4]))
def test_log_probs_never_exceed_zero_whatever_the_offset(drawn, offset):
    z, ids = drawn
    z = (z + offset).float()
    assert (token_log_probs(z, ids) <= 0).all()
    if offset:
        torch.testing.assert_close(token_log_probs(z, ids), token_log_probs(z - offset, ids), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_no_further_from_the_truth_than_the_naive_formula_in_bfloat16():
    g = torch.Generator().manual_seed(0)
    truth_logits = (4 * torch.randn(4, 64, 512, generator=g)).bfloat16()
    ids = torch.randint(512, (4, 64), generator=g)
    truth = token_log_probs(truth_logits.double(), ids)
    ours = token_log_probs(truth_logits, ids)
    naive = truth_logits.softmax(-1).log().gather(-1, ids[..., None]).squeeze(-1)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() < 2e-5
    assert (naive - truth).abs().max() > 100 * (ours - truth).abs().max()
    assert token_entropy(truth_logits).dtype == torch.float32


def test_gradients():
    g = torch.Generator().manual_seed(0)
    z, other = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.randint(5, (2, 3), generator=g)
    assert gradcheck(lambda z: token_log_probs(z, ids, temperature=0.7), (z,))
    assert gradcheck(token_entropy, (z,))
    for kind in ("full_kl", "reverse_kl", "jsd"):
        of_kind = partial(token_divergence, kind=kind)
        assert gradcheck(lambda z, other, of=of_kind: of(z, other_logits=other), (z, other))


def test_bad_input_is_named():
    z, ids = torch.zeros(1, 2, 3), torch.zeros(1, 2).long()
    for call in (lambda t: token_log_probs(z, ids, temperature=t), lambda t: token_entropy(z, temperature=t)):
        with pytest.raises(ValueError, match="temperature must be above 0, got 0.0"):
            call(0.0)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        token_divergence(z, other_logits=z, top_k=0)
    with pytest.raises(ValueError, match="kind must be one of 'full_kl', .* got 'kl'"):
        token_divergence(z, other_logits=z, kind="kl")
    with pytest.raises(TypeError, match="token_ids must be Int.*pass token_ids.long"):
        token_log_probs(z, ids.float())
    with pytest.raises(TypeError, match="token_ids must be .*align it with logits"):
        token_log_probs(z, ids[:, :1])
    with pytest.raises(TypeError, match="other_logits must be .*align it with logits"):
        token_divergence(z, other_logits=z[:, :1])
    with pytest.raises(TypeError, match="logits must be .*needs 3 axes"):
        token_log_probs(z[0], ids)
    assert token_log_probs(torch.zeros(0, 2, 3), ids[:0]).shape == (0, 2)


@given(logits(count=2), st.sampled_from(KINDS), st.integers(1, 10))
def test_divergence_of_two_distributions_is_that_of_their_logits(drawn, kind, top_k):
    """As the fused losses ask for it, of any leading axes."""
    z, other, _ = drawn
    log_p, log_q = (x.log_softmax(-1).flatten(0, 1) for x in (z, other))
    expected = token_divergence(z, other_logits=other, kind=kind, top_k=top_k).flatten()
    assert torch.equal(divergence_of(kind, top_k)(log_p, log_q), expected)
