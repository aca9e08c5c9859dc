"""The whole path: strength 0 is GRPO, one call equals its parts, compiled equals eager, options equal signatures."""

import dataclasses
import inspect
import io
import math
from dataclasses import replace
from typing import get_args

import pytest
import reference
import torch
from barred import barred_batches
from batches import batches
from helpers import as_lists, close, loss_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

from srpo_core import (
    OutputLayer,
    Role,
    RoleTags,
    ScaleState,
    aggregate,
    corrupt_images,
    corrupt_pixel_values,
    counterfactual_responses,
    fused_linear_grpo_loss,
    group_advantages,
    grpo_loss,
    kl_penalty,
    perception_consistency,
    role_advantages,
    segment_responses,
    segment_roles,
    shared_baseline_weights,
    srpo_advantages,
    srpo_loss,
    token_divergence,
    token_log_probs,
    visual_dependency,
)
from srpo_core.options import CreditOptions, LossOptions, SRPOConfig, WeightMap
from srpo_core.reliance import SpanCounterfactuals, apply_reliance, span_reliance
from srpo_core.surrogates import Clip
from srpo_core.weights import role_scales

TOKEN_RATIO = ["clip", "cispo", "sapo", "gspo_token"]


def contexts(batch):
    return {
        "corrupted_log_probs": batch.corrupted_log_probs,
        "counterfactual_log_probs": batch.counterfactual_log_probs,
    }


def credit_of(batch, options=CreditOptions(), **more):
    arguments = contexts(batch) | more
    return srpo_advantages(batch.old_log_probs, batch.advantages, batch.roles, batch.mask, options, **arguments)


def srpo(batch, options=SRPOConfig(), **more):
    others = contexts(batch) | {"old_log_probs": batch.old_log_probs} | more
    return loss_and_gradient(srpo_loss, batch, batch.advantages, batch.roles, batch.mask, options, **others)


