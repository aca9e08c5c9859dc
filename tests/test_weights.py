"""Weights: the float64 reference, the invariants of weights, functions as options, bad input."""

import itertools
import math
from dataclasses import fields, replace
from functools import partial
from typing import get_args

import pytest
import reference
import torch
from batches import batches
from helpers import as_lists, close
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from srpo_core import CreditOptions, Role, shared_baseline_weights
from srpo_core.options import MAX_EXPONENT, WeightMap
from srpo_core.weights import role_scales

P, R, N = int(Role.PERCEPTION), int(Role.REASONING), int(Role.OTHER)
BASELINES = ["token", "role_balanced", "per_role", "median", "none"]
MAPS = get_args(WeightMap)
# The options that only some maps read, and the maps that read them.
OF_MAPS = {
    each.name: (each.default, each.metadata["read_by"].values)
    for each in fields(CreditOptions)
    if each.metadata["read_by"] is not None and each.metadata["read_by"].option == "weight_map"
}
BOUNDED_MAPS = OF_MAPS["bound"][1]
RENORMALIZATIONS = ["trajectory", "per_role", "none"]
COMBINATIONS = list(itertools.product(BASELINES, MAPS, RENORMALIZATIONS))


@st.composite
def options(draw, maps=MAPS, baselines=BASELINES, renormalizations=RENORMALIZATIONS):
    chosen = {
        "baseline": draw(st.sampled_from(baselines)),
        "weight_map": draw(st.sampled_from(maps)),
        "renormalization": draw(st.sampled_from(renormalizations)),
        "strength": draw(st.sampled_from([0.25, 1.0, 2.0])),
    }
    for name, (default, readers) in OF_MAPS.items():
        if chosen["weight_map"] in readers:
            chosen[name] = default * draw(st.sampled_from([0.4, 1.0, 3.0]))
    return CreditOptions(**chosen)


def weigh(batch, options, **more):
    return shared_baseline_weights(batch.scores, batch.roles, batch.mask, options, **more)


def weights_of(scores, roles, **options):
    """Of responses without padding."""
    return shared_baseline_weights(scores, roles, torch.ones_like(roles, dtype=torch.bool), CreditOptions(**options))


@given(
    batches(),
    options(),
    st.sampled_from(["symmetric", "advantage"]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.0, 0.4, 1.0]),
)
def test_shared_baseline_weights_equals_the_reference(batch, options, sign, scale, mix):
    options = replace(options, sign=sign, visual_scale=scale, consistency_scale=1.0 / scale, mix=mix)
    read = ["strength", "baseline", "weight_map", "renormalization", "visual_scale", "consistency_scale"]
    read += [name for name, (_, readers) in OF_MAPS.items() if options.weight_map in readers]
    expected = reference.weights(
        *as_lists(batch.scores, batch.roles, batch.mask),
        advantages=batch.advantages.tolist(),
        sign=sign,
        mix=mix,
        **{name: getattr(options, name) for name in read},
    )
    close(weigh(batch, options, advantages=batch.advantages), expected)


def test_shared_baseline_weights_by_hand():
    weights = weights_of(torch.tensor([[2.0, 0.0, 0.0, 9.0]]), torch.tensor([[P, P, R, N]]))
    u, k = [2.0, 0.0, 0.0], math.log(2.0)
    v = [math.exp(k * math.tanh((x - 2.0 / 3.0) / k)) for x in u]
    close(weights, [[3 * x / sum(v) for x in v] + [1.0]], rtol=1e-6)


@given(batches(), options())
def test_measured_scales_replace_those_of_the_options(batch, options):
    scales, _ = role_scales(batch.scores, batch.roles, batch.mask)
    fixed = replace(options, visual_scale=scales.visual.item(), consistency_scale=scales.consistency.item())
    ignored = replace(options, visual_scale=7.0, consistency_scale=0.1)
    assert torch.equal(weigh(batch, ignored, scales=scales), weigh(batch, fixed))


