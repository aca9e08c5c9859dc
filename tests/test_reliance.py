"""Reliance: a reference with loops, closed forms, models that copy, and how it enters the scores."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from batches import batches
from helpers import as_lists, close
from hypothesis import given
from hypothesis import strategies as st

from srpo_core import Role, counterfactual_responses
from srpo_core.reliance import (
    apply_reliance,
    gradient_reliance,
    perception_spans,
    span_counterfactuals,
    span_reliance,
)

P, R, N = int(Role.PERCEPTION), int(Role.REASONING), int(Role.OTHER)


# The gradient form


def linear_model(embeddings, coefficients, mask):
    """Log-probs of tokens whose log-odds are linear in the embeddings up to their own."""
    inputs = torch.where(mask[:, :, None], embeddings, 0.0)
    log_odds = (coefficients * inputs[:, None]).sum((2, 3))
    return torch.where(mask, F.logsigmoid(log_odds), torch.nan)


@st.composite
def linear_inputs(draw):
    batch = draw(batches())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, time = batch.mask.shape
    coefficients = torch.randn(rows, time, time, 3, generator=g, dtype=torch.float64)
    # A large scale makes tokens certain, 1e-9 leaves hardly any gradient.
    coefficients = coefficients * draw(st.sampled_from([1e-9, 1.0, 8.0])) * torch.ones(time, time).tril()[:, :, None]
    embeddings = torch.randn(rows, time, 3, generator=g, dtype=torch.float64)
    embeddings = torch.where(batch.mask[:, :, None], embeddings, torch.nan).requires_grad_()
    return embeddings, coefficients, batch.roles, batch.mask


@given(linear_inputs())
def test_gradient_reliance_equals_the_reference(inputs):
    embeddings, coefficients, roles, mask = inputs
    log_probs = linear_model(embeddings, coefficients, mask)
    expected = reference.linear_reliance(*as_lists(coefficients, log_probs, roles, mask))
    with torch.no_grad():  # the graph is what counts, not the mode of the caller
        actual = gradient_reliance(log_probs, embeddings, roles, mask)
    close(actual, expected, rtol=1e-6)
    assert not actual.requires_grad
    assert embeddings.grad is None


@given(linear_inputs(), st.sampled_from([1e-6, 3.0, 1e6]))
def test_the_unit_of_the_embeddings_cancels(inputs, unit):
    embeddings, coefficients, roles, mask = inputs
    rescaled = (embeddings.detach() / unit).requires_grad_()
    close(
        gradient_reliance(linear_model(unit * rescaled, coefficients, mask), rescaled, roles, mask),
        gradient_reliance(linear_model(embeddings, coefficients, mask), embeddings, roles, mask),
        rtol=1e-6,
        atol=1e-9,
    )


@given(linear_inputs())
def test_rows_do_not_depend_on_each_other(inputs):
    embeddings, coefficients, roles, mask = inputs
    together = gradient_reliance(linear_model(embeddings, coefficients, mask), embeddings, roles, mask)
    for i in range(len(mask)):
        row = slice(i, i + 1)
        alone = embeddings.detach()[row].requires_grad_()
        log_probs = linear_model(alone, coefficients[row], mask[row])
        close(gradient_reliance(log_probs, alone, roles[row], mask[row])[0], together[i])


def test_gradient_reliance_by_hand():
    """Log-odds of the two reasoning tokens: 3 x + 4 y of the first, and 1 x of the first plus 2 y of the second."""
    embeddings = torch.tensor([[[0.1, 0.2], [0.3, -0.1], [0.5, 0.5], [0.0, 0.0]]], requires_grad=True)
    first, second = embeddings[0, 0], embeddings[0, 1]
    log_odds = torch.stack([torch.zeros(()), torch.zeros(()), 3 * first[0] + 4 * first[1], first[0] + 2 * second[1]])
    roles, mask = torch.tensor([[P, P, R, R]]), torch.ones(1, 4).bool()
    actual = gradient_reliance(F.logsigmoid(log_odds)[None], embeddings, roles, mask)
    u = [math.hypot(3 + 1, 4), 2.0]
    close(actual, [[2 * u[0] / sum(u), 2 * u[1] / sum(u), 0.0, 0.0]], rtol=1e-6)


def test_a_barred_reasoning_token_adds_nothing_to_the_reliance_by_gradient():
    """Its logit is minus infinity whatever the perception says; the others have the reliance they have among them."""
    embeddings = torch.tensor([[[0.1], [0.3], [0.5], [0.0]]], requires_grad=True)
    first, second = embeddings[0, 0, 0], embeddings[0, 1, 0]
    logits = torch.stack([3 * first + second, 2 * second, first])
    barred = logits.masked_fill(torch.tensor([False, False, True]), -math.inf).log_softmax(0)[2]
    log_probs = torch.stack([torch.zeros(()), torch.zeros(()), F.logsigmoid(logits[0]), barred])[None]
    assert log_probs[0, 3].item() == -math.inf
    actual = gradient_reliance(log_probs, embeddings, torch.tensor([[P, P, R, R]]), torch.ones(1, 4).bool())
    close(actual, [[1.5, 0.5, 0.0, 0.0]], rtol=1e-6)


def test_a_copied_token_counts_however_sure_and_a_certain_one_fades():
    """To p = .999 the log-odds keep their slope; beyond, it falls with 1 - p and rounding cannot make it infinite."""
    roles, mask = torch.tensor([[P, P, R, R]]), torch.ones(1, 4).bool()
    zeros = torch.zeros(1, 2)
    # With odds equal to an embedding, shares are slopes.
    for log_odds, slope in ((2.0, 1.0), (6.9, 1.0), (6.9078 + math.log(10), 0.1), (200.0, 0.0), (-200.0, 1.0)):
        embeddings = torch.tensor([[[log_odds], [0.0], [0.0], [0.0]]], requires_grad=True)
        log_probs = torch.cat([zeros, F.logsigmoid(embeddings[:, :2, 0])], dim=1)
        actual = gradient_reliance(log_probs, embeddings, roles, mask)
        close(actual, [[2 * slope / (slope + 1), 2 / (slope + 1), 0.0, 0.0]], rtol=1e-2, atol=1e-6)


def attend(embeddings, table, ids):
    """Each token reads the earlier one whose key, the first half of its embedding, is most like its own, and says it.

    So a token is likely where the one it looks up has its value, the second half.
    """
    keys, values = embeddings.chunk(2, dim=-1)
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril(-1).bool()
    attention = torch.where(causal, 12 * keys @ keys.mT, -1e9).softmax(-1)
    return (6 * (attention @ values) @ table.mT).log_softmax(-1).gather(2, ids[..., None]).squeeze(2)


def test_what_the_reasoning_does_not_look_up_has_no_reliance():
    key, value = torch.eye(4), torch.eye(4)
    # Four readings under four keys; the reasoning looks up keys 2, then 0, and says what it finds.
    looked_up, said = torch.tensor([0, 1, 2, 3, 2, 0]), torch.tensor([1, 2, 3, 0, 3, 1])
    embeddings = torch.cat([key[looked_up], value[said]], dim=1)[None].requires_grad_()
    roles, mask = torch.tensor([[P, P, P, P, R, R]]), torch.ones(1, 6).bool()
    reliance = gradient_reliance(attend(embeddings, value, said[None]), embeddings, roles, mask)[0]
    assert (reliance[[1, 3]] < 1e-3).all()
    assert (reliance[[0, 2]] > 0.9).all()
    assert reliance[:4].mean().item() == pytest.approx(1.0)


def test_half_precision_is_normalized_in_float32():
    embeddings = torch.tensor([[[1.0], [1.0], [1.0]]], dtype=torch.bfloat16, requires_grad=True)
    log_probs = F.logsigmoid(embeddings.cumsum(1)[..., 0] * torch.tensor([1.0, 1.0, 2.0], dtype=torch.bfloat16))
    reliance = gradient_reliance(log_probs, embeddings, torch.tensor([[P, P, R]]), torch.ones(1, 3).bool())
    assert reliance.dtype == torch.float32
    assert reliance.tolist() == [[1.0, 1.0, 0.0]]


def test_gradient_reliance_leaves_parameters_alone():
    weight = torch.ones(2, requires_grad=True)
    embeddings = torch.ones(1, 2, 2, requires_grad=True)
    gradient_reliance(
        F.logsigmoid(embeddings.cumsum(1) @ weight), embeddings, torch.tensor([[P, R]]), torch.ones(1, 2).bool()
    )
    assert weight.grad is None


def test_gradient_reliance_names_what_is_wrong():
    embeddings = torch.zeros(1, 2, 3, requires_grad=True)
    roles, mask = torch.tensor([[P, R]]), torch.ones(1, 2).bool()
    log_probs = F.logsigmoid(embeddings.sum(2))
    for without_graph in (log_probs.detach(), F.logsigmoid(torch.zeros(1, 2, requires_grad=True))):
        with pytest.raises(ValueError, match="log_probs has no graph to embeddings; run the forward"):
            gradient_reliance(without_graph, embeddings, roles, mask)
    with pytest.raises(ValueError, match="a slice or copy taken afterwards"):
        gradient_reliance(log_probs, embeddings[:, :], roles, mask)
    with pytest.raises(ValueError, match="log_probs has no graph to embeddings"):
        gradient_reliance(log_probs, embeddings.detach(), roles, mask)
    for wrong, name in ((math.nan, "NaN"), (math.inf, "inf")):
        with pytest.raises(ValueError, match=f"log_probs is {name} at trajectory 0 token 1"):
            gradient_reliance(log_probs + torch.tensor([[0.0, wrong]]), embeddings, roles, mask)
    infinite = torch.stack([torch.zeros(1), (embeddings.sum((1, 2)) ** 2).sqrt() - 1.0], dim=1)
    with pytest.raises(ValueError, match="the gradient of log_probs by embeddings is NaN at trajectory 0 token 0"):
        gradient_reliance(infinite, embeddings, roles, mask)
    with pytest.raises(ValueError, match="roles is 7 at trajectory 0 token 0"):
        gradient_reliance(log_probs, embeddings, roles + 6, mask)
    with pytest.raises(TypeError, match="embeddings must be .*align it with log_probs"):
        gradient_reliance(log_probs, embeddings[:, 1:], roles, mask)


# Spans


@given(batches(max_time=24), st.integers(1, 6))
def test_perception_spans_equal_the_reference(batch, count):
    actual = perception_spans(batch.roles, batch.mask, spans=count)
    assert actual.tolist() == reference.spans(batch.roles.tolist(), batch.mask.tolist(), count)
    for row in actual:
        numbers = row[row >= 0]
        sizes = numbers.bincount()
        assert len(sizes) == min(count, len(numbers))
        assert not len(sizes) or sizes.max() - sizes.min() <= 1
        assert numbers.tolist() == sorted(numbers.tolist())


@st.composite
def span_inputs(draw):
    batch = draw(batches())
    count = draw(st.integers(0, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 1e-6, 1.0, 8.0]))
    without = batch.log_probs + spread * torch.randn(count, *batch.mask.shape, generator=g, dtype=torch.float64)
    # Outside the perception a span is not read; inside it may be none.
    spans = torch.randint(-1, count, batch.mask.shape, generator=g)
    spans = torch.where(batch.mask & (batch.roles == P), spans, 77)
    tensors = {"without_log_probs": without, "spans": spans}
    return (batch.log_probs, batch.roles, batch.mask), tensors


@given(span_inputs(), st.sampled_from([0.5, 5.0]))
def test_span_reliance_equals_the_reference(inputs, clip):
    args, tensors = inputs
    log_probs, roles, mask = as_lists(*args)
    without, spans = as_lists(*tensors.values())
    expected = reference.span_reliance(log_probs, without, spans, roles, mask, clip=clip)
    close(span_reliance(*args, **tensors, clip=clip), expected)


@given(span_inputs(), linear_inputs())
def test_reliance_is_one_on_average(inputs, linear):
    args, tensors = inputs
    embeddings, coefficients, *others = linear
    by_gradient = gradient_reliance(linear_model(embeddings, coefficients, others[1]), embeddings, *others)
    for reliance, roles, mask in ((span_reliance(*args, **tensors), *args[1:]), (by_gradient, *others)):
        perception = mask & (roles == P)
        assert (reliance[~perception] == 0).all()
        assert (reliance >= 0).all()
        for i in range(len(mask)):
            if perception[i].any():
                assert reliance[i][perception[i]].mean().item() == pytest.approx(1.0)
            if not (mask[i] & (roles[i] == R)).any():
                assert (reliance[i][perception[i]] == 1).all()


def test_infinite_log_probs():
    """A token that is impossible without the span is worth the clip; one that never was possible nothing."""
    inf = math.inf
    log_probs = torch.tensor([[-1.0, -1.0, -1.0, -inf]])
    without = torch.tensor([[[-1.0, -1.0, -inf, -inf]], [[-1.0, -1.0, -3.5, -1.0]]])
    spans = torch.tensor([[0, 1, -1, -1]])
    roles, mask = torch.tensor([[P, P, R, R]]), torch.ones(1, 4).bool()
    actual = span_reliance(log_probs, roles, mask, without_log_probs=without, spans=spans)
    close(actual, [[2 * 5 / 7.5, 2 * 2.5 / 7.5, 0.0, 0.0]], rtol=1e-6)


def count_copies(token_ids, attention_mask):
    """A model without positions: it repeats what it attends to, a token seen twice the more."""
    seen = F.one_hot(token_ids, 12) * attention_mask[..., None]
    logits = 3.0 * (seen.cumsum(1) - seen)
    return logits.log_softmax(-1).gather(2, token_ids[..., None]).squeeze(2)


@pytest.mark.parametrize("kind", ["mask", "drop"])
def test_spans_left_out_by_counterfactual_responses(kind):
    """The recipe of the docstring: the reasoning relies on what it repeats, and on nothing else."""
    ids = torch.tensor([[1, 5, 7, 9, 3, 2, 7, 7, 11], [1, 6, 8, 2, 8, 6, 8, 11, 0], [1, 5, 7, 2, 11, 0, 0, 0, 0]])
    roles = torch.tensor([[N, P, P, P, P, N, R, R, N], [N, P, P, N, R, R, R, N, N], [N, P, P, N, N, N, N, N, N]])
    mask = ids > 0
    log_probs = count_copies(ids, mask)
    spans = perception_spans(roles, mask)
    without_log_probs = torch.empty(4, *ids.shape)
    for k in range(4):
        others = torch.where((spans != k) & (roles == Role.PERCEPTION), int(Role.OTHER), roles)
        without = counterfactual_responses(ids, others, mask, kind=kind)
        scored = count_copies(without.token_ids, without.attention_mask)
        without_log_probs[k] = without.carry_back(scored, original_log_probs=log_probs)
    reliance = span_reliance(log_probs, roles, mask, without_log_probs=without_log_probs, spans=spans)
    if kind == "drop":  # which is one call
        left_out = span_counterfactuals(ids, roles, mask)
        passes = [count_copies(each.token_ids, each.attention_mask) for each in left_out.responses]
        assert torch.equal(left_out.reliance(passes, roles, mask, original_log_probs=log_probs), reliance)
    assert reliance[0].tolist() == [0, 0, 4, 0, 0, 0, 0, 0, 0]
    assert 1.0 < reliance[1, 2] < 2.0  # said twice
    close(reliance[1, 1] + reliance[1, 2], 2.0)
    assert reliance[2].tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0]  # no reasoning


@given(batches(max_time=16), st.integers(1, 5), st.booleans())
def test_span_counterfactuals_equal_the_reference(batch, count, has_boundary):
    """Each pass is the tokens without one span, in their order, whatever tokens they are."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, batch.mask.shape, generator=g)
    straddles = (torch.rand(batch.mask.shape, generator=g) < 0.3) if has_boundary else torch.zeros_like(batch.mask)
    without = span_counterfactuals(
        ids, batch.roles, batch.mask, spans=count, boundary=straddles if has_boundary else None, pad_token_id=99
    )
    inside = torch.where(straddles, N, batch.roles)
    assert without.spans.tolist() == reference.spans(inside.tolist(), batch.mask.tolist(), count)
    assert len(without.responses) == count
    for k, responses in enumerate(without.responses):
        for row in range(len(ids)):
            end = max(batch.mask[row].nonzero().flatten().tolist(), default=-1) + 1
            kept = [t for t in range(end) if without.spans[row, t] != k]
            assert responses.token_ids[row][responses.attention_mask[row]].tolist() == ids[row, kept].tolist()
            assert (responses.token_ids[row][~responses.attention_mask[row]] == 99).all()
            assert responses.positions[row, kept].tolist() == list(range(len(kept)))


