"""The benchmark's published methods: reference, hand-worked numbers, the defects of their code, padding, bad input."""

import doctest
import math

import pytest
import torch
from batches import batches
from helpers import close
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from benchmarks.grounding import published
from benchmarks.grounding.published import entropy_mask, k3, papo_penalty, pgpo_weights, rlsd_weights, vppo_weights
from srpo_core import grpo_loss, role_advantages, token_log_probs
from srpo_core.contrasts import contrast
from srpo_core.log_probs import token_entropy

LOG2 = math.log(2.0)
HALF, DOUBLE = LOG2 - 0.5, 1.0 - LOG2  # k3 where the corrupted view is half, or twice, as likely


# The reference: float64, plain loops, from the formulas of the papers.


def reference_k3(clean, corrupted, clip=10.0):
    delta = clean - corrupted
    return min(math.expm1(-delta) + delta, clip)


def reference_papo(clean, corrupted, entropy, corrupted_entropy, mask, kl_coef=0.01, entropy_coef=0.03):
    losses = []
    for i, row in enumerate(mask):
        for t, real in enumerate(row):
            if real:
                entropies = entropy[i][t] + corrupted_entropy[i][t]
                losses.append(entropy_coef * entropies - kl_coef * reference_k3(clean[i][t], corrupted[i][t]))
    return math.fsum(losses) / len(losses) if losses else 0.0


def reference_vppo(clean, corrupted, mask, keep=0.4, floor=0.9, ceiling=1.0):
    kept, means = [], []
    for i, row in enumerate(mask):
        scores = {t: reference_k3(clean[i][t], corrupted[i][t]) for t, real in enumerate(row) if real}
        # sorted is stable even in reverse, so that of equal scores the earlier token comes first
        ordered = sorted(scores, key=scores.__getitem__, reverse=True)
        kept.append(ordered[: math.ceil(round(keep * len(scores), 9))])
        means.append(math.fsum(scores.values()) / len(scores) if scores else None)
    real_means = [mean for mean in means if mean is not None]
    least, most = min(real_means, default=0.0), max(real_means, default=0.0)
    if ceiling is None and most - least > 1e-6:
        place = [(mean - least) / (most - least) for mean in real_means]
        ceiling = floor + (1 - floor) / (math.fsum(place) / len(place))
    weights = [[0.0] * len(row) for row in mask]
    for i, tokens in enumerate(kept):
        for t in tokens:
            varies = most - least > 1e-6
            weights[i][t] = floor + (ceiling - floor) * (means[i] - least) / (most - least) if varies else 1.0
    return weights


def reference_pgpo(clean, corrupted, mask, threshold=0.4, boost=2.0):
    weights = [[0.0] * len(row) for row in mask]
    for i, row in enumerate(mask):
        scores = {
            t: math.log1p(reference_k3(clean[i][t], corrupted[i][t], math.inf)) for t, real in enumerate(row) if real
        }
        least, most = min(scores.values(), default=0.0), max(scores.values(), default=0.0)
        raw = {}
        for t, score in scores.items():
            place = (score - least) / (most - least) if most > least else threshold
            raw[t] = place / threshold if place < threshold else 1 + boost * (place - threshold) / (1 - threshold)
        for t, value in raw.items():
            weights[i][t] = value * len(raw) / math.fsum(raw.values())
    return weights


def reference_rlsd(student, teacher, advantages, mask, mix=0.5, clip=0.2):
    weights = [[0.0] * len(row) for row in mask]
    for i, row in enumerate(mask):
        sign = (advantages[i] > 0) - (advantages[i] < 0)
        for t, real in enumerate(row):
            if real:
                ratio = math.exp(sign * (teacher[i][t] - student[i][t]))
                weights[i][t] = 1 - mix + mix * min(max(ratio, 1 - clip), 1 + clip)
    return weights


def reference_entropy_mask(entropy, mask, keep=0.2):
    values = sorted((h for pair in zip(entropy, mask, strict=True) for h, real in zip(*pair, strict=True) if real))
    threshold = values[-math.ceil(round(keep * len(values), 9))] if values else math.inf
    return [
        [real and h >= threshold for h, real in zip(*pair, strict=True)] for pair in zip(entropy, mask, strict=True)
    ]