@given(batches(dtype=torch.float32), options())
def test_positive_on_every_real_token_and_zero_at_padding(batch, options):
    weights = weigh(batch, options)
    assert (weights[batch.mask] > 0).all()
    assert (weights[~batch.mask] == 0).all()
    assert (weights[batch.mask & (batch.roles == N)] == 1).all()


@given(batches(), options(renormalizations=["trajectory"]))
def test_mean_one_over_the_scored_tokens_of_each_trajectory(batch, options):
    weights, scored = weigh(batch, options), batch.scored
    mean = torch.where(scored, weights, 0.0).sum(1) / scored.sum(1)
    close(mean[scored.any(1)], [1.0] * int(scored.any(1).sum()))


@given(batches(), options(renormalizations=["per_role"]))
def test_mean_one_over_each_role_with_per_role_renormalization(batch, options):
    weights = weigh(batch, options)
    for role in (P, R):
        where = batch.mask & (batch.roles == role) & (batch.scored.sum(1, keepdim=True) >= 2)
        mean = torch.where(where, weights, 0.0).sum(1)[where.any(1)] / where.sum(1)[where.any(1)]
        close(mean, [1.0] * len(mean))


@pytest.mark.parametrize(("baseline", "weight_map", "renormalization"), COMBINATIONS)
@settings(max_examples=15)
@given(batch=batches(dtype=torch.float32), mix=st.sampled_from([0.3, 0.9, 1.0]))
def test_strength_or_mix_zero_is_exactly_one(batch, mix, baseline, weight_map, renormalization):
    options = CreditOptions(baseline=baseline, weight_map=weight_map, renormalization=renormalization)
    assert torch.equal(weigh(batch, replace(options, strength=0.0, mix=mix)), batch.mask.float())
    assert torch.equal(weigh(batch, replace(options, mix=0.0)), batch.mask.float())


@given(batches(), options(), st.floats(-4, 4))
def test_constant_scores_weigh_one(batch, options, constant):
    if options.baseline == options.renormalization == "none":
        options = replace(options, baseline="token")
    batch = replace(batch, scores=torch.full_like(batch.scores, constant))
    close(weigh(batch, options), batch.mask.double(), rtol=1e-7, atol=1e-7)


def raised_at(batch, place, by):
    scores = batch.scores.clone()
    scores[place] += by
    return replace(batch, scores=scores)


@given(batches(), options(), st.data())
def test_monotone_in_the_tokens_own_score(batch, options, data):
    scored = [tuple(place) for place in batch.scored.nonzero().tolist()]
    assume(scored)
    place = data.draw(st.sampled_from(scored))
    assert weigh(raised_at(batch, place, 0.5), options)[place] >= weigh(batch, options)[place] - 1e-12


@given(
    batches(),
    options(baselines=["token", "role_balanced", "none"], renormalizations=["trajectory", "none"]),
    st.data(),
)
def test_strictly_where_the_map_is_not_at_its_bound(batch, options, data):
    """Not so with a baseline or a mean that is the token's own: alone in its role, or the median itself."""
    scored = [tuple(place) for place in batch.scored.nonzero().tolist() if batch.scored[place[0]].sum() >= 2]
    assume(scored)
    place = data.draw(st.sampled_from(scored))
    batch = replace(batch, scores=batch.scores.clamp(-0.1, 0.1))
    assert weigh(raised_at(batch, place, 0.05), options)[place] > weigh(batch, options)[place] + 1e-4


@given(batches(), options())
def test_equivariant_under_permutation_of_tokens(batch, options):
    order = torch.randperm(batch.mask.shape[1], generator=torch.Generator().manual_seed(1))
    permuted = replace(batch, **{name: getattr(batch, name)[:, order] for name in ("scores", "roles", "mask")})
    close(weigh(permuted, options), weigh(batch, options)[:, order])