@given(batches(), st.integers(1, 4), st.sampled_from([0.5, 5.0]))
def test_reliance_of_left_out_spans_is_span_reliance_of_what_is_carried_back(batch, count, clip):
    g = torch.Generator().manual_seed(0)
    without = span_counterfactuals(torch.ones_like(batch.roles), batch.roles, batch.mask, spans=count)
    old = batch.old_log_probs
    passes = [-3 * torch.rand(each.token_ids.shape, generator=g, dtype=old.dtype) for each in without.responses]
    carried = old.repeat(count, 1, 1)
    for k, each in enumerate(without.responses):
        for row in range(len(old)):
            removed = (without.spans[row] == k).nonzero().flatten().tolist()
            for time in range(min(removed, default=old.shape[1]), old.shape[1]):
                if each.positions[row, time] >= 0:
                    carried[k, row, time] = passes[k][row, each.positions[row, time]]
    expected = reference.span_reliance(*as_lists(old, carried, without.spans, batch.roles, batch.mask), clip=clip)
    close(without.reliance(passes, batch.roles, batch.mask, original_log_probs=old, clip=clip), expected)


def test_a_token_that_straddles_a_tag_stays_and_its_reliance_is_one():
    ids, roles = torch.tensor([[1, 5, 7, 2, 7]]), torch.tensor([[N, P, P, N, R]])
    straddles = torch.tensor([[False, True, False, False, False]])
    mask = ids > 0
    without = span_counterfactuals(ids, roles, mask, spans=2, boundary=straddles)
    assert [each.token_ids.tolist() for each in without.responses] == [[[1, 5, 2, 7]], ids.tolist()]
    passes = [count_copies(each.token_ids, each.attention_mask) for each in without.responses]
    original = count_copies(ids, mask)
    assert without.reliance(passes, roles, mask, original_log_probs=original).tolist() == [[0, 1, 1, 0, 0]]