def penalty_of(clean, corrupted, entropy, corrupted_entropy, mask, **options):
    return papo_penalty(
        clean, mask, corrupted_log_probs=corrupted, entropy=entropy, corrupted_entropy=corrupted_entropy, **options
    )


def weights_of(clean, corrupted, advantages, mask):
    """Everything that is a weight, by name, all from one batch; entropies need only be some numbers."""
    return {
        "k3": k3(clean, mask, corrupted_log_probs=corrupted),
        "vppo": vppo_weights(clean, advantages, mask, corrupted_log_probs=corrupted),
        "pgpo": pgpo_weights(clean, mask, corrupted_log_probs=corrupted),
        "rlsd": rlsd_weights(corrupted, advantages, mask, teacher_log_probs=clean),
        "entropy": entropy_mask(-clean, mask),
    }


@given(batch=batches())
def test_the_methods_equal_the_reference(batch):
    clean, corrupted, advantages, mask = batch.old_log_probs, batch.corrupted_log_probs, batch.advantages, batch.mask
    p, q, a, m = clean.tolist(), corrupted.tolist(), advantages.tolist(), mask.tolist()
    for clip in (10.0, 1e6):
        close(
            k3(clean, mask, corrupted_log_probs=corrupted, clip=clip),
            contrast(clean, corrupted, mask, kind="k3", clip=clip),
        )
    close(
        penalty_of(clean, corrupted, -clean, -corrupted, mask),
        reference_papo(p, q, (-clean).tolist(), (-corrupted).tolist(), m),
    )
    for options in ({}, {"keep": 0.07, "floor": 0.5, "ceiling": 3.0}, {"keep": 1.0, "ceiling": None}):
        found = vppo_weights(clean, advantages, mask, corrupted_log_probs=corrupted, **options)
        close(found, reference_vppo(p, q, m, **options))
    for options in ({}, {"threshold": 0.8, "boost": 0.0}):
        found = pgpo_weights(clean, mask, corrupted_log_probs=corrupted, **options)
        close(found, reference_pgpo(p, q, m, **options))
    for options in ({}, {"mix": 1.0, "clip": 0.9}):
        found = rlsd_weights(clean, advantages, mask, teacher_log_probs=corrupted, **options)
        close(found, reference_rlsd(p, q, a, m, **options))
    for options in ({}, {"keep": 0.5}):
        assert entropy_mask(-clean, mask, **options).tolist() == reference_entropy_mask((-clean).tolist(), m, **options)


@given(batch=batches(), padding=st.sampled_from([math.nan, math.inf, -math.inf, -3.0]))
def test_padding_is_not_averaged_over(batch, padding):
    """TRL's removed PAPO divided by padding too."""

    def padded(tensor, value):
        return torch.nn.functional.pad(tensor, (1, 2, 0, 1), value=value)

    mask = batch.mask
    inputs = [batch.old_log_probs, batch.corrupted_log_probs, -batch.old_log_probs, -batch.corrupted_log_probs]
    wider = [padded(tensor, padding).requires_grad_() for tensor in inputs]
    penalty = penalty_of(*wider, padded(mask, False))
    close(penalty.detach(), penalty_of(*inputs, mask))
    for gradient in torch.autograd.grad(penalty, wider):
        assert gradient.isfinite().all()
        assert (gradient[~padded(mask, False)] == 0).all()

    narrow = weights_of(*inputs[:2], batch.advantages, mask)
    more = torch.nn.functional.pad(batch.advantages, (0, 1), value=1.0)
    for name, weights in weights_of(wider[0].detach(), wider[1].detach(), more, padded(mask, False)).items():
        torch.testing.assert_close(weights, padded(narrow[name], 0))


@given(batch=batches())
def test_weights_keep_their_promises(batch):
    clean, corrupted, mask = batch.old_log_probs, batch.corrupted_log_probs, batch.mask
    advantages, count = batch.advantages, batch.mask.sum(1)
    weights = weights_of(clean, corrupted, advantages, mask)
    assert not any(value[~mask].any() for value in weights.values())
    assert ((weights["vppo"] > 0).sum(1) == torch.tensor([math.ceil(round(0.4 * n, 9)) for n in count.tolist()])).all()
    torch.testing.assert_close(weights["pgpo"].sum(1), count.double())
    assert ((weights["rlsd"] >= 0.9 - 1e-12) & (weights["rlsd"] <= 1.1 + 1e-12))[mask].all()
    assert (weights["rlsd"][(advantages == 0)[:, None] & mask] == 1).all()
    assert weights["entropy"].sum() >= 0.2 * mask.sum()