@given(batches(), options())
def test_invariants_8_and_9_neither_padding_nor_the_rest_of_the_batch_matters(batch, options):
    together = weigh(batch, options)
    for row in reversed(range(len(together))):
        alone = replace(batch, **{name: getattr(batch, name)[row : row + 1] for name in ("scores", "roles", "mask")})
        close(weigh(alone, options)[0], together[row])
    filled = replace(batch, scores=batch.scores.nan_to_num(7.0))
    assert torch.equal(weigh(filled, options), together)


@given(batches(), options(baselines=["token", "role_balanced", "per_role", "median"]), st.floats(-3, 3))
def test_a_common_shift_of_all_scores_cancels(batch, options, shift):
    shifted = replace(batch, scores=batch.scores + shift)
    close(weigh(shifted, options), weigh(batch, options), rtol=1e-7)


@given(batches(), options(maps=BOUNDED_MAPS))
def test_stated_bounds(batch, options):
    reach = options.strength * options.bound
    low, high = math.exp(-reach), math.exp(reach)
    if options.weight_map == "one_plus_tanh":
        low, high = math.exp(-options.bound), 2.0 - math.exp(-options.bound)
    if options.renormalization != "none":
        low, high = low / high, high / low
    weights = weigh(batch, options)[batch.scored]
    assert (weights >= min(low, 1.0) - 1e-12).all()
    assert (weights <= max(high, 1.0) + 1e-12).all()


def test_bounds_of_the_defaults_are_a_quarter_and_four():
    roles = torch.full((1, 1000), P)
    scores = torch.full((1, 1000), -5.0)
    scores[0, 0] = 5.0
    lone_high, lone_low = weights_of(scores, roles), weights_of(-scores, roles)
    assert 2.0 < lone_high.max() <= 4.0
    assert 0.25 <= lone_low.min() < 0.51
    # Without a baseline all other tokens lie at the opposite bound.
    assert 3.9 < weights_of(scores, roles, baseline="none").max() <= 4.0
    assert 0.25 <= weights_of(-scores, roles, baseline="none").min() < 0.26


def test_extreme_scores_and_strengths_stay_positive_and_finite():
    scores = torch.tensor([[1e4, -1e4, 3e3, 0.0]])
    for baseline, weight_map, renormalization in COMBINATIONS:
        bound = {"bound": 1.0} if weight_map in BOUNDED_MAPS else {}
        weights = weights_of(
            scores,
            torch.tensor([[P, P, R, R]]),
            strength=40.0,
            baseline=baseline,
            weight_map=weight_map,
            renormalization=renormalization,
            **bound,
        )
        assert weights.isfinite().all()
        assert (weights > 0).all()


def test_sign_of_the_advantage_turns_the_weights_of_wrong_answers():
    roles, mask = torch.tensor([[P, P]] * 3), torch.ones(3, 2, dtype=torch.bool)
    scores = torch.tensor([[1.0, 0.0]] * 3)
    options = CreditOptions(sign="advantage")
    weights = shared_baseline_weights(scores, roles, mask, options, advantages=torch.tensor([2.0, -0.1, 0.0]))
    close(weights[1], weights[0].flip(0), rtol=1e-6)
    assert weights[0, 0] > 1.2
    assert torch.equal(weights[2], torch.ones(2))
    with pytest.raises(ValueError, match="advantages is None; sign='advantage' needs one advantage per trajectory"):
        shared_baseline_weights(scores, roles, mask, options)


def test_a_lone_scored_token_keeps_weight_one_even_without_baseline_and_renormalization():
    weights = weights_of(torch.full((1, 3), 4.0), torch.tensor([[P, N, N]]), baseline="none", renormalization="none")
    assert torch.equal(weights, torch.ones(1, 3))


def test_the_shared_baseline_moves_mass_between_roles():
    roles = torch.tensor([[P] * 4 + [R] * 4])
    scores = torch.tensor([[1.0] * 4 + [0.0] * 4])
    shared = weights_of(scores, roles)
    assert shared[0, 0] > 1.2
    assert shared[0, 7] < 0.8
    assert torch.equal(weights_of(scores, roles, baseline="per_role"), torch.ones(1, 8))