def test_span_counterfactuals_name_what_is_wrong():
    ids, roles, mask = torch.tensor([[5, 5]]), torch.tensor([[P, R]]), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match="spans must be at least 1, got 0"):
        span_counterfactuals(ids, roles, mask, spans=0)
    with pytest.raises(ValueError, match="^roles is 5 at trajectory 0 token 0"):  # exchanged with the tokens
        span_counterfactuals(roles, ids, mask)
    without, zeros = span_counterfactuals(ids, roles, mask, spans=2), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="log_probs holds 1 passes, and there are 2 spans to leave out: score each"):
        without.reliance([zeros[:, 1:]], roles, mask, original_log_probs=zeros)
    with pytest.raises(ValueError, match=r"log_probs must have shape \(1, 1\), got \(1, 2\)"):
        without.reliance([zeros, zeros], roles, mask, original_log_probs=zeros)
    with pytest.raises(ValueError, match="clip must be above 0, got 0"):
        without.reliance([zeros[:, 1:], zeros], roles, mask, original_log_probs=zeros, clip=0.0)


def test_span_reliance_names_what_is_wrong():
    zeros, roles, mask = torch.zeros(1, 2), torch.tensor([[P, R]]), torch.ones(1, 2).bool()
    nan, first = torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2).long()

    def reliance(log_probs=zeros, without=None, spans=first, **options):
        without = zeros[None] if without is None else without
        return span_reliance(log_probs, roles, mask, without_log_probs=without, spans=spans, **options)

    assert reliance().tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match=r"^without_log_probs\[1\] is NaN at trajectory 0 token 1"):
        reliance(without=torch.stack([zeros, nan]))
    with pytest.raises(ValueError, match="^log_probs is NaN at trajectory 0 token 1"):
        reliance(nan)
    with pytest.raises(ValueError, match="^spans is 1 at trajectory 0 token 0, and without_log_probs holds 1 passes"):
        reliance(spans=first + 1)
    with pytest.raises(ValueError, match="^clip must be above 0, got 0"):
        reliance(clip=0.0)
    with pytest.raises(ValueError, match="^spans must be at least 1, got 0"):
        perception_spans(roles, mask, spans=0)
    with pytest.raises(TypeError, match="without_log_probs must be"):
        reliance(without=zeros)