# Numbers worked by hand.


def views_of(*k3_signs):
    """Both views of tokens that the corrupted image makes half as likely (+), twice as likely (-), or leaves alone."""
    clean = torch.full((len(k3_signs), len(k3_signs[0])), -1.0, dtype=torch.float64)
    shift = [[{"+": LOG2, "-": -LOG2, "0": 0.0}[sign] for sign in row] for row in k3_signs]
    return clean, clean - torch.tensor(shift, dtype=torch.float64), torch.ones(clean.shape, dtype=torch.bool)


def test_papo_by_hand():
    clean, corrupted, mask = views_of("+-0")
    entropy = torch.full_like(clean, 0.5)
    close(penalty_of(clean, corrupted, entropy, 2 * entropy, mask), 0.03 * 1.5 - 0.01 * (HALF + DOUBLE) / 3)
    close(penalty_of(clean, corrupted, entropy, entropy, mask, entropy_coef=0.0, normalizer=1.0), -0.01 * 0.5)


def test_vppo_by_hand():
    clean, corrupted, mask = views_of("+0-00", "00000", "+0000", "+++++")
    mask[3] = False  # a response without a token has no part in minimum, maximum or mean
    advantages = torch.zeros(4, dtype=torch.float64)
    place = HALF / (HALF + DOUBLE)
    middle = 0.9 + 0.1 * place
    scaled = [[1.0, 0, 1.0, 0, 0], [0.9, 0.9, 0, 0, 0], [middle, middle, 0, 0, 0], [0.0] * 5]
    close(vppo_weights(clean, advantages, mask, corrupted_log_probs=corrupted), scaled)
    # The places 1, 0 and `place` have mean (1 + place) / 3, so this ceiling makes the mean scale 1.
    reach = 0.1 * 3 / (1 + place)
    mean_one = vppo_weights(clean, advantages, mask, corrupted_log_probs=corrupted, ceiling=None)
    close(mean_one.amax(1), [0.9 + reach, 0.9, 0.9 + reach * place, 0.0])
    close(mean_one.amax(1)[:3].mean(), 1.0)


def test_pgpo_by_hand():
    clean, corrupted, mask = views_of("+-0")
    # log(1 + k3) is 0.1766, 0.2676 and 0; min-max 0.6598, 1 and 0; raw 1.8661, 3 and 0
    found = pgpo_weights(clean, mask, corrupted_log_probs=corrupted)
    torch.testing.assert_close(found, clean.new_tensor([[1.1505, 1.8495, 0.0]]), rtol=0, atol=1e-4)


def test_rlsd_by_hand():
    student, teacher = torch.tensor([[-1.0, -1.0, -1.0]] * 3), torch.tensor([[-0.5, -1.1, -1.0]] * 3)
    advantages, mask = torch.tensor([2.0, -0.5, 0.0]), torch.ones(3, 3, dtype=torch.bool)
    weights = rlsd_weights(student, advantages, mask, teacher_log_probs=teacher)
    falls, rises = 0.5 + 0.5 * math.exp(-0.1), 0.5 + 0.5 * math.exp(0.1)
    torch.testing.assert_close(weights, torch.tensor([[1.1, falls, 1.0], [0.9, rises, 1.0], [1.0, 1.0, 1.0]]))


def test_equal_scores():
    clean, corrupted, mask = views_of("+++++", "+++++")
    weights = weights_of(clean, corrupted, torch.ones(2, dtype=torch.float64), mask)
    close(weights["vppo"], [[1.0, 1, 0, 0, 0]] * 2)
    close(weights["pgpo"], [[1.0] * 5] * 2)
    assert weights["entropy"].all()


def test_the_share_kept_is_not_off_by_rounding():
    clean, corrupted, mask = torch.zeros(1, 100), -torch.rand(1, 100), torch.ones(1, 100, dtype=torch.bool)
    assert 0.07 * 100 > 7  # in floats
    assert (vppo_weights(clean, torch.ones(1), mask, corrupted_log_probs=corrupted, keep=0.07) > 0).sum() == 7
    assert entropy_mask(-corrupted, mask, keep=0.07).sum() == 7


