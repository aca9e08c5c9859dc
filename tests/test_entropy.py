"""The entropy from hidden states: value and gradients of the logits variant, chunks, padding, precision, cost."""

import math

import pytest
import torch
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import barred_problem, problem, problems, relative_error
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from srpo_core import OutputLayer, aggregate, grpo_loss
from srpo_core.entropy import fused_linear_entropy
from srpo_core.log_probs import token_entropy
from srpo_core.output_layer import VocabShard


def fused(made, **how):
    return fused_linear_entropy(made.hidden, made.output, made.mask, **how)


def plain(made, dtype=torch.float64):
    entropy = token_entropy(made.logits(dtype), temperature=made.temperature)
    return torch.where(made.mask, entropy, 0.0)


def gradients_of(entropy, made, seed=3):
    sent = torch.randn(entropy.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(entropy, made.leaves, sent.to(entropy.dtype))


def by_loops(logits, temperature):
    powers = [math.exp(z / temperature) for z in logits]
    return -math.fsum(x / sum(powers) * math.log(x / sum(powers)) for x in powers)


@settings(max_examples=40)
@given(made=problems(), chunk=st.sampled_from([1, 2, 3, 7, 100]))
def test_fused_linear_entropy_equals_that_of_the_logits(made, chunk):
    """Value and every gradient, whatever the shape and the chunks; NaN under the mask, where the gradient is 0."""
    entropy, expected = fused(made, chunk_tokens=chunk), plain(made)
    close(entropy, expected, atol=1e-10)
    close(made.fused_entropy().entropy, entropy.detach(), atol=1e-10)
    for actual, wanted in zip(gradients_of(entropy, made), gradients_of(expected, made), strict=True):
        close(actual, wanted, rtol=1e-8, atol=1e-10)


def test_fused_linear_entropy_equals_plain_loops():
    made = problem(2)
    logits = made.logits().tolist()
    expected = [
        [by_loops(row, made.temperature) if real else 0.0 for row, real in zip(*rows, strict=True)]
        for rows in zip(logits, made.mask.tolist(), strict=True)
    ]
    close(fused(made, chunk_tokens=4), expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_entropy(softcap):
    made = problem(1, 2, 3, 3, 5, real=0.8, softcap=softcap, scale=0.5)
    made.hidden = torch.where(made.mask[..., None], made.hidden.detach(), 0.5).requires_grad_()

    def entropy(hidden, weight, bias):
        output = OutputLayer(weight, bias=bias, **made.of_logits)
        return fused_linear_entropy(hidden, output, made.mask, chunk_tokens=3)

    assert gradcheck(entropy, (made.hidden, made.weight, made.bias))


def test_a_bonus_makes_the_policy_less_sure():
    made = problem(3, bias=False)
    before = fused(made).sum()
    loss = -0.1 * aggregate(fused(made), made.mask)
    weight = made.weight.detach() - 0.5 * torch.autograd.grad(loss, made.weight)[0]
    made.weight = weight.requires_grad_()
    assert fused(made).sum() > before


def test_a_bonus_beside_a_loss_is_that_of_the_logits():
    made = problem(4)
    options = {"old_log_probs": made.old}
    bonus = 0.05 * aggregate(fused(made), made.mask)
    loss = grpo_loss(made.log_probs(), made.token_advantages, made.mask, **options).loss
    expected = loss - 0.05 * aggregate(plain(made), made.mask)
    actual = made.fused().loss - bonus
    close(actual, expected)
    for ours, wanted in zip(
        torch.autograd.grad(actual, made.leaves), torch.autograd.grad(expected, made.leaves), strict=True
    ):
        close(ours, wanted)


def test_fused_linear_entropy_of_barred_tokens_is_that_of_the_others():
    made = barred_problem()
    entropy, expected = fused(made, chunk_tokens=5), plain(made)
    close(entropy, expected)
    for actual, wanted in zip(gradients_of(entropy, made), gradients_of(expected, made), strict=True):
        assert actual.isfinite().all()
        close(actual, wanted)


@pytest.mark.parametrize("count", ["exact", "padded"])
def test_a_known_number_of_tokens_changes_no_entropy(count):
    made = problem(5, 4, 7)
    entropy = fused(made, chunk_tokens=5, active_tokens=int(made.mask.sum()) + (0 if count == "exact" else 3))
    close(entropy, fused(made))
    for actual, wanted in zip(gradients_of(entropy, made), gradients_of(fused(made), made), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_no_token_has_no_entropy_and_zero_gradients(shape):
    made = problem(0, *shape, real=0.0)
    entropy = fused(made)
    entropy.sum().backward()
    assert torch.equal(entropy, torch.zeros(shape, dtype=torch.float64))
    assert all((leaf.grad == 0).all() for leaf in made.leaves)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_the_entropy_and_its_gradients_keep_their_precision(dtype, bar):
    """Of logits in float32: half-precision inputs cost no more than the rounding of the gradients."""
    made = problem(6, 4, 16, 32, 200, dtype=dtype)
    entropy = fused(made, chunk_tokens=7)
    assert entropy.dtype == torch.float32
    expected = plain(made)
    close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = gradients_of(expected, made)
    for actual, truth in zip(gradients_of(entropy, made), wanted, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, truth.double()) < bar


@pytest.mark.parametrize(("frozen", "products"), [([], 4), (["weight"], 3)])
def test_the_cost_of_an_entropy_is_a_few_products_of_the_tokens_that_count(frozen, products):
    made = problem(6, 8, 16, real=0.3, bias=False)
    for leaf in frozen:
        getattr(made, leaf).requires_grad_(False)
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: mm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        fused(made).sum().backward()
    assert counter.get_total_flops() == products * 2 * made.mask.sum() * made.weight.numel()


def test_fused_linear_entropy_compiles_whole(fresh_compiler):
    made = problem(16, 3, 5, 16, 64, dtype=torch.float32, softcap=3.0)
    results = []
    for function in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        entropy = function(made, chunk_tokens=8)
        results.append((entropy.detach(), gradients_of(entropy, made)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"active_tokens": 1}, r"active_tokens is 1, but \d+ tokens are to be computed"),
    ],
)
def test_wrong_numbers_of_tokens_are_named(how, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fused(problem(19), **how)


def test_an_entropy_of_a_shard_is_refused():
    made = problem(19)
    made.of_logits["shard"] = VocabShard(0, lambda values, how: values)
    with pytest.raises(ValueError, match="needs the whole vocabulary; pass an output layer without a shard"):
        fused(made)
