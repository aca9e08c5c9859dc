"""The whole path: strength 0 is GRPO, one call equals its parts, compiled equals eager, config equals signatures."""

import dataclasses
import inspect
import io
import math
from dataclasses import replace

import pytest
import reference
import torch
from batches import batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import srpo_core
from srpo_core import (
    Role,
    RoleTags,
    SRPOConfig,
    group_advantages,
    grpo_loss,
    kl_penalty,
    perception_consistency,
    role_advantages,
    shared_baseline_weights,
    srpo_advantages,
    srpo_loss,
    token_log_probs,
    visual_dependency,
)

TOKEN_RATIO = ["clip", "cispo", "sapo", "gspo_token"]


def rollout(batch):
    return (
        batch.old_log_probs,
        batch.corrupted_log_probs,
        batch.counterfactual_log_probs,
        batch.roles,
        batch.advantages,
        batch.mask,
    )


def close(actual, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


def loss_and_gradient(function, batch, *args, **options):
    log_probs = batch.log_probs.clone().requires_grad_()
    loss = function(log_probs, *args, **options).loss
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


@pytest.mark.parametrize("surrogate", [*TOKEN_RATIO, "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=15)
def test_invariant_3_strength_zero_is_grpo_bit_for_bit(data, surrogate, dtype):
    batch = data.draw(batches(dtype=dtype))
    options = {"surrogate": surrogate, "ref_log_probs": batch.ref_log_probs, "kl_coef": 0.05}
    srpo = loss_and_gradient(srpo_loss, batch, *rollout(batch), strength=0.0, **options)
    grpo = loss_and_gradient(grpo_loss, batch, batch.old_log_probs, batch.token_advantages, batch.mask, **options)
    assert torch.equal(srpo[0], grpo[0])
    assert torch.equal(srpo[1], grpo[1])


@given(batches(), st.sampled_from(["log_ratio", "positive", "abs", "k3"]), st.sampled_from([0.5, 5.0]))
def test_one_call_equals_its_parts_and_the_reference(batch, score, clip):
    whole = srpo_advantages(*rollout(batch), visual_score=score, consistency_score=score, score_clip=clip)
    visual = visual_dependency(
        batch.old_log_probs, batch.corrupted_log_probs, batch.roles, batch.mask, kind=score, clip=clip
    )
    consistency = perception_consistency(
        batch.old_log_probs, batch.counterfactual_log_probs, batch.roles, batch.mask, kind=score, clip=clip
    )
    weights = shared_baseline_weights(visual, consistency, batch.roles, batch.mask)
    assert torch.equal(whole.visual_dependency, visual)
    assert torch.equal(whole.perception_consistency, consistency)
    assert torch.equal(whole.weights, weights)
    assert torch.equal(whole.advantages, role_advantages(weights, batch.advantages, batch.mask))
    assert whole.scale_state is None

    old, corrupted, counterfactual, roles, _, mask = (tensor.tolist() for tensor in rollout(batch))
    expected = reference.weights(
        reference.scores(old, corrupted, roles, mask, reference.PERCEPTION, score, clip),
        reference.scores(old, counterfactual, roles, mask, reference.REASONING, score, clip),
        roles,
        mask,
    )
    close(whole.weights, expected)


@given(batches())
def test_the_loss_is_grpo_on_the_weighted_advantages(batch):
    credit = srpo_advantages(*rollout(batch))
    whole = loss_and_gradient(srpo_loss, batch, *rollout(batch), reduction="sequence_mean")
    parts = loss_and_gradient(
        grpo_loss, batch, batch.old_log_probs, credit.advantages, batch.mask, reduction="sequence_mean"
    )
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@given(batches())
def test_no_corrupted_pass_means_no_visual_score(batch):
    without = srpo_advantages(batch.old_log_probs, None, None, *rollout(batch)[3:])
    assert torch.equal(without.weights, batch.mask.double())
    same = srpo_advantages(batch.old_log_probs, batch.old_log_probs, None, *rollout(batch)[3:])
    assert torch.equal(same.weights, without.weights)


@given(batches())
def test_invariant_12_finite_under_minus_infinity(batch):
    spike = torch.where(batch.mask & (torch.arange(batch.mask.shape[1]) % 2 == 0), -torch.inf, 0.0)
    batch = replace(batch, corrupted_log_probs=batch.corrupted_log_probs + spike, old_log_probs=batch.old_log_probs)
    assert srpo_advantages(*rollout(batch)).weights.isfinite().all()


@given(batches())
def test_invariant_16_weights_depend_neither_on_the_step_nor_on_the_cut_nor_on_neighbours(batch):
    together = srpo_advantages(*rollout(batch)).advantages
    for row in range(len(together)):
        alone = srpo_advantages(*(tensor[row : row + 1] for tensor in rollout(batch))).advantages
        close(alone[0], together[row])
    time = batch.mask.shape[1]
    padded = [torch.nn.functional.pad(tensor, (0, 3)) if tensor.ndim == 2 else tensor for tensor in rollout(batch)]
    close(srpo_advantages(*padded).advantages[:, :time], together)


@pytest.mark.parametrize("score", ["full_kl", "reverse_kl", "jsd", "topk_kl"])
def test_a_divergence_is_read_from_its_own_argument(score):
    roles, mask = torch.tensor([[1, 1, 2, 2]]), torch.ones(1, 4).bool()
    divergence = torch.tensor([[9.0, 0.1, 0.1, 9.0]])
    old = torch.zeros(1, 4)
    credit = srpo_advantages(
        old,
        None,
        None,
        roles,
        torch.ones(1),
        mask,
        visual_score=score,
        consistency_score=score,
        visual_divergence=divergence,
        consistency_divergence=divergence,
    )
    close(credit.visual_dependency, [[5.0, 0.1, 0.0, 0.0]], rtol=1e-6)
    close(credit.perception_consistency, [[0.0, 0.0, 0.1, 5.0]], rtol=1e-6)
    with pytest.raises(ValueError, match=f"visual_divergence is None; visual_score='{score}' needs token_divergence"):
        srpo_advantages(old, None, None, roles, torch.ones(1), mask, visual_score=score)
    with pytest.raises(ValueError, match="consistency_divergence is None"):
        srpo_advantages(old, None, None, roles, torch.ones(1), mask, consistency_score=score)


@given(batches())
def test_batch_scale_divides_by_the_root_mean_square(batch):
    credit = srpo_advantages(*rollout(batch), scale="batch_rms", visual_scale=2.0)
    scales, _ = srpo_core.role_scales(credit.visual_dependency, credit.perception_consistency, batch.roles, batch.mask)
    expected = shared_baseline_weights(
        credit.visual_dependency,
        credit.perception_consistency,
        batch.roles,
        batch.mask,
        visual_scale=2.0 * scales.visual,
        consistency_scale=scales.consistency,
    )
    close(credit.weights, expected)


def test_the_moving_scale_survives_a_checkpoint():
    g = torch.Generator().manual_seed(0)
    roles, mask = torch.randint(0, 3, (4, 16), generator=g), torch.ones(4, 16).bool()

    def step(state):
        old, corrupted, counterfactual = (torch.randn(4, 16, generator=g) for _ in range(3))
        return srpo_advantages(
            old, corrupted, counterfactual, roles, torch.ones(4), mask, scale="ema_rms", scale_state=state
        )

    state = step(step(None).scale_state).scale_state
    file = io.BytesIO()
    torch.save({"generator": g.get_state(), "scale": state._asdict()}, file)
    straight = step(state)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    g.set_state(saved["generator"])
    resumed = step(srpo_core.ScaleState(**saved["scale"]))
    assert torch.equal(resumed.weights, straight.weights)


@given(batches())
def test_metrics(batch):
    broken = (torch.arange(len(batch.mask)) % 3).to(torch.int64)
    credit = srpo_advantages(*rollout(batch), broken=broken)
    metrics, weights = credit.metrics, credit.weights
    for name, role, scores in (
        ("perception", Role.PERCEPTION, credit.visual_dependency),
        ("reasoning", Role.REASONING, credit.perception_consistency),
    ):
        where = batch.mask & (batch.roles == role)
        if where.any():
            close(metrics[f"weight/{name}/mean"], weights[where].mean())
            close(metrics[f"weight/{name}/min"], weights[where].min())
            close(metrics[f"weight/{name}/max"], weights[where].max())
            close(metrics[f"weight/{name}/mass"], weights[where].sum() / weights.sum())
            close(metrics[f"score/{name}/mean"], scores[where].mean())
        else:
            assert metrics[f"weight/{name}/mean"] == 1
            assert metrics[f"weight/{name}/mass"] == metrics[f"score/{name}/mean"] == 0
    real = batch.mask.any(1)
    if real.any():
        close(metrics["structured/fraction"], batch.scored.any(1)[real].double().mean())
        close(metrics["broken/fraction"], (broken[real] > 0).double().mean())
        close(metrics["broken/no_perception"], (broken[real] == 1).double().mean())
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())
    assert "broken/fraction" not in srpo_advantages(*rollout(batch)).metrics


def test_gradient_of_the_whole_loss():
    g = torch.Generator().manual_seed(5)
    old = -torch.rand(3, 6, generator=g, dtype=torch.float64)
    log_probs = (old + 0.02 * torch.randn(3, 6, generator=g, dtype=torch.float64)).requires_grad_()
    others = [old + torch.randn(3, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    roles, mask = torch.randint(0, 3, (3, 6), generator=g), torch.rand(3, 6, generator=g) < 0.8
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    for surrogate in ("clip", "sapo"):
        assert gradcheck(
            lambda x, surrogate=surrogate: (
                srpo_loss(
                    x, old, *others, roles, advantages, mask, ref_log_probs=old - 0.1, kl_coef=0.1, surrogate=surrogate
                ).loss
            ),
            (log_probs,),
        )


def test_sequence_ratio_is_refused_with_the_reason():
    zeros, roles, mask = torch.zeros(1, 2), torch.ones(1, 2).long(), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match=r"surrogate='gspo' with strength=1.0: GSPO's sequence-level ratio"):
        srpo_loss(zeros, zeros, None, None, roles, torch.ones(1), mask, surrogate="gspo")
    with pytest.raises(ValueError, match="surrogate='gspo'"):
        SRPOConfig(surrogate="gspo")
    assert SRPOConfig(surrogate="gspo", strength=0.0).strength == 0.0


def test_a_state_on_the_step_path_is_refused_with_the_way_out():
    zeros, roles, mask = torch.zeros(1, 2), torch.ones(1, 2).long(), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match="scale='ema_rms' has a state .* call srpo_advantages once per rollout batch"):
        srpo_loss(zeros, zeros, None, None, roles, torch.ones(1), mask, scale="ema_rms")


@pytest.mark.parametrize(
    ("position", "name"), [(0, "old_log_probs"), (1, "corrupted_log_probs"), (2, "counterfactual_log_probs")]
)
def test_nan_at_a_real_token_is_named(position, name):
    tensors = [torch.zeros(2, 3) for _ in range(3)]
    tensors[position][1, 2] = math.nan
    args = (*tensors, torch.ones(2, 3).long(), torch.ones(2), torch.ones(2, 3).bool())
    message = rf"{name} is NaN at trajectory 1 token 2 \(1 such values"
    with pytest.raises(ValueError, match=message):
        srpo_advantages(*args)
    with pytest.raises(ValueError, match=message):
        srpo_loss(torch.zeros(2, 3), *args)


def test_empty_and_all_broken_batches_are_neutral():
    for shape in [(0, 4), (3, 0), (3, 4)]:
        log_probs = torch.zeros(shape, requires_grad=True)
        zeros, roles = torch.zeros(shape), torch.zeros(shape).long()
        loss, metrics = srpo_loss(
            log_probs, zeros, zeros - 1, zeros - 2, roles, torch.ones(shape[0]), torch.ones(shape).bool()
        )
        loss.backward()
        assert loss.isfinite()
        assert metrics["weight/perception/mean"] == 1
        assert metrics["structured/fraction"] == 0


# torch.compile


def path(log_probs, old, corrupted, counterfactual, ref, roles, advantages, mask):
    loss, metrics = srpo_loss(
        log_probs,
        old,
        corrupted,
        counterfactual,
        roles,
        advantages,
        mask,
        ref_log_probs=ref,
        kl_coef=0.1,
        dual_clip=3.0,
        baseline="median",
    )
    return loss, metrics["weight/perception/mean"], metrics["ratio/max"]


def path_inputs(batch, time, seed):
    g = torch.Generator().manual_seed(seed)
    log_probs = [torch.randn(batch, time, generator=g) for _ in range(5)]
    return (
        *log_probs,
        torch.randint(0, 3, (batch, time), generator=g),
        torch.randn(batch, generator=g),
        torch.rand(batch, time, generator=g) < 0.9,
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_equals_eager(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(path, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, time in ((3, 8), (5, 11)):
        inputs = path_inputs(batch, time, seed=batch)
        results = []
        for function in (path, compiled):
            log_probs = inputs[0].clone().requires_grad_()
            loss, *metrics = function(log_probs, *inputs[1:])
            loss.backward()
            results.append((loss.detach(), log_probs.grad, *metrics))
        for eager, whole in zip(*results, strict=True):
            torch.testing.assert_close(whole, eager)


def test_compiled_by_inductor_equals_eager(cpp_compiler):
    torch.compiler.reset()
    inputs = path_inputs(3, 8, seed=0)
    torch.testing.assert_close(torch.compile(path, fullgraph=True)(*inputs), path(*inputs))


def test_every_tensor_function_compiles_whole():
    torch.compiler.reset()
    log_probs, old, *_, roles, advantages, mask = path_inputs(3, 8, seed=0)
    logits, ids, groups = torch.randn(3, 8, 11), torch.randint(11, (3, 8)), torch.tensor([0, 1, 0])
    calls = {
        "token_log_probs": lambda: token_log_probs(logits, ids, temperature=0.5),
        "token_divergence": lambda: srpo_core.token_divergence(logits, 2 * logits, kind="topk_kl", top_k=3),
        "group_advantages": lambda: group_advantages(advantages, groups),
        "kl_penalty": lambda: kl_penalty(log_probs, old, mask),
        "role_scales": lambda: srpo_core.role_scales(log_probs, old, roles, mask, decay=0.5),
        **{
            f"surrogate {name}": lambda name=name: (
                grpo_loss(log_probs, old, advantages[:, None].expand(3, 8), mask, surrogate=name).loss
            )
            for name in (*TOKEN_RATIO, "gspo")
        },
        **{
            f"map {name}": lambda name=name: shared_baseline_weights(log_probs, old, roles, mask, weight_map=name)
            for name in ("exp_clip", "one_plus_tanh", "sigmoid", "softplus", "softmax")
        },
    }
    for name, call in calls.items():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), call(), msg=lambda text, name=name: f"{name}: {text}")


# SRPOConfig


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def test_config_defaults_equal_the_functions_and_every_option_is_there():
    config = {f.name: getattr(SRPOConfig(), f.name) for f in dataclasses.fields(SRPOConfig)}
    tensors = {
        "broken",
        "visual_divergence",
        "consistency_divergence",
        "scale_state",
        "ref_log_probs",
        "normalizer",
        "perception_use",
    }
    for function in (srpo_advantages, srpo_loss, grpo_loss, group_advantages):
        options = {name: value for name, value in defaults(function).items() if name not in tensors}
        assert {name: config[name] for name in options} == options
    for function, renamed in (
        (srpo_core.corrupt_images, {"kind": "corruption", "strength": "corruption_strength", "seed": "seed"}),
        (srpo_core.corrupt_pixel_values, {"kind": "corruption", "strength": "corruption_strength", "seed": "seed"}),
        (srpo_core.counterfactual_responses, {"kind": "counterfactual"}),
        (srpo_core.segment_roles, {"answer_role": "answer_role"}),
        (srpo_core.segment_responses, {"answer_role": "answer_role", "tags": "tags"}),
        (shared_baseline_weights, {name: name for name in ("visual_scale", "bound", "mix", "sign")}),
        (visual_dependency, {"kind": "visual_score", "clip": "score_clip"}),
        (perception_consistency, {"kind": "consistency_score", "clip": "score_clip"}),
    ):
        for argument, option in renamed.items():
            assert defaults(function)[argument] == config[option], (function.__name__, argument)
    assert config["tags"] == RoleTags()


def test_config_options_are_what_the_functions_take():
    config = SRPOConfig(strength=0.5, kl_coef=0.1, mix_warmup_steps=4)
    assert set(config.advantage_options()) < set(inspect.signature(srpo_advantages).parameters)
    assert {*config.advantage_options(), *config.loss_options()} < set(inspect.signature(srpo_loss).parameters)
    moving = dataclasses.replace(config, scale="ema_rms", scale_decay=0.5)
    assert moving.advantage_options()["scale_decay"] == 0.5
    assert set(config.loss_options()) < set(inspect.signature(grpo_loss).parameters)
    assert [config.advantage_options(step=step)["mix"] for step in (0, 2, 9)] == [0.0, 0.5, 1.0]
    assert config.advantage_options()["mix"] == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strength = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corruption": "blurr"}, "corruption must be one of 'patch_mask', .*got 'blurr'"),
        ({"counterfactual": "remove"}, "counterfactual must be one of 'swap', 'drop', 'mask'"),
        ({"counterfactual_image": "black"}, "counterfactual_image must be one of 'kept', 'corrupted'"),
        ({"visual_score": "kl"}, "visual_score must be one of"),
        ({"baseline": "mean"}, "baseline must be one of"),
        ({"strength": -1.0}, "strength must be in"),
        ({"clip_low": 2.0}, "clip_low must be in"),
        ({"dual_clip": 0.5}, "dual_clip must be above 1"),
        ({"mix": 2.0}, "mix must be in"),
        ({"score_clip": 0.0}, "clip must be above 0"),
        ({"scale": "ema_rms", "scale_decay": 1.0}, "decay must be in"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
        ({"mix_warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"epsilon": -1.0}, "epsilon must be at least 0"),
        ({"corruption_strength": -1.0}, "strength"),
        ({"use": "sum"}, "use must be one of 'product', 'share', got 'sum'"),
        ({"use_spans": -1}, "use_spans must be a whole number of at least 0, got -1; pass 0 for no use score"),
        ({"use_spans": 2.5}, "use_spans must be a whole number of at least 0, got 2.5"),
        ({"use_spans": "4"}, "use_spans must be a whole number of at least 0, got '4'"),
        ({"use_spans": True}, "use_spans must be a whole number of at least 0, got True"),
    ],
)
def test_config_refuses_what_the_functions_would_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        SRPOConfig(**change)


def test_config_says_how_many_passes_the_use_score_takes():
    assert SRPOConfig().use_passes == 0
    assert SRPOConfig(use_spans=3).use_passes == 3
    # GRPO, whatever the scores: a baseline run does not pay for them.
    assert SRPOConfig(use_spans=3, strength=0.0).use_passes == 0
    assert SRPOConfig(use_spans=3, mix=0.0).use_passes == 0
    assert "use_spans" not in SRPOConfig(use_spans=3).advantage_options()
    assert SRPOConfig(use="share").advantage_options()["use"] == "share"


@pytest.mark.parametrize("reduction", ["constant", "sum", "sequence_mean"])
def test_config_takes_every_reduction_and_whole_numbers(reduction):
    assert SRPOConfig(reduction=reduction, kl_coef=0, strength=1).reduction == reduction