# The defects of the published code.


def test_papo_gradient_reaches_all_four_tensors():
    inputs = [t.requires_grad_() for t in -3 * torch.rand(4, 2, 3, dtype=torch.float64)]
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert gradcheck(lambda *tensors: penalty_of(*tensors, mask, kl_coef=1.0, entropy_coef=1.0), inputs)


def test_papo_as_released_does_not_train_the_corrupted_entropy():
    """PAPO#20: the corrupted view comes from a pass without gradient, so that its entropy is a constant."""
    torch.manual_seed(0)
    weight = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    clean_hidden, corrupted_hidden = torch.randn(2, 1, 4, 2, dtype=torch.float64)
    token_ids, mask = torch.tensor([[0, 3, 2, 1]]), torch.ones(1, 4, dtype=torch.bool)

    def gradient(kl_coef, entropy_coef, as_released):
        clean, corrupted = clean_hidden @ weight, corrupted_hidden @ weight
        if as_released:
            corrupted = corrupted.detach()
        penalty = penalty_of(
            token_log_probs(clean, token_ids),
            token_log_probs(corrupted, token_ids),
            token_entropy(clean),
            token_entropy(corrupted),
            mask,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
        )
        return torch.autograd.grad(penalty, weight)[0]

    clean_only = torch.autograd.grad(token_entropy(clean_hidden @ weight).mean(), weight)[0]
    both = clean_only + torch.autograd.grad(token_entropy(corrupted_hidden @ weight).mean(), weight)[0]
    close(gradient(0.0, 1.0, as_released=True), clean_only)
    close(gradient(0.0, 1.0, as_released=False), both)
    assert not torch.allclose(clean_only, both)
    assert not torch.allclose(gradient(1.0, 0.0, as_released=True), gradient(1.0, 0.0, as_released=False))


def test_vppo_normalizer_decides_over_the_tokens_left_out():
    """As released, the loss is divided by all tokens, though 40 % of them learn."""
    clean, corrupted, mask = views_of("+0-00", "-0+00")
    advantages = torch.ones(2, dtype=torch.float64)
    weights = vppo_weights(clean, advantages, mask, corrupted_log_probs=corrupted)
    kept = weights > 0

    def gradient(normalizer):
        log_probs = clean.clone().requires_grad_()
        credit = role_advantages(weights, advantages, mask)
        grpo_loss(log_probs, credit, mask, old_log_probs=clean, normalizer=normalizer).loss.backward()
        return log_probs.grad

    close(gradient(None), -kept.double() / 10)
    close(gradient(kept.sum().double()), -kept.double() / 4)


def test_vppo_scale_is_that_of_the_rows_it_is_given():
    """As released, it depends on how the batch was cut; hence the whole rollout batch, sliced afterwards."""
    clean, corrupted, mask = views_of("++", "+0", "0-", "00")
    advantages = torch.ones(4, dtype=torch.float64)

    def of(rows):
        return vppo_weights(clean[rows], advantages[rows], mask[rows], corrupted_log_probs=corrupted[rows])

    whole = of(torch.arange(4))
    assert not torch.allclose(whole, torch.cat([of(rows) for rows in torch.arange(4).split(2)]))
    order = torch.tensor([2, 0, 3, 1])
    close(of(order), whole[order])


def test_no_token_counts():
    """verl answers NaN to a batch whose mask is empty."""
    nothing = torch.full((2, 3), math.nan).requires_grad_()
    mask = torch.zeros(2, 3, dtype=torch.bool)
    penalty = penalty_of(nothing, nothing, nothing, nothing, mask)
    assert penalty == 0
    assert (torch.autograd.grad(penalty, nothing)[0] == 0).all()
    assert not any(value.any() for value in weights_of(nothing, nothing, torch.ones(2), mask).values())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_sizes_of_zero(shape):
    empty, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    assert penalty_of(empty, empty, empty, empty, mask) == 0
    for value in weights_of(empty, empty, torch.zeros(shape[0]), mask).values():
        assert value.shape == shape


