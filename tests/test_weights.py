"""Weights: the float64 reference, the invariants of the design by their numbers, and bad input."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from batches import batches
from hypothesis import given
from hypothesis import strategies as st
from reference import weights as reference_weights

from srpo_core import Role, mix_schedule, role_scales, shared_baseline_weights

BASELINES = ["token", "role_balanced", "per_role", "median", "none"]
MAPS = ["exp_tanh", "exp_clip", "one_plus_tanh", "sigmoid", "softplus", "softmax"]
RENORMALIZATIONS = ["trajectory", "per_role", "none"]
COMBINATIONS = list(itertools.product(BASELINES, MAPS, RENORMALIZATIONS))

options = st.fixed_dictionaries(
    {
        "baseline": st.sampled_from(BASELINES),
        "weight_map": st.sampled_from(MAPS),
        "renormalization": st.sampled_from(RENORMALIZATIONS),
        "strength": st.sampled_from([0.25, 1.0, 2.0]),
        "bound": st.sampled_from([0.3, math.log(2.0), 2.0]),
    }
)


def weigh(batch, **options):
    return shared_baseline_weights(batch.visual, batch.consistency, batch.roles, batch.mask, **options)


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(
        actual,
        torch.tensor(expected, dtype=actual.dtype).reshape(actual.shape),
        **({"rtol": 1e-9, "atol": 1e-12} | tolerance),
    )


@given(
    batches(),
    options,
    st.sampled_from(["symmetric", "advantage"]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.0, 0.4, 1.0]),
)
def test_equals_the_reference(batch, options, sign, scale, mix):
    options |= {"sign": sign, "visual_scale": scale, "consistency_scale": 1.0 / scale, "mix": mix}
    actual = weigh(batch, advantages=batch.advantages, **options)
    expected = reference_weights(
        batch.visual.tolist(),
        batch.consistency.tolist(),
        batch.roles.tolist(),
        batch.mask.tolist(),
        advantages=batch.advantages.tolist(),
        **options,
    )
    assert_close(actual, expected)


def test_hand_worked_numbers():
    roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING, Role.OTHER]])
    weights = shared_baseline_weights(
        torch.tensor([[2.0, 0.0, 9.0, 9.0]]), torch.zeros(1, 4), roles, torch.ones(1, 4, dtype=torch.bool)
    )
    u, k = [2.0, 0.0, 0.0], math.log(2.0)
    v = [math.exp(k * math.tanh((x - 2.0 / 3.0) / k)) for x in u]
    assert_close(weights, [3 * x / sum(v) for x in v] + [1.0], rtol=1e-6)


@given(batches(dtype=torch.float32), options)
def test_invariant_1_positive_on_every_real_token_and_zero_at_padding(batch, options):
    weights = weigh(batch, **options)
    assert (weights[batch.mask] > 0).all()
    assert (weights[~batch.mask] == 0).all()
    assert (weights[batch.mask & (batch.roles == Role.OTHER)] == 1).all()


@given(batches(), options)
def test_invariant_2_mean_one_over_the_scored_tokens_of_each_trajectory(batch, options):
    options |= {"renormalization": "trajectory"}
    weights, scored = weigh(batch, **options), batch.scored
    mean = torch.where(scored, weights, 0.0).sum(1) / scored.sum(1)
    assert_close(mean[scored.any(1)], [1.0] * int(scored.any(1).sum()))


@given(batches(), options)
def test_mean_one_over_each_role_with_per_role_renormalization(batch, options):
    options |= {"renormalization": "per_role"}
    weights = weigh(batch, **options)
    for role in (Role.PERCEPTION, Role.REASONING):
        where = batch.mask & (batch.roles == role) & (batch.scored.sum(1, keepdim=True) >= 2)
        mean = torch.where(where, weights, 0.0).sum(1)[where.any(1)] / where.sum(1)[where.any(1)]
        assert_close(mean, [1.0] * len(mean))


@pytest.mark.parametrize(("baseline", "weight_map", "renormalization"), COMBINATIONS)
@given(batch=batches(dtype=torch.float32), mix=st.sampled_from([0.3, 0.9, 1.0]))
def test_invariant_3_strength_or_mix_zero_is_exactly_one(batch, mix, baseline, weight_map, renormalization):
    options = {"baseline": baseline, "weight_map": weight_map, "renormalization": renormalization}
    assert torch.equal(weigh(batch, strength=0.0, mix=mix, **options), batch.mask.float())
    assert torch.equal(weigh(batch, mix=0.0, **options), batch.mask.float())


@given(batches(), options, st.floats(-4, 4))
def test_invariant_4_constant_scores_weigh_one(batch, options, constant):
    if options["baseline"] == options["renormalization"] == "none":
        options["baseline"] = "token"
    scores = torch.full_like(batch.visual, constant)
    batch = replace(batch, visual=scores, consistency=scores)
    assert_close(weigh(batch, **options), batch.mask.double().tolist(), rtol=1e-7, atol=1e-7)


@given(batches(), options)
def test_invariant_6_monotone_in_the_tokens_own_score(batch, options):
    weights = weigh(batch, **options)
    row, time = 0, int(torch.randint(batch.mask.shape[1], (), generator=torch.Generator().manual_seed(0)))
    visual, consistency = batch.visual.clone(), batch.consistency.clone()
    visual[row, time] += 0.5
    consistency[row, time] += 0.5
    raised = weigh(replace(batch, visual=visual, consistency=consistency), **options)
    assert raised[row, time] >= weights[row, time] - 1e-12


@given(batches(), options)
def test_invariant_7_equivariant_under_permutation_of_tokens(batch, options):
    order = torch.randperm(batch.mask.shape[1], generator=torch.Generator().manual_seed(1))
    permuted = replace(
        batch,
        **{name: getattr(batch, name)[:, order] for name in ("visual", "consistency", "roles", "mask")},
    )
    assert_close(weigh(permuted, **options), weigh(batch, **options)[:, order].tolist())


@given(batches(), options)
def test_invariants_8_and_9_neither_padding_nor_the_rest_of_the_batch_matters(batch, options):
    together = weigh(batch, **options)
    for row in reversed(range(len(together))):
        alone = replace(
            batch,
            **{name: getattr(batch, name)[row : row + 1] for name in ("visual", "consistency", "roles", "mask")},
        )
        assert_close(weigh(alone, **options)[0], together[row].tolist())
    filled = replace(batch, visual=batch.visual.nan_to_num(7.0), consistency=batch.consistency.nan_to_num(-7.0))
    assert torch.equal(weigh(filled, **options), together)


@given(batches(), options, st.floats(-3, 3))
def test_invariant_10_a_common_shift_of_all_scores_cancels(batch, options, shift):
    if options["baseline"] == "none":
        options["baseline"] = "token"
    shifted = replace(batch, visual=batch.visual + shift, consistency=batch.consistency + shift)
    assert_close(weigh(shifted, **options), weigh(batch, **options).tolist(), rtol=1e-7)


@given(batches(), options)
def test_invariant_11_stated_bounds(batch, options):
    if options["weight_map"] not in ("exp_tanh", "exp_clip", "one_plus_tanh"):
        options["weight_map"] = "exp_tanh"
    reach = options["strength"] * options["bound"]
    low, high = math.exp(-reach), math.exp(reach)
    if options["weight_map"] == "one_plus_tanh":
        low, high = math.exp(-options["bound"]), 2.0 - math.exp(-options["bound"])
    if options["renormalization"] != "none":
        low, high = low / high, high / low
    weights = weigh(batch, **options)[batch.scored]
    assert (weights >= min(low, 1.0) - 1e-12).all()
    assert (weights <= max(high, 1.0) + 1e-12).all()


def test_bounds_of_the_defaults_are_a_quarter_and_four():
    roles = torch.full((1, 1000), int(Role.PERCEPTION))
    scores = torch.full((1, 1000), -5.0)
    scores[0, 0] = 5.0
    weights = shared_baseline_weights(scores, scores, roles, torch.ones(1, 1000, dtype=torch.bool))
    assert 1.0 <= weights.max() <= 4.0
    assert weights.min() >= 0.25
    lone_low = shared_baseline_weights(-scores, scores, roles, torch.ones(1, 1000, dtype=torch.bool))
    assert 0.25 <= lone_low.min() < 0.51


def test_extreme_scores_and_strengths_stay_positive_and_finite():
    roles = torch.tensor([[1, 1, 2, 2]])
    scores = torch.tensor([[1e4, -1e4, 3e3, 0.0]])
    for baseline, weight_map, renormalization in COMBINATIONS:
        weights = shared_baseline_weights(
            scores,
            scores,
            roles,
            torch.ones(1, 4, dtype=torch.bool),
            strength=40.0,
            bound=1.0,
            baseline=baseline,
            weight_map=weight_map,
            renormalization=renormalization,
        )
        assert weights.isfinite().all()
        assert (weights > 0).all()


def test_sign_of_the_advantage_turns_the_weights_of_wrong_answers():
    roles, mask = torch.tensor([[1, 1]] * 3), torch.ones(3, 2, dtype=torch.bool)
    scores = torch.tensor([[1.0, 0.0]] * 3)
    weights = shared_baseline_weights(
        scores, scores, roles, mask, sign="advantage", advantages=torch.tensor([2.0, -0.1, 0.0])
    )
    assert_close(weights[1], weights[0].flip(0).tolist(), rtol=1e-6)
    assert weights[0, 0] > 1.2
    assert torch.equal(weights[2], torch.ones(2))


def test_a_lone_scored_token_keeps_weight_one_even_without_baseline_and_renormalization():
    weights = shared_baseline_weights(
        torch.full((1, 3), 4.0),
        torch.full((1, 3), 4.0),
        torch.tensor([[1, 0, 0]]),
        torch.ones(1, 3, dtype=torch.bool),
        baseline="none",
        renormalization="none",
    )
    assert torch.equal(weights, torch.ones(1, 3))


def test_the_shared_baseline_moves_mass_between_roles():
    roles = torch.tensor([[1] * 4 + [2] * 4])
    scores = torch.tensor([[1.0] * 4 + [0.0] * 4])
    mask = torch.ones(1, 8, dtype=torch.bool)
    shared = shared_baseline_weights(scores, scores, roles, mask)
    assert shared[0, 0] > 1.2
    assert shared[0, 7] < 0.8
    own = shared_baseline_weights(scores, scores, roles, mask, baseline="per_role")
    assert torch.equal(own, torch.ones(1, 8))


def test_noise_stays_noise():
    """A design rule: no trajectory is rescaled to unit spread, so 1e-4 nats of noise cannot become a signal."""
    scores = 1e-4 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    weights = shared_baseline_weights(scores, scores, torch.randint(1, 3, (64, 32)), torch.ones(64, 32).bool())
    assert weights.std() < 2e-4


def test_half_precision_scores_are_computed_in_float32_and_no_gradient_passes():
    scores = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    weights = shared_baseline_weights(scores, scores, torch.ones(2, 5).long(), torch.ones(2, 5).bool())
    assert weights.dtype == torch.float32
    assert not weights.requires_grad


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("baseline", BASELINES)
def test_empty_batches_are_empty(shape, baseline):
    scores = torch.zeros(shape)
    assert shared_baseline_weights(scores, scores, scores.long(), scores.bool(), baseline=baseline).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": -0.1}, r"strength must be in \[0, "),
        ({"strength": math.nan}, "strength"),
        ({"strength": 100.0}, "strength"),
        ({"bound": 0.0}, "bound must be above 0"),
        ({"visual_scale": 0.0}, "visual_scale must be above 0"),
        ({"consistency_scale": -1.0}, "consistency_scale must be above 0"),
        ({"mix": 1.5}, r"mix must be in \[0, 1\]"),
        ({"mix": -0.5}, r"mix must be in \[0, 1\]"),
        ({"sign": "advantage"}, "sign='advantage' needs one advantage per trajectory"),
    ],
)
def test_options_out_of_range_are_named(change, message):
    scores = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        shared_baseline_weights(scores, scores, scores.long(), scores.bool(), **change)


@pytest.mark.parametrize("option", ["baseline", "weight_map", "renormalization", "sign"])
def test_unknown_option_names_are_named_with_what_is_known(option):
    scores = torch.zeros(1, 2)
    with pytest.raises(TypeError, match=rf"shared_baseline_weights: {option} must be one of '.*', got 'typo'"):
        shared_baseline_weights(scores, scores, scores.long(), scores.bool(), **{option: "typo"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(1, 2)}, r"mask must be Bool\[Tensor, 'batch time'\], got float32 .*pass mask.bool\(\)"),
        ({"mask": torch.ones(1, 3).bool()}, r"mask must be .* time=2 \(from visual_dependency\)"),
        ({"mask": torch.ones(2, 2).bool()}, r"mask must be .* batch=1 \(from visual_dependency\)"),
        ({"roles": torch.zeros(1, 2)}, r"roles must be Int.*pass roles.long\(\)"),
        ({"visual_dependency": torch.zeros(2)}, "visual_dependency must be .*needs 2 axes"),
        ({"visual_dependency": [[0.0, 0.0]]}, "visual_dependency must be .*got list; pass a torch.Tensor"),
    ],
)
def test_wrong_tensors_are_named_with_the_remedy(change, message):
    inputs = {
        "visual_dependency": torch.zeros(1, 2),
        "perception_consistency": torch.zeros(1, 2),
        "roles": torch.zeros(1, 2).long(),
        "mask": torch.ones(1, 2).bool(),
    }
    with pytest.raises(TypeError, match=message):
        shared_baseline_weights(**(inputs | change))


def test_wrong_values_are_named_with_their_place():
    scores, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    roles = torch.ones(2, 3).long()
    with pytest.raises(ValueError, match="roles is 3 at trajectory 1 token 2; expected 0 .OTHER., 1 .PERCEPTION., 2"):
        shared_baseline_weights(scores, scores, torch.tensor([[0, 1, 2], [1, 1, 3]]), mask)
    with pytest.raises(ValueError, match="roles is -1 at trajectory 0 token 0"):
        shared_baseline_weights(scores, scores, -roles, mask)
    wrong = scores.clone()
    wrong[1, 0] = torch.nan
    with pytest.raises(ValueError, match="visual_dependency is NaN at trajectory 1 token 0"):
        shared_baseline_weights(wrong, scores, roles, mask)
    with pytest.raises(ValueError, match="perception_consistency is NaN at trajectory 1 token 0"):
        shared_baseline_weights(scores, wrong, 2 * roles, mask)


# Scales


@given(batches())
def test_batch_scale_is_the_root_mean_square_of_the_role(batch):
    scales, _ = role_scales(batch.visual, batch.consistency, batch.roles, batch.mask, floor=1e-9)
    for scale, scores, role in (
        (scales.visual, batch.visual, Role.PERCEPTION),
        (scales.consistency, batch.consistency, Role.REASONING),
    ):
        where = batch.mask & (batch.roles == role)
        expected = max(math.sqrt(float(scores[where].square().mean())), 1e-9) if where.any() else 1.0
        assert_close(scale, expected)


def test_moving_scale_is_corrected_for_its_start_and_waits_for_absent_roles():
    both, mask = torch.tensor([[1, 2]]), torch.ones(1, 2).bool()
    state = None
    square = total = 0.0
    for score in (2.0, 1.0, 4.0):
        scores = torch.full((1, 2), score, dtype=torch.float64)
        scales, state = role_scales(scores, scores, both, mask, state=state, decay=0.9)
        square, total = 0.9 * square + 0.1 * score**2, 0.9 * total + 0.1
        assert_close(scales.visual, math.sqrt(square / total))
    only_perception = torch.tensor([[1, 1]])
    after, later = role_scales(scores, scores, only_perception, mask, state=state, decay=0.9)
    assert torch.equal(after.consistency, scales.consistency)
    assert torch.equal(later.consistency_total, state.consistency_total)
    assert not torch.equal(later.visual_total, state.visual_total)


def test_scale_of_noise_has_a_floor_and_bad_options_are_named():
    scores, roles, mask = torch.full((1, 2), 1e-4), torch.tensor([[1, 2]]), torch.ones(1, 2).bool()
    scales, _ = role_scales(scores, scores, roles, mask)
    assert scales.visual == scales.consistency == torch.tensor(0.05)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        role_scales(scores, scores, roles, mask, decay=1.0)
    with pytest.raises(ValueError, match="floor must be above 0"):
        role_scales(scores, scores, roles, mask, floor=0.0)


def test_mix_schedule_ramps_and_refuses_negative_steps():
    assert [mix_schedule(step, warmup_steps=2, mix=0.5) for step in range(4)] == [0.0, 0.25, 0.5, 0.5]
    assert mix_schedule(0, warmup_steps=0) == 1.0
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        mix_schedule(-1, warmup_steps=2)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -2"):
        mix_schedule(1, warmup_steps=-2)