# The scores after reliance


@st.composite
def relied_on(draw):
    batch = draw(batches())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    reliance = torch.rand(batch.mask.shape, generator=g, dtype=torch.float64)
    return batch, torch.where(batch.mask & (batch.roles == P), reliance, torch.nan)


MODES = ["product", "share"]


@given(relied_on(), st.sampled_from(MODES))
def test_apply_reliance_equals_the_reference(inputs, mode):
    batch, reliance = inputs
    actual = apply_reliance(batch.scores, batch.roles, batch.mask, reliance=reliance, mode=mode)
    expected = reference.apply_reliance(*as_lists(batch.scores, reliance, batch.roles, batch.mask), mode=mode)
    close(actual, expected, equal_nan=True)
    others = ~(batch.mask & (batch.roles == P))
    assert torch.equal(actual[others].nan_to_num(9.0), batch.scores[others].nan_to_num(9.0))


@pytest.mark.parametrize("mode", ["product", "share"])
def test_apply_reliance_reads_an_infinite_divergence_as_20_nats(mode):
    reliance, roles, mask = torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[P, P, R]]), torch.ones(1, 3).bool()
    actual = apply_reliance(torch.tensor([[math.inf, 4.0, 1.0]]), roles, mask, reliance=reliance, mode=mode)
    assert actual.tolist() == [[0.0, 8.0 if mode == "product" else 24.0, 1.0]]