def test_impossible_tokens():
    """-inf in both views depends on neither, in one view as much as a score can; gradients stay finite."""
    clean = torch.tensor([[-math.inf, -1.0, -math.inf, -1.0]]).requires_grad_()
    corrupted = torch.tensor([[-math.inf, -math.inf, -1.0, -1.0]]).requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    dependency = k3(clean, mask, corrupted_log_probs=corrupted)
    assert dependency.tolist() == [[0.0, 10.0, 10.0, 0.0]]
    for gradient in torch.autograd.grad(dependency.sum(), [clean, corrupted]):
        assert gradient.isfinite().all()
    for value in weights_of(clean, corrupted, torch.ones(1), mask).values():
        assert value.isfinite().all()


# The rest of what every function of the core has to show.


def test_weights_have_no_gradient_and_at_least_float32():
    clean, corrupted = (-torch.rand(2, 2, 3)).bfloat16().requires_grad_()
    mask = torch.ones(2, 3, dtype=torch.bool)
    weights = weights_of(clean, corrupted, torch.ones(2).bfloat16(), mask)
    assert weights.pop("k3").requires_grad
    assert not any(value.requires_grad for value in weights.values())
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.bool}


def everything(clean, corrupted, advantages, mask):
    weights = weights_of(clean, corrupted, advantages, mask)
    mean_one = vppo_weights(clean, advantages, mask, corrupted_log_probs=corrupted, ceiling=None)
    return *weights.values(), mean_one, penalty_of(clean, corrupted, -clean, -corrupted, mask)


def test_no_value_is_read_on_the_host():
    """A meta tensor has a shape and no values: reading one raises."""
    clean, corrupted = torch.empty(2, 3, 5, device="meta")
    mask = torch.ones(3, 5, dtype=torch.bool, device="meta")
    for result in everything(clean, corrupted, torch.empty(3, device="meta"), mask):
        assert result.is_meta


def test_compiled_whole_equals_eager(fresh_compiler):
    clean, corrupted = -torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True, False, True, False, True], [False] * 5])
    inputs = clean, corrupted, torch.tensor([1.0, -1.0, 0.0]), mask
    torch.testing.assert_close(
        torch.compile(everything, fullgraph=True, backend="aot_eager")(*inputs), everything(*inputs)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, a, m: k3(x, m, corrupted_log_probs=x, clip=0.0), "clip must be above 0"),
        (lambda x, a, m: penalty_of(x, x, x, x, m, kl_coef=-1.0), "kl_coef must be at least 0, got -1"),
        (lambda x, a, m: penalty_of(x, x, x, x, m, entropy_coef=math.nan), "entropy_coef must be at least 0"),
        (lambda x, a, m: penalty_of(x, x, x, x, m, normalizer=0.0), "normalizer must be above 0"),
        (lambda x, a, m: vppo_weights(x, a, m, corrupted_log_probs=x, keep=0.0), r"keep must be in \(0, 1\]"),
        (lambda x, a, m: vppo_weights(x, a, m, corrupted_log_probs=x, floor=1.5), r"floor must be in \(0, 1\]"),
        (
            lambda x, a, m: vppo_weights(x, a, m, corrupted_log_probs=x, ceiling=0.5),
            r"ceiling must be at least floor \(0.9\)",
        ),
        (lambda x, a, m: pgpo_weights(x, m, corrupted_log_probs=x, threshold=1.0), r"threshold must be in \(0, 1\)"),
        (lambda x, a, m: pgpo_weights(x, m, corrupted_log_probs=x, boost=-1.0), "boost must be at least 0"),
        (lambda x, a, m: rlsd_weights(x, a, m, teacher_log_probs=x, mix=2.0), r"mix must be in \[0, 1\]"),
        (lambda x, a, m: rlsd_weights(x, a, m, teacher_log_probs=x, clip=-0.1), r"clip must be in \[0, 1\]"),
        (lambda x, a, m: entropy_mask(x, m, keep=1.1), r"keep must be in \(0, 1\]"),
    ],
)
def test_options_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool))


def test_advantages_per_token_are_refused():
    """Liger broadcasts them wrongly and says nothing."""
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for call, other in ((rlsd_weights, "teacher_log_probs"), (vppo_weights, "corrupted_log_probs")):
        with pytest.raises(TypeError, match="advantages must be Float"):
            call(x, x, mask, **{other: x})


def test_every_function_has_an_example_that_runs():
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(published)}
    for name in published.__all__:
        assert examples[name].examples
        assert doctest.DocTestRunner().run(examples[name]).failed == 0