def test_noise_stays_noise():
    """A design rule: no trajectory is rescaled to unit spread, so 1e-4 nats of noise cannot become a signal."""
    g = torch.Generator().manual_seed(0)
    scores = 1e-4 * torch.randn(64, 32, generator=g)
    assert weights_of(scores, torch.randint(1, 3, (64, 32), generator=g)).std() < 2e-4


def test_half_precision_scores_are_computed_in_float32_and_no_gradient_passes():
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weights = weights_of(scores, torch.ones(2, 5).long())
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert torch.equal(weights, weights_of(scores.float(), torch.ones(2, 5).long()))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("baseline", BASELINES)
def test_empty_batches_are_empty(shape, baseline):
    scores = torch.zeros(shape)
    assert weights_of(scores, scores.long(), baseline=baseline).shape == shape


# A function in the place of a name


def token_mean(scores, masks):
    """``baseline="token"`` once more."""
    return torch.where(masks.scored(), scores, 0.0).sum(1, keepdim=True) / masks.scored().sum(1, keepdim=True).clamp(
        min=1
    )


def power_of_softplus(centered, scored, strength, *, power):
    """A toy map with one parameter, which no option of the package knows."""
    exponent = (strength * centered).clamp(-MAX_EXPONENT, MAX_EXPONENT)  # as the map of the package is kept
    return (torch.nn.functional.softplus(exponent, threshold=MAX_EXPONENT) / math.log(2.0)) ** power


def sigmoid(centered, scored, strength):
    return 2.0 * torch.sigmoid(strength * centered)


@given(batches(), options())
def test_a_baseline_may_be_a_function(batch, options):
    close(weigh(batch, replace(options, baseline=token_mean)), weigh(batch, replace(options, baseline="token")))
    nothing = replace(options, baseline=lambda scores, masks: torch.zeros_like(scores))
    assert torch.equal(weigh(batch, nothing), weigh(batch, replace(options, baseline="none")))


@given(batches(), options(maps=["sigmoid"]))
def test_a_weight_map_may_be_a_function(batch, options):
    close(weigh(batch, replace(options, weight_map=sigmoid)), weigh(batch, options))


@given(batches(), options(maps=["softplus"]))
def test_a_map_with_a_parameter_of_its_own_needs_no_edit_of_the_package(batch, options):
    of_power = [replace(options, weight_map=partial(power_of_softplus, power=power)) for power in (1.0, 2.0)]
    close(weigh(batch, of_power[0]), weigh(batch, options))
    weights = weigh(batch, of_power[1])
    assert (weights[batch.mask] > 0).all()
    if options.renormalization == "none" and options.baseline == "none":
        comparable = batch.scored & (batch.scored.sum(1, keepdim=True) >= 2)
        close(weights[comparable], weigh(batch, of_power[0])[comparable] ** 2)
    for power in (1.0, 2.0):
        off = replace(options, strength=0.0, weight_map=partial(_exactly_one_at_0, power=power), baseline=token_mean)
        assert torch.equal(weigh(batch, off), batch.mask.double())


def _exactly_one_at_0(centered, scored, strength, *, power):
    """softplus(0) and log 2 agree only up to rounding; divided by itself it is 1."""
    value = power_of_softplus(centered, scored, strength, power=power)
    return value / power_of_softplus(torch.zeros_like(centered), scored, 0.0, power=power)


def test_functions_compile_whole(fresh_compiler):
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    roles, mask = torch.tensor([[P, P, R, R, N, P]] * 2), torch.ones(2, 6).bool()
    options = CreditOptions(baseline=token_mean, weight_map=partial(power_of_softplus, power=1.5))
    compiled = torch.compile(shared_baseline_weights, fullgraph=True, backend="aot_eager")
    close(compiled(scores, roles, mask, options), shared_baseline_weights(scores, roles, mask, options), rtol=1e-6)