def grpo(batch, advantages, options=LossOptions(), **more):
    others = {"old_log_probs": batch.old_log_probs} | more
    return loss_and_gradient(grpo_loss, batch, advantages, batch.mask, options, **others)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("surrogate", [*TOKEN_RATIO, "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=15)
def test_srpo_loss_of_strength_0_is_grpo_bit_for_bit(data, surrogate, dtype):
    batch = data.draw(batches(dtype=dtype))
    options = SRPOConfig(strength=0.0, surrogate=surrogate, kl_coef=0.05)
    with_reference = {"ref_log_probs": batch.ref_log_probs}
    assert_same(srpo(batch, options, **with_reference), grpo(batch, batch.token_advantages, options, **with_reference))


@given(batches(), st.sampled_from(["log_ratio", "positive", "abs", "k3"]), st.sampled_from([0.5, 5.0]))
def test_srpo_advantages_equals_its_parts_and_the_reference(batch, score, clip):
    whole = credit_of(batch, CreditOptions(visual_score=score, consistency_score=score, score_clip=clip))
    old, roles, mask = batch.old_log_probs, batch.roles, batch.mask
    visual = visual_dependency(old, roles, mask, corrupted_log_probs=batch.corrupted_log_probs, kind=score, clip=clip)
    consistency = perception_consistency(
        old, roles, mask, counterfactual_log_probs=batch.counterfactual_log_probs, kind=score, clip=clip
    )
    weights = shared_baseline_weights(visual + consistency, roles, mask)
    assert torch.equal(whole.scores, visual + consistency)
    assert torch.equal(whole.weights, weights)
    assert torch.equal(whole.advantages, role_advantages(weights, batch.advantages, mask))
    assert whole.scale_state is None
    assert whole.donors is None
    for name in ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs"):
        torch.testing.assert_close(getattr(whole, name), getattr(batch, name), rtol=0, atol=0, equal_nan=True)

    old, corrupted, counterfactual, roles, mask = as_lists(
        old, batch.corrupted_log_probs, batch.counterfactual_log_probs, roles, mask
    )
    of_perception = reference.scores(old, corrupted, roles, mask, reference.PERCEPTION, score, clip)
    of_reasoning = reference.scores(old, counterfactual, roles, mask, reference.REASONING, score, clip)
    joined = [
        [max(pair, key=abs) for pair in zip(*rows, strict=True)]
        for rows in zip(of_perception, of_reasoning, strict=True)
    ]
    expected = reference.weights(joined, roles, mask)
    close(whole.weights, expected)


@given(batches(), st.sampled_from(["product", "share"]))
def test_srpo_advantages_with_reliance_equals_its_parts(batch, mode):
    reliance = torch.where(batch.mask & (batch.roles == Role.PERCEPTION), batch.log_probs.exp(), torch.nan)
    options = CreditOptions(reliance_mode=mode)
    plain = credit_of(batch)
    whole = credit_of(batch, options, reliance=reliance)
    scores = apply_reliance(plain.scores, batch.roles, batch.mask, reliance=reliance, mode=mode)
    assert torch.equal(whole.scores, scores)
    assert torch.equal(whole.weights, shared_baseline_weights(scores, batch.roles, batch.mask))


@given(batches())
def test_srpo_loss_is_grpo_loss_on_the_weighted_advantages(batch):
    options = SRPOConfig(reduction="sequence_mean")
    assert_same(srpo(batch, options), grpo(batch, credit_of(batch).advantages, options))


@given(batches())
def test_no_corrupted_pass_means_no_visual_score(batch):
    without = credit_of(batch, corrupted_log_probs=None, counterfactual_log_probs=None)
    assert torch.equal(without.weights, batch.mask.double())
    same = credit_of(batch, corrupted_log_probs=batch.old_log_probs, counterfactual_log_probs=None)
    assert torch.equal(same.weights, without.weights)
    assert without.corrupted_log_probs is without.counterfactual_log_probs is None


@given(batches())
def test_infinite_log_probs_have_a_score_and_leave_finite_weights(batch):
    """A token that one context excludes scores the clip; one that both exclude, inf - inf, scores 0."""
    time = torch.arange(batch.mask.shape[1])
    without_old, without_corrupted = time % 4 < 2, time % 2 == 0
    old = batch.old_log_probs.masked_fill(batch.mask & without_old, -torch.inf)
    corrupted = batch.corrupted_log_probs.masked_fill(batch.mask & without_corrupted, -torch.inf)
    made = credit_of(replace(batch, old_log_probs=old, corrupted_log_probs=corrupted), counterfactual_log_probs=None)
    perception = batch.mask & (batch.roles == Role.PERCEPTION)
    for where, score in (
        (without_old & without_corrupted, 0.0),
        (without_old & ~without_corrupted, -5.0),
        (~without_old & without_corrupted, 5.0),
    ):
        assert (made.scores[perception & where] == score).all()
    expected = reference.weights(*as_lists(made.scores, batch.roles, batch.mask))
    close(made.weights, expected)
    assert made.weights.isfinite().all()


@pytest.mark.parametrize("name", [*TOKEN_RATIO, "gspo_token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@given(data=st.data())
@settings(max_examples=15)
def test_srpo_loss_of_barred_tokens_equals_the_reference(data, name, dtype):
    """Minus infinity anywhere in the five contexts: scores, weights, loss and slopes, all of them by plain loops."""
    batch = data.draw(barred_batches(dtype=dtype))
    options = SRPOConfig(surrogate=name, kl_coef=0.1, reduction="sum")
    loss, gradient = srpo(batch, options, ref_log_probs=batch.ref_log_probs)
    new, old, corrupted, counterfactual, ref, roles, mask = as_lists(
        batch.log_probs,
        batch.old_log_probs,
        batch.corrupted_log_probs,
        batch.counterfactual_log_probs,
        batch.ref_log_probs,
        batch.roles,
        batch.mask,
    )
    visual = reference.scores(old, corrupted, roles, mask, reference.PERCEPTION)
    consistency = reference.scores(old, counterfactual, roles, mask, reference.REASONING)
    scores = [[v + c for v, c in zip(*rows, strict=True)] for rows in zip(visual, consistency, strict=True)]
    weights = reference.weights(scores, roles, mask)
    advantages = [[a * w for w in row] for a, row in zip(batch.advantages.tolist(), weights, strict=True)]
    policy = reference.aggregate(reference.surrogate(new, old, advantages, mask, name), mask, "sum")
    kl = reference.aggregate(reference.kl_penalty(new, ref, mask), mask, "sum")
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-3}
    close(loss, policy + 0.1 * kl, **tolerance)
    # A sequence's ratio may be as large as exp(20): too much for a gradient in float16.
    wide = replace(batch, **{name: each.double() for name, each in vars(batch).items() if each.is_floating_point()})
    _, true_gradient = srpo(wide, options, ref_log_probs=wide.ref_log_probs)
    assert (gradient.isfinite() | (true_gradient.abs() > 0.99 * torch.finfo(dtype).max)).all()
    assert true_gradient.isfinite().all()
    assert (gradient[batch.log_probs.isneginf() | ~batch.mask] == 0).all()
    plain, slopes = srpo(batch, replace(options, kl_coef=0.0))
    assert plain.isfinite()
    if exact:
        close(slopes, reference.surrogate_slopes(new, old, advantages, mask, name), **tolerance)
    assert (slopes[batch.old_log_probs.isneginf()] == 0).all()


@given(barred_batches())
def test_divergences_may_be_infinite_where_a_context_bars_tokens(batch):
    divergence = torch.where(batch.log_probs.isneginf(), torch.inf, batch.scores.abs())
    for clip in (5.0, math.inf):
        options = CreditOptions(visual_score="full_kl", consistency_score="full_kl", score_clip=clip)
        made = credit_of(batch, options, visual_divergence=divergence, consistency_divergence=divergence)
        expected = torch.where(divergence.isinf(), 20.0, divergence).clamp(max=clip)
        assert torch.equal(made.scores, torch.where(batch.scored, expected, 0.0))
        assert made.weights.isfinite().all()


@given(batches())
def test_weights_depend_neither_on_the_cut_nor_on_neighbors_nor_on_padding(batch):
    together = credit_of(batch).advantages
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    for row in range(len(together)):
        alone = credit_of(replace(batch, **{name: tensor[row : row + 1] for name, tensor in tensors.items()}))
        close(alone.advantages[0], together[row])
    padded = {
        name: torch.nn.functional.pad(tensor, (0, 3)) if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    close(credit_of(replace(batch, **padded)).advantages[:, : batch.mask.shape[1]], together)


@pytest.mark.parametrize("score", ["full_kl", "reverse_kl", "jsd", "topk_kl"])
def test_a_divergence_is_read_from_its_own_argument(score):
    roles, mask = torch.tensor([[1, 1, 2, 2]]), torch.ones(1, 4).bool()
    divergence = torch.tensor([[9.0, 0.1, 0.1, 9.0]])
    rollout = torch.zeros(1, 4), torch.ones(1), roles, mask
    options = CreditOptions(visual_score=score, consistency_score=score)
    both = srpo_advantages(*rollout, options, visual_divergence=divergence, consistency_divergence=divergence)
    close(both.scores, [[5.0, 0.1, 0.1, 5.0]], rtol=1e-6)
    one = srpo_advantages(*rollout, CreditOptions(visual_score=score), visual_divergence=divergence)
    close(one.scores, [[5.0, 0.1, 0.0, 0.0]], rtol=1e-6)
    with pytest.raises(ValueError, match=f"visual_divergence is None; visual_score='{score}' needs token_divergence"):
        srpo_advantages(*rollout, CreditOptions(visual_score=score))
    with pytest.raises(ValueError, match="consistency_divergence is None"):
        srpo_advantages(*rollout, CreditOptions(consistency_score=score))


@given(batches())
def test_batch_scale_divides_by_the_root_mean_square(batch):
    made = credit_of(batch, CreditOptions(scale="batch_rms", visual_scale=2.0))
    measured, _ = role_scales(made.scores, batch.roles, batch.mask)
    by_hand = measured._replace(visual=2.0 * measured.visual)
    close(made.weights, shared_baseline_weights(made.scores, batch.roles, batch.mask, scales=by_hand))


def test_the_moving_scale_survives_a_checkpoint():
    g = torch.Generator().manual_seed(0)
    roles, mask = torch.randint(0, 3, (4, 16), generator=g), torch.ones(4, 16).bool()

    def step(state):
        old, corrupted, counterfactual = (torch.randn(4, 16, generator=g) for _ in range(3))
        return srpo_advantages(
            old,
            torch.ones(4),
            roles,
            mask,
            CreditOptions(scale="ema_rms"),
            corrupted_log_probs=corrupted,
            counterfactual_log_probs=counterfactual,
            scale_state=state,
        )

    state = step(step(None).scale_state).scale_state
    file = io.BytesIO()
    torch.save({"generator": g.get_state(), "scale": state._asdict()}, file)
    straight = step(state)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    g.set_state(saved["generator"])
    resumed = step(ScaleState(**saved["scale"]))
    assert torch.equal(resumed.weights, straight.weights)


@given(batches())
def test_metrics(batch):
    broken = (torch.arange(len(batch.mask)) % 3).to(torch.int64)
    made = credit_of(batch, broken=broken)
    metrics, weights = made.metrics, made.weights
    for name, role in (("perception", Role.PERCEPTION), ("reasoning", Role.REASONING)):
        where = batch.mask & (batch.roles == role)
        if where.any():
            close(metrics[f"weight/{name}/mean"], weights[where].mean())
            close(metrics[f"weight/{name}/min"], weights[where].min())
            close(metrics[f"weight/{name}/max"], weights[where].max())
            close(metrics[f"weight/{name}/mass"], weights[where].sum() / weights.sum())
            close(metrics[f"score/{name}/mean"], made.scores[where].mean())
        else:
            assert metrics[f"weight/{name}/mean"].isnan()
            assert metrics[f"score/{name}/mean"].isnan()
            assert not batch.mask.any() or metrics[f"weight/{name}/mass"] == 0
    real = batch.mask.any(1)
    if real.any():
        close(metrics["structured/fraction"], batch.scored.any(1)[real].double().mean())
        close(metrics["broken/fraction"], (broken[real] > 0).double().mean())
        close(metrics["broken/no_perception"], (broken[real] == 1).double().mean())
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())
    assert "broken/fraction" not in credit_of(batch).metrics


def test_gradient_of_the_whole_loss():
    g = torch.Generator().manual_seed(5)
    old = -torch.rand(3, 6, generator=g, dtype=torch.float64)
    log_probs = (old + 0.02 * torch.randn(3, 6, generator=g, dtype=torch.float64)).requires_grad_()
    corrupted, counterfactual = (old + torch.randn(3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    roles, mask = torch.randint(0, 3, (3, 6), generator=g), torch.rand(3, 6, generator=g) < 0.8
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    def loss(log_probs, surrogate):
        options = SRPOConfig(kl_coef=0.1, surrogate=surrogate)
        return srpo_loss(
            log_probs,
            advantages,
            roles,
            mask,
            options,
            old_log_probs=old,
            corrupted_log_probs=corrupted,
            counterfactual_log_probs=counterfactual,
            ref_log_probs=old - 0.1,
        ).loss

    for surrogate in ("clip", "sapo"):
        assert gradcheck(lambda x, surrogate=surrogate: loss(x, surrogate), (log_probs,))


# What is refused


def nothing(batch=1, time=2):
    """Log-probs of 0, advantages of 1, all tokens perception and real."""
    shape = batch, time
    return torch.zeros(shape), torch.ones(batch), torch.ones(shape).long(), torch.ones(shape).bool()


def test_a_sequence_ratio_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"surrogate='gspo' with strength=1.0: GSPO's sequence-level ratio"):
        SRPOConfig(surrogate="gspo")
    assert SRPOConfig(surrogate="gspo", strength=0.0).surrogate.is_one_ratio
    assert SRPOConfig(surrogate="gspo", mix=0.0).surrogate.is_one_ratio


def test_a_state_on_the_step_path_is_refused_with_the_way_out():
    log_probs, *rollout = nothing()
    with pytest.raises(ValueError, match="scale='ema_rms' has a state .* call srpo_advantages once per rollout batch"):
        srpo_loss(log_probs, *rollout, SRPOConfig(scale="ema_rms"), old_log_probs=log_probs)


def test_tensors_that_were_exchanged_are_refused():
    log_probs, *rollout = nothing()
    policy = log_probs.clone().requires_grad_()
    with pytest.raises(ValueError, match="old_log_probs requires a gradient and log_probs does not"):
        srpo_loss(log_probs, *rollout, old_log_probs=policy)


@pytest.mark.parametrize("name", ["old_log_probs", "corrupted_log_probs", "counterfactual_log_probs"])
def test_nan_at_a_real_token_is_named(name):
    log_probs, *rollout = nothing(2, 3)
    others = dict.fromkeys(("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs"), log_probs)
    others[name] = log_probs.clone()
    others[name][1, 2] = math.nan
    message = rf"{name} is NaN at trajectory 1 token 2 \(1 such values"
    with pytest.raises(ValueError, match=message):
        srpo_loss(log_probs, *rollout, **others)
    old = others.pop("old_log_probs")
    with pytest.raises(ValueError, match=message):
        srpo_advantages(old, *rollout, **others)


@pytest.mark.parametrize("name", ["old_log_probs", "corrupted_log_probs", "counterfactual_log_probs"])
def test_plus_infinity_at_a_real_token_is_named(name):
    log_probs, *rollout = nothing(2, 3)
    others = dict.fromkeys(("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs"), log_probs)
    others[name] = log_probs.clone()
    others[name][1, 2] = math.inf
    with pytest.raises(ValueError, match=rf"{name} is inf at trajectory 1 token 2 \(1 such values.* barred token"):
        srpo_loss(log_probs, *rollout, **others)


def test_nan_is_refused_only_where_it_is_read():
    """A divergence may be NaN at tokens of the other role, and so may the reliance."""
    log_probs, advantages, roles, mask = nothing(1, 3)
    roles = torch.tensor([[1, 2, 0]])
    options = CreditOptions(visual_score="jsd", consistency_score="jsd")
    visual, consistency = torch.tensor([[0.5, math.nan, math.nan]]), torch.tensor([[math.nan, 0.5, math.nan]])
    rollout = log_probs, advantages, roles, mask, options
    made = srpo_advantages(*rollout, visual_divergence=visual, consistency_divergence=consistency, reliance=visual)
    assert made.weights.isfinite().all()
    for change, name in (
        ({"visual_divergence": consistency}, "visual_divergence"),
        ({"consistency_divergence": visual}, "consistency_divergence"),
        ({"reliance": consistency}, "reliance"),
    ):
        fine = {"visual_divergence": visual, "consistency_divergence": consistency, "reliance": visual}
        with pytest.raises(ValueError, match=f"{name} is NaN at trajectory 0 token"):
            srpo_advantages(*rollout, **(fine | change))


def test_empty_and_all_broken_batches_are_neutral():
    for shape in [(0, 4), (3, 0), (3, 4)]:
        log_probs = torch.zeros(shape, requires_grad=True)
        zeros, roles = torch.zeros(shape), torch.zeros(shape).long()
        loss, metrics = srpo_loss(
            log_probs,
            torch.ones(shape[0]),
            roles,
            torch.ones(shape).bool(),
            old_log_probs=zeros,
            corrupted_log_probs=zeros - 1,
            counterfactual_log_probs=zeros - 2,
        )
        loss.backward()
        assert loss.isfinite()
        assert metrics["weight/perception/mean"].isnan()
        assert metrics["structured/fraction"].isnan() if 0 in shape else metrics["structured/fraction"] == 0


# torch.compile


def path_inputs(batch, time, seed):
    """Five tensors of log-probs, then roles, advantages and mask."""
    g = torch.Generator().manual_seed(seed)
    log_probs = [torch.randn(batch, time, generator=g) for _ in range(5)]
    return (
        *log_probs,
        torch.randint(0, 3, (batch, time), generator=g),
        torch.randn(batch, generator=g),
        torch.rand(batch, time, generator=g) < 0.9,
    )


def path(options, log_probs, old, corrupted, counterfactual, ref, roles, advantages, mask):
    loss, metrics = srpo_loss(
        log_probs,
        advantages,
        roles,
        mask,
        options,
        old_log_probs=old,
        corrupted_log_probs=corrupted,
        counterfactual_log_probs=counterfactual,
        ref_log_probs=ref,
    )
    return loss, metrics["weight/perception/mean"], metrics["ratio/max"]


OPTIONS = SRPOConfig(kl_coef=0.1, surrogate=Clip(dual=3.0), baseline="median")


def test_compiled_whole_equals_eager(fresh_compiler):
    """The second batch makes a second graph, of any shape."""
    compiled = torch.compile(path, fullgraph=True, backend="aot_eager")
    for batch, time in ((3, 8), (5, 11)):
        inputs = path_inputs(batch, time, seed=batch)
        results = []
        for function in (path, compiled):
            log_probs = inputs[0].clone().requires_grad_()
            loss, *metrics = function(OPTIONS, log_probs, *inputs[1:])
            loss.backward()
            results.append((loss.detach(), log_probs.grad, *metrics))
        for eager, whole in zip(*results, strict=True):
            torch.testing.assert_close(whole, eager)


def test_compiled_by_inductor_equals_eager(cpp_compiler, fresh_compiler):
    inputs = path_inputs(3, 8, seed=0)
    compiled = torch.compile(path, fullgraph=True)
    for mix in (1.0, 0.3):
        options = replace(OPTIONS, mix=mix)
        torch.testing.assert_close(compiled(options, *inputs), path(options, *inputs))


def test_a_ramp_of_mix_makes_two_graphs_at_most(fresh_compiler):
    """One for the first value, one for all others: a graph for each step would end a compiled run at the ninth."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(path, fullgraph=True, backend=graphs)
    inputs = path_inputs(3, 8, seed=0)
    ramped = replace(OPTIONS, mix_warmup_steps=10)
    seen = []
    for step in range(11):
        options = ramped.at_step(step)
        for whole, eager in zip(compiled(options, *inputs), path(options, *inputs), strict=True):
            torch.testing.assert_close(whole, eager, rtol=1e-6, atol=1e-7)
        seen.append(options.mix)
    close(torch.tensor(seen), [step / 10 for step in range(11)])
    assert graphs.frame_count <= 2


def test_the_fused_loss_takes_options_and_output_layers_into_one_graph(fresh_compiler):
    graphs = CompileCounterWithBackend("aot_eager")

    def loss(hidden, output, advantages, options):
        made = fused_linear_grpo_loss(hidden, output, ids, advantages, mask, options, old_log_probs=old)
        return made.loss, made.metrics["ratio/max"]

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    _, old, *_, roles, advantages, mask = path_inputs(3, 8, seed=0)
    g = torch.Generator().manual_seed(1)
    ids, hidden = torch.randint(11, (3, 8), generator=g), torch.randn(3, 8, 4, generator=g)
    for step in range(11):
        weight = torch.randn(11, 4, generator=g)
        output = OutputLayer(
            weight, bias=torch.randn(11, generator=g), temperature=0.7, logit_softcap=3.0, logit_scale=0.5
        )
        options = replace(OPTIONS, kl_coef=0.0, mix_warmup_steps=10).at_step(step)
        weights = shared_baseline_weights(old, roles, mask, options)
        inputs = hidden, output, role_advantages(weights, advantages, mask), options
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    assert graphs.frame_count <= 2


def tempered(centered, scored, strength):
    return (strength * centered.clamp(-1.0, 1.0)).exp()


def largest(scores, masks):
    return torch.where(masks.scored(), scores, -torch.inf).amax(1, keepdim=True).clamp(min=-5.0)


def test_functions_of_the_user_are_baseline_and_map_in_eager_mode_and_compiled(fresh_compiler):
    inputs = path_inputs(3, 8, seed=0)
    old, roles, mask = inputs[1], inputs[5], inputs[7]
    options = SRPOConfig(weight_map=tempered, baseline=largest, kl_coef=0.1, strength=0.5)
    weights = shared_baseline_weights(old, roles, mask, options)
    for row in range(3):
        scored = mask[row] & (roles[row] > 0)
        scores = old[row][scored].double()
        values = torch.exp(0.5 * (scores - scores.max()).clamp(-1.0, 1.0))
        close(weights[row][scored].double(), values / values.mean(), rtol=1e-5, atol=1e-6)
        assert (weights[row][mask[row] & ~scored] == 1.0).all()
    compiled = torch.compile(path, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(options, *inputs), path(options, *inputs))


def test_every_tensor_function_compiles_whole(fresh_compiler):
    log_probs, old, corrupted, counterfactual, ref, roles, advantages, mask = path_inputs(3, 8, seed=0)
    logits, ids, groups = torch.randn(3, 8, 11), torch.randint(11, (3, 8)), torch.tensor([0, 1, 0])
    scores = log_probs - old
    ramped = CreditOptions(scale="ema_rms", mix_warmup_steps=4).at_step(3)
    surrogates = {name: LossOptions(surrogate=name) for name in (*TOKEN_RATIO, "gspo")}
    maps = {name: CreditOptions(weight_map=name) for name in get_args(WeightMap)}
    calls = {
        "token_log_probs": lambda: token_log_probs(logits, ids, temperature=0.5),
        "token_divergence": lambda: token_divergence(logits, other_logits=2 * logits, kind="topk_kl", top_k=3),
        "visual_dependency": lambda: visual_dependency(old, roles, mask, corrupted_log_probs=corrupted),
        "perception_consistency": lambda: perception_consistency(
            old, roles, mask, counterfactual_log_probs=counterfactual, kind="k3"
        ),
        "apply_reliance": lambda: apply_reliance(scores, roles, mask, reliance=ref.exp(), mode="share"),
        "span_reliance": lambda: span_reliance(
            old,
            roles,
            mask,
            without_log_probs=torch.stack([corrupted, counterfactual]),
            spans=groups[:, None] + ids * 0,
        ),
        "group_advantages": lambda: group_advantages(advantages, groups),
        "role_advantages": lambda: role_advantages(scores, advantages, mask),
        "kl_penalty": lambda: kl_penalty(log_probs, mask, ref_log_probs=ref),
        "aggregate": lambda: aggregate(log_probs, mask, reduction="sequence_mean"),
        "role_scales": lambda: role_scales(scores, roles, mask, decay=0.5),
        "srpo_advantages": lambda: (
            srpo_advantages(old, advantages, roles, mask, ramped, corrupted_log_probs=corrupted).advantages
        ),
        **{
            f"surrogate {name}": lambda options=options: (
                grpo_loss(log_probs, advantages[:, None].expand(3, 8), mask, options, old_log_probs=old).loss
            )
            for name, options in surrogates.items()
        },
        **{
            f"map {name}": lambda options=options: shared_baseline_weights(scores, roles, mask, options)
            for name, options in maps.items()
        },
    }
    for name, call in calls.items():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), call(), msg=lambda text, name=name: f"{name}: {text}")


# Options

# A keyword of a leaf and the option that a composite hands on to it.
LEAVES = {
    corrupt_images: {"kind": "corruption", "amount": "corruption_amount", "seed": "seed"},
    corrupt_pixel_values: {"kind": "corruption", "amount": "corruption_amount", "seed": "seed"},
    counterfactual_responses: {"kind": "counterfactual"},
    segment_roles: {"answer_role": "answer_role"},
    segment_responses: {"answer_role": "answer_role", "tags": "tags"},
    visual_dependency: {"kind": "visual_score", "clip": "score_clip"},
    perception_consistency: {"kind": "consistency_score", "clip": "score_clip"},
    span_reliance: {"clip": "score_clip"},
    SpanCounterfactuals.reliance: {"clip": "score_clip"},
    apply_reliance: {"mode": "reliance_mode"},
    group_advantages: {"normalization": "normalization", "epsilon": "epsilon"},
    kl_penalty: {"estimator": "kl_estimator"},
    aggregate: {"reduction": "reduction"},
}


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_defaults_of_the_leaves_are_those_of_the_options(leaf):
    parameters = inspect.signature(leaf).parameters
    for argument, option in LEAVES[leaf].items():
        assert parameters[argument].default == getattr(SRPOConfig(), option), argument


def test_the_default_tags_are_those_of_the_options():
    assert SRPOConfig().tags == RoleTags()


@pytest.mark.parametrize(
    ("composite", "group"),
    [
        (srpo_advantages, CreditOptions),
        (shared_baseline_weights, CreditOptions),
        (srpo_loss, SRPOConfig),
        (grpo_loss, LossOptions),
        (fused_linear_grpo_loss, LossOptions),
    ],
    ids=lambda x: x.__name__,
)
def test_composites_take_one_object_of_options_that_the_whole_config_is_too(composite, group):
    options = inspect.signature(composite).parameters["options"]
    assert options.annotation is group
    assert options.default == group()
    assert isinstance(SRPOConfig(), group)
    names = {field.name for field in dataclasses.fields(SRPOConfig)}
    assert not names & set(inspect.signature(composite).parameters), "an option has one place"
