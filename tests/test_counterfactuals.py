"""Counterfactual responses: against lists, token by token, and through a small model that scores them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from srpo_core import Role, counterfactual_responses, token_log_probs

OTHER, PERCEPTION, REASONING = Role.OTHER, Role.PERCEPTION, Role.REASONING
PAD = 99


@st.composite
def responses(draw, max_batch=5, max_time=8):
    """Rows of (token, role, mask, boundary) and groups; few tokens, so that perceptions are often the same."""
    cells = st.tuples(
        st.integers(0, 2),
        st.sampled_from([0, 1, 1, 2]),
        st.sampled_from([True] * 4 + [False]),
        st.integers(0, 5).map(lambda n: not n),
    )
    rows = draw(st.lists(st.lists(cells, max_size=max_time), min_size=1, max_size=max_batch))
    groups = draw(st.none() | st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    return rows, groups


def tensors(rows, junk=0):
    """Padding may hold anything: here tokens, roles and boundaries that must not be read."""
    time = max(map(len, rows))
    padding = (77 + junk, PERCEPTION, False, bool(junk))
    padded = torch.tensor([row + [padding] * (time - len(row)) for row in rows], dtype=torch.int64)
    ids, roles, mask, boundary = padded.reshape(len(rows), time, 4).unbind(-1)
    return ids, roles, mask.bool(), boundary.bool()


def slow(rows, groups, kind):
    """Of each row: new tokens, whether sampled, whether attended, place of each original token, donor."""
    count = len(rows)
    groups = list(range(count)) if groups is None else groups
    ends = [max((t + 1 for t, cell in enumerate(row) if cell[2]), default=0) for row in rows]

    def is_content(cell):
        return cell[1] == PERCEPTION and cell[2] and not cell[3]

    contents = [[cell[0] for cell in row if is_content(cell)] for row in rows]
    answers = []
    for i, row in enumerate(rows):
        donor = -1
        if kind == "swap" and contents[i]:
            others = [(i + step) % count for step in range(1, count)]
            others = [j for j in others if contents[j] and contents[j] != contents[i]]
            mates = [j for j in others if groups[j] == groups[i]]
            donor = (mates + others + [-1])[0]
        new, places, inserted = [], [-1] * len(row), False
        for t, cell in enumerate(row[: ends[i]]):
            if is_content(cell) and (kind == "drop" or (kind == "swap" and donor >= 0)):
                if kind == "swap" and not inserted:
                    new += [(token, True, True) for token in contents[donor]]
                    inserted = True
                continue
            hidden = kind == "mask" and is_content(cell)
            if not hidden:
                places[t] = len(new)
            new.append((cell[0], cell[2], not hidden))
        answers.append((new, places, donor))
    return answers


@pytest.mark.parametrize("kind", ["swap", "drop", "mask"])
@settings(max_examples=150)
@given(drawn=responses())
def test_counterfactual_responses_agree_with_lists(kind, drawn):
    rows, groups = drawn
    ids, roles, mask, boundary = tensors(rows)
    before = [tensor.clone() for tensor in (ids, roles, mask, boundary)]
    group_ids = None if groups is None else torch.tensor(groups)
    result = counterfactual_responses(
        ids, roles, mask, kind=kind, group_ids=group_ids, boundary=boundary, pad_token_id=PAD
    )
    expected = slow(rows, groups, kind)
    assert result.donors.tolist() == [donor for _, _, donor in expected]
    if kind != "mask":  # nothing is wider than its longest row
        assert result.token_ids.shape[1] == max(len(new) for new, _, _ in expected)
    width, time = result.token_ids.shape[1], ids.shape[1]
    for row, (new, places, _) in enumerate(expected):
        filled = new + [(PAD, False, False)] * (width - len(new))
        assert result.token_ids[row].tolist() == [token for token, _, _ in filled]
        assert result.mask[row].tolist() == [sampled for _, sampled, _ in filled]
        assert result.attention_mask[row].tolist() == [attended for _, _, attended in filled]
        assert result.positions[row].tolist() == places + [-1] * (time - len(places))
    for tensor, copy in zip((ids, roles, mask, boundary), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("kind", ["swap", "drop", "mask"])
@given(drawn=responses())
def test_padding_may_hold_anything(kind, drawn):
    rows, groups = drawn
    group_ids = None if groups is None else torch.tensor(groups)
    one, other = (
        counterfactual_responses(ids, roles, mask, kind=kind, group_ids=group_ids, boundary=boundary)
        for ids, roles, mask, boundary in (tensors(rows, junk=0), tensors(rows, junk=1))
    )
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


@given(drawn=responses())
def test_donors_differ_and_group_mates_come_first(drawn):
    rows, groups = drawn
    ids, roles, mask, boundary = tensors(rows)
    group_ids = torch.arange(len(rows)) if groups is None else torch.tensor(groups)
    donors = counterfactual_responses(ids, roles, mask, group_ids=group_ids, boundary=boundary).donors.tolist()
    content = [ids[i][mask[i] & (roles[i] == PERCEPTION) & ~boundary[i]].tolist() for i in range(len(rows))]
    for i, donor in enumerate(donors):
        candidates = [j for j in range(len(rows)) if content[i] and content[j] and content[j] != content[i]]
        assert (donor >= 0) == bool(candidates)
        if donor >= 0:
            assert donor in candidates
            has_mate = any(group_ids[j] == group_ids[i] for j in candidates)
            assert bool(group_ids[donor] == group_ids[i]) == has_mate


def perceptions(*contents):
    """One row a perception: tag 1, content, tag 2, and token 3 that reasons."""
    return tensors([[(1, OTHER, True, False), *((token, PERCEPTION, True, False) for token in content),
                     (2, OTHER, True, False), (3, REASONING, True, False)] for content in contents])[:3]  # fmt: skip


@pytest.mark.parametrize(
    ("contents", "groups", "donors"),
    [
        ([[5], [6], [7]], [0, 0, 0], [1, 2, 0]),  # the next, in cyclic order
        ([[5], [5], [6]], [0, 0, 0], [2, 2, 0]),  # the same text is no donor
        ([[5], [6], [7], [8]], [0, 1, 0, 1], [2, 3, 0, 1]),  # a group mate before a nearer stranger
        ([[5], [6], [5], [8]], [0, 1, 0, 1], [1, 3, 3, 1]),  # a stranger where every mate says the same
        ([[5], [], [6]], [0, 0, 0], [2, -1, 0]),  # the empty neither gives nor takes
        ([[5], [5]], [0, 0], [-1, -1]),
        ([[5], [5, 99], [99, 5]], [0, 0, 0], [1, 2, 0]),  # longer, or in another order, is different
        ([[0], [0, 0]], [0, 0], [1, 0]),  # even where the difference looks like padding
    ],
)
def test_donors_by_hand(contents, groups, donors):
    ids, roles, mask = perceptions(*contents)
    result = counterfactual_responses(ids, roles, mask, group_ids=torch.tensor(groups))
    assert result.donors.tolist() == donors


def test_several_blocks_straddling_tokens_and_tool_outputs_by_hand():
    row = [
        (1, OTHER, True, True), (5, PERCEPTION, True, True), (6, PERCEPTION, True, False), (2, OTHER, True, True),
        (8, OTHER, False, False), (1, OTHER, True, True), (7, PERCEPTION, True, False), (2, OTHER, True, True),
        (3, REASONING, True, False), (9, OTHER, False, False),
    ]  # fmt: skip
    other = [
        (1, OTHER, True, True),
        (4, PERCEPTION, True, False),
        (4, PERCEPTION, True, False),
        (4, PERCEPTION, True, False),
    ]
    ids, roles, mask, boundary = tensors([row, other])
    swapped = counterfactual_responses(ids, roles, mask, boundary=boundary, pad_token_id=PAD)
    assert swapped.token_ids.tolist() == [[1, 5, 4, 4, 4, 2, 8, 1, 2, 3], [1, 6, 7, PAD, PAD, PAD, PAD, PAD, PAD, PAD]]
    assert swapped.mask[0].tolist() == [True] * 6 + [False] + [True] * 3  # the tool output 8 is context
    assert swapped.attention_mask.tolist() == [[True] * 10, [True] * 3 + [False] * 7]
    assert swapped.positions[0].tolist() == [0, 1, -1, 5, 6, 7, -1, 8, 9, -1]


class TestCarryBack:
    def test_only_what_follows_a_removed_token_is_carried(self):
        """Before it the context is the same, and so must be the log-probability: no noise of a second pass."""
        ids, roles, mask = perceptions([5, 6], [7], [])
        original = torch.randn(3, 5)
        for kind, places in (("swap", [[2, 3], [3, 4]]), ("drop", [[1, 2], [1, 2]]), ("mask", [[3, 4], [2, 3]])):
            result = counterfactual_responses(ids, roles, mask, kind=kind)
            scored = torch.randn(result.token_ids.shape)
            carried = result.carry_back(scored, original_log_probs=original)
            expected = original.clone()
            expected[0, 3:], expected[1, 2:4] = scored[0, places[0]], scored[1, places[1]]
            assert torch.equal(carried, expected)  # the third row has no perception

    def test_rows_without_a_donor_have_no_contrast(self):
        ids, roles, mask = perceptions([5, 6], [5, 6])
        result = counterfactual_responses(ids, roles, mask)
        original = torch.randn(2, 5)
        assert torch.equal(result.token_ids, ids)
        assert torch.equal(result.carry_back(torch.randn(2, 5), original_log_probs=original), original)

    def test_everything_dropped(self):
        ids = torch.tensor([[5, 6]])
        result = counterfactual_responses(ids, torch.ones_like(ids), ids > 0, kind="drop")
        assert result.token_ids.shape == (1, 0)
        original = torch.randn(1, 2)
        assert torch.equal(result.carry_back(torch.empty(1, 0), original_log_probs=original), original)

    def test_shapes_are_checked(self):
        ids, roles, mask = perceptions([5, 6], [7])
        result = counterfactual_responses(ids, roles, mask, kind="drop")
        with pytest.raises(ValueError, match=r"^log_probs must have shape \(2, 3\), got \(2, 5\)"):
            result.carry_back(torch.zeros(2, 5), original_log_probs=torch.zeros(2, 5))
        with pytest.raises(ValueError, match=r"original_log_probs must have shape \(2, 5\), got \(2, 3\)"):
            result.carry_back(torch.zeros(2, 3), original_log_probs=torch.zeros(2, 3))


class TinyCausalModel(nn.Module):
    """A transformer block with learned absolute positions, which count attended tokens only."""

    def __init__(self, vocabulary=12, width=16, length=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids, attention_mask):
        position = (attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.tokens(ids) + self.places(position)
        time = ids.shape[1]
        causal = torch.ones(time, time, dtype=torch.bool).tril()
        # A token that nobody may attend still attends itself, lest its softmax be empty.
        seen = causal & (attention_mask[:, None, :] | torch.eye(time, dtype=torch.bool))
        blocked = (~seen).repeat_interleave(2, dim=0)
        hidden = hidden + self.attention(hidden, hidden, hidden, attn_mask=blocked, need_weights=False)[0]
        return self.head(hidden + self.mlp(hidden))


def score(model, prompt, ids, attention_mask):
    """Log-probability of each response token after a prompt that all rows share."""
    prompts = torch.tensor(prompt).expand(len(ids), -1)
    whole = torch.cat([prompts, ids], dim=1)
    attended = torch.cat([torch.ones_like(prompts, dtype=torch.bool), attention_mask], dim=1)
    logits = model(whole, attended)[:, len(prompt) - 1 : -1]
    return token_log_probs(logits, ids)


@pytest.mark.parametrize("kind", ["swap", "drop", "mask"])
@settings(max_examples=25)
@given(drawn=responses(max_batch=4), seed=st.integers(0, 99))
def test_log_probs_carried_back_equal_one_by_one_scoring_without_padding(kind, drawn, seed):
    rows, groups = drawn
    torch.manual_seed(seed)
    model, prompt = TinyCausalModel().eval().double(), [9, 10, 11]
    ids, roles, mask, boundary = tensors(rows)
    ids = torch.where(ids > 2, 3, ids)
    group_ids = None if groups is None else torch.tensor(groups)
    result = counterfactual_responses(
        ids, roles, mask, kind=kind, group_ids=group_ids, boundary=boundary, pad_token_id=8
    )
    with torch.no_grad():
        inside = mask.flip(1).cumsum(1).flip(1) > 0
        original = score(model, prompt, ids, inside)
        scored = score(model, prompt, result.token_ids, result.attention_mask)
        carried = result.carry_back(scored, original_log_probs=original)
        for row, (new, places, _) in enumerate(slow(rows, groups, kind)):
            # One by one: only what may be attended, nothing else in the sequence.
            kept = [token for token, _, attended in new if attended]
            ranks = torch.tensor([attended for _, _, attended in new], dtype=torch.int64).cumsum(0) - 1
            if not kept:
                continue
            alone = torch.tensor([kept])
            truth = score(model, prompt, alone, torch.ones_like(alone, dtype=torch.bool))[0]
            for t, place in enumerate(places):
                if place < 0:
                    assert carried[row, t] == original[row, t]
                elif kind != "mask" or t == 0 or places[t - 1] >= 0:
                    torch.testing.assert_close(carried[row, t], truth[ranks[place]], rtol=0, atol=1e-5)


def test_mask_hides_all_but_the_token_right_after_from_the_perception():
    """A token is predicted at the place before it; right after hidden content that place is hidden: keep the tags."""
    ids, roles, mask = perceptions([5, 6])
    result = counterfactual_responses(ids, roles, mask, kind="mask")
    model = TinyCausalModel().eval()
    other = torch.where(roles == PERCEPTION, 7, ids)
    with torch.no_grad():
        one, two = (score(model, [9], tokens, result.attention_mask)[0] for tokens in (ids, other))
    assert torch.equal(one[4], two[4])  # reasoning, predicted at the closing tag
    assert not torch.equal(one[3], two[3])  # the closing tag, predicted at the last hidden token


@pytest.mark.parametrize("kind", ["swap", "drop", "mask"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty_batches(kind, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    result = counterfactual_responses(ids, ids, ids > 0, kind=kind)
    assert result.donors.tolist() == [-1] * shape[0]
    assert result.positions.shape == shape
    scored = torch.zeros(result.token_ids.shape)
    assert result.carry_back(scored, original_log_probs=torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("kind", ["swap", "drop", "mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_dtypes(kind, dtype):
    ids, roles, mask = perceptions([5, 6], [7])
    result = counterfactual_responses(
        ids.to(dtype), roles.to(dtype), mask, kind=kind, group_ids=torch.zeros(2, dtype=dtype)
    )
    assert [tensor.dtype for tensor in result] == [dtype, torch.bool, torch.bool, torch.int64, torch.int64]
    scored = torch.zeros(result.token_ids.shape, dtype=torch.float64)
    carried = result.carry_back(scored, original_log_probs=torch.zeros(2, 5).double())
    assert carried.dtype == torch.float64


def test_arguments_are_checked():
    ids, roles, mask = perceptions([5, 6], [7])
    with pytest.raises(ValueError, match="kind must be one of 'swap', 'drop', 'mask', got 'shuffle'"):
        counterfactual_responses(ids, roles, mask, kind="shuffle")
    with pytest.raises(TypeCheckError, match="group_ids must be Int"):
        counterfactual_responses(ids, roles, mask, group_ids=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeCheckError, match=r"pass mask.bool\(\)"):
        counterfactual_responses(ids, roles, mask.long())
    with pytest.raises(ValueError, match="^roles is 5 at trajectory 0 token 1"):  # exchanged with the tokens
        counterfactual_responses(roles, ids, mask)


def test_a_donor_says_something_else_by_the_keys_where_there_are_any():
    """Rows 0 and 1 paraphrase each other; row 2, of another prompt, is the first that says something else."""
    ids = torch.tensor([[1, 7, 2, 8], [1, 9, 2, 8], [1, 5, 2, 8]])
    roles = torch.tensor([[0, 1, 0, 2]] * 3)
    groups, keys = torch.tensor([0, 0, 1]), torch.tensor([4, 4, 6])
    by_tokens = counterfactual_responses(ids, roles, ids > 0, group_ids=groups)
    by_keys = counterfactual_responses(ids, roles, ids > 0, group_ids=groups, perception_keys=keys)
    assert by_tokens.donors.tolist() == [1, 0, 0]
    assert by_keys.donors.tolist() == [2, 2, 0]
    same = counterfactual_responses(ids, roles, ids > 0, perception_keys=torch.zeros(3).long())
    assert same.donors.tolist() == [-1, -1, -1]
    assert torch.equal(same.token_ids, ids)