# Bad input: options are checked where they are made, see test_options.py


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(1, 2)}, r"mask must be Bool\[Tensor, 'batch time'\], got float32 .*pass mask.bool\(\)"),
        ({"mask": torch.ones(1, 3).bool()}, r"mask must be .* time=2 \(from scores\)"),
        ({"mask": torch.ones(2, 2).bool()}, r"mask must be .* batch=1 \(from scores\)"),
        ({"roles": torch.zeros(1, 2)}, r"roles must be Int.*pass roles.long\(\)"),
        ({"scores": torch.zeros(2)}, "scores must be .*needs 2 axes"),
        ({"scores": [[0.0, 0.0]]}, "scores must be .*got list; pass a torch.Tensor"),
        ({"options": {"strength": 1.0}}, "options must be of type CreditOptions"),
    ],
)
def test_wrong_arguments_are_named_with_the_remedy(change, message):
    inputs = {"scores": torch.zeros(1, 2), "roles": torch.zeros(1, 2).long(), "mask": torch.ones(1, 2).bool()}
    with pytest.raises(TypeError, match=message):
        shared_baseline_weights(**(inputs | change))


def test_wrong_values_are_named_with_their_place():
    scores, roles = torch.zeros(2, 3), torch.ones(2, 3).long()
    with pytest.raises(ValueError, match="roles is 3 at trajectory 1 token 2; expected 0 .OTHER., 1 .PERCEPTION., 2"):
        weights_of(scores, torch.tensor([[0, 1, 2], [1, 1, 3]]))
    with pytest.raises(ValueError, match="roles is -1 at trajectory 0 token 0"):
        weights_of(scores, -roles)
    wrong = scores.clone()
    wrong[1, 0] = torch.nan
    for role in (P, R):
        with pytest.raises(ValueError, match="^scores is NaN at trajectory 1 token 0"):
            weights_of(wrong, role * roles)
    assert torch.equal(weights_of(wrong, 0 * roles), torch.ones(2, 3))  # no role, so not read


# Scales


@given(batches())
def test_role_scales_of_a_batch_are_the_root_mean_squares(batch):
    scales, _ = role_scales(batch.scores, batch.roles, batch.mask, floor=1e-9)
    for scale, role in ((scales.visual, P), (scales.consistency, R)):
        where = batch.mask & (batch.roles == role)
        expected = max(math.sqrt(float(batch.scores[where].square().mean())), 1e-9) if where.any() else 1.0
        close(scale, expected)


def test_moving_role_scales_are_corrected_for_their_start_and_wait_for_absent_roles():
    both, mask = torch.tensor([[P, R]]), torch.ones(1, 2).bool()
    state = None
    square = total = 0.0
    for score in (2.0, 1.0, 4.0):
        scores = torch.full((1, 2), score, dtype=torch.float64)
        scales, state = role_scales(scores, both, mask, state=state, decay=0.9)
        square, total = 0.9 * square + 0.1 * score**2, 0.9 * total + 0.1
        close(scales.visual, math.sqrt(square / total))
    only_perception = torch.tensor([[P, P]])
    after, later = role_scales(scores, only_perception, mask, state=state, decay=0.9)
    assert torch.equal(after.consistency, scales.consistency)
    assert torch.equal(later.consistency_total, state.consistency_total)
    assert not torch.equal(later.visual_total, state.visual_total)


def test_role_scales_of_noise_have_a_floor_and_bad_arguments_are_named():
    scores, roles, mask = torch.full((1, 2), 1e-4), torch.tensor([[P, R]]), torch.ones(1, 2).bool()
    scales, _ = role_scales(scores, roles, mask)
    assert scales.visual == scales.consistency == torch.tensor(0.05)
    with pytest.raises(ValueError, match=r"^decay must be in \[0, 1\), got 1.0"):
        role_scales(scores, roles, mask, decay=1.0)
    with pytest.raises(ValueError, match="^floor must be above 0 nats, got 0.0"):
        role_scales(scores, roles, mask, floor=0.0)