def test_apply_reliance_computes_in_float32_without_a_gradient():
    scores = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    actual = apply_reliance(scores, torch.tensor([[P, R]]), torch.ones(1, 2).bool(), reliance=torch.full((1, 2), 1.001))
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    close(actual, [[1.001, 3.0]], rtol=1e-6)


def test_apply_reliance_names_what_is_wrong():
    ones, roles, mask = torch.ones(1, 2), torch.tensor([[P, R]]), torch.ones(1, 2).bool()
    nan = torch.tensor([[math.nan, 1.0]])
    with pytest.raises(ValueError, match="^reliance is NaN at trajectory 0 token 0"):
        apply_reliance(ones, roles, mask, reliance=nan)
    with pytest.raises(ValueError, match="^scores is NaN at trajectory 0 token 0"):
        apply_reliance(nan, roles, mask, reliance=ones)
    with pytest.raises(ValueError, match="mode must be one of 'product', 'share', got 'sum'"):
        apply_reliance(ones, roles, mask, reliance=ones, mode="sum")
    with pytest.raises(ValueError, match="^roles is 7 at trajectory 0 token 0"):
        apply_reliance(ones, roles + 6, mask, reliance=ones)


def test_compiled_whole_equals_eager(fresh_compiler):
    g = torch.Generator().manual_seed(0)

    def whole(log_probs, without, roles, mask):
        spans = perception_spans(roles, mask, spans=3)
        reliance = span_reliance(log_probs, roles, mask, without_log_probs=without, spans=spans)
        return reliance, *(apply_reliance(log_probs, roles, mask, reliance=reliance, mode=mode) for mode in MODES)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for shape in ((3, 8), (5, 11)):  # the second makes a second graph, of any shape
        roles, mask = torch.randint(0, 3, shape, generator=g), torch.rand(shape, generator=g) < 0.9
        log_probs, *without = -torch.rand(4, *shape, generator=g)
        inputs = log_probs, torch.stack(without), roles, mask
        torch.testing.assert_close(compiled(*inputs), whole(*inputs))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_batch_is_empty(shape):
    empty = torch.zeros(shape)
    roles, mask = empty.long(), empty.bool()
    embeddings = torch.zeros(*shape, 2, requires_grad=True)
    assert gradient_reliance(embeddings.sum(2), embeddings, roles, mask).shape == shape
    assert perception_spans(roles, mask).shape == shape
    assert span_reliance(empty, roles, mask, without_log_probs=torch.zeros(4, *shape), spans=roles).shape == shape
    without = span_counterfactuals(roles, roles, mask)
    passes = [torch.zeros(each.token_ids.shape) for each in without.responses]
    assert without.reliance(passes, roles, mask, original_log_probs=empty).shape == shape
    for mode in MODES:
        assert apply_reliance(empty, roles, mask, reliance=empty, mode=mode).shape == shape
