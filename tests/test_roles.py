"""Roles: every rule in one table, then random responses against a slow reader that goes character by character."""

import dataclasses
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from tiny_tokenizers import EOS, PADDING, byte_bpe, token_bytes, unigram, with_tags

from srpo_core import Role, RoleTags, segment_responses, segment_roles
from srpo_core.roles import check_roles, label_tokens, role_masks, roles_of_blocks
from srpo_core.tags import BrokenReason, RoleTagIds, parse_response

TAGS = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("<a>", "</a>"))
BOXED = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("\\boxed{", "}"))
LONG_TAGS = RoleTags()
TAG_IDS = RoleTagIds(1, 2, 3, 4, 5, 6)
ID_OF = dict(zip(("<p>", "</p>", "<t>", "</t>", "<a>", "</a>"), TAG_IDS, strict=True))
EOS_ID = 0


class Characters:
    """Every character is a token; id 0 ends the text."""

    eos_token_id = EOS_ID

    def decode(self, ids):
        return "".join(map(chr, ids))


def read_text(text, finished, tags=TAGS, **options):
    """Roles of a text from its characters: reason, perception text, reasoning text, other text."""
    ids = torch.tensor([[ord(character) for character in text] + [EOS_ID] * finished])
    result = segment_responses(ids, torch.ones_like(ids, dtype=torch.bool), Characters(), tags=tags, **options)
    return summary(result, [*text, ""])


def read_tags(text, finished, **options):
    """The same from one token a tag."""
    pieces = re.findall("|".join(map(re.escape, ID_OF)) + "|.", text, flags=re.DOTALL)
    ids = torch.tensor([[ID_OF.get(piece, ord(piece[0])) for piece in pieces] + [EOS_ID] * finished])
    mask = torch.ones_like(ids, dtype=torch.bool)
    return summary(segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=EOS_ID, **options), [*pieces, ""])


def summary(segmentation, pieces):
    roles = segmentation.roles[0].tolist()
    texts = {role: "".join(p for p, r in zip(pieces, roles, strict=False) if r == role) for role in Role}
    return BrokenReason(int(segmentation.broken[0])).name, texts[Role.PERCEPTION], texts[Role.REASONING]


# text, finished, reason, what is perception, what is reasoning
RULES = {
    "tags, text outside blocks and EOS are other": ("x<p>12</p>y<t>34</t>z<a>5</a>", True, "NONE", "12", "345"),
    "truncated: the open block runs to the end": ("<p>12</p><t>34", False, "NONE", "12", "34"),
    "truncated in the perception": ("<p>12", False, "NONE", "12", ""),
    "truncated in the answer": ("<p>12</p><a>34", False, "NONE", "12", "34"),
    "truncated outside a block": ("<p>12</p>x", False, "NONE", "12", ""),
    "unclosed though EOS was emitted": ("<p>12</p><t>34", True, "UNCLOSED", "", ""),
    "unclosed perception though EOS was emitted": ("<p>12", True, "UNCLOSED", "", ""),
    "nested": ("<p>1<t>2</t></p>", True, "NESTED", "", ""),
    "nested in its own kind": ("<p>1<p>2</p></p>", True, "NESTED", "", ""),
    "nested and truncated": ("<p>1</p><t>2<a>3", False, "NESTED", "", ""),
    "nested, and the next tag closes neither": ("<p>1<t>2</a></p>", True, "NESTED", "", ""),
    "crossed": ("<p>1<t>2</p>3</t>", True, "CROSSED", "", ""),
    "stray close outside blocks": ("<p>1</p></t>", True, "STRAY_CLOSE", "", ""),
    "stray close inside another block": ("<p>1</t>2</p>", True, "STRAY_CLOSE", "", ""),
    "stray close first of all": ("</p>1", False, "STRAY_CLOSE", "", ""),
    "closed twice": ("<p>1</p></p>", True, "STRAY_CLOSE", "", ""),
    "two answers": ("<p>1</p><a>2</a><a>3</a>", True, "TWO_ANSWERS", "", ""),
    "two answers, the second truncated": ("<p>1</p><a>2</a><a>3", False, "TWO_ANSWERS", "", ""),
    "the first fault counts": ("<p>1</p><a>2</a><a>3</a></t>", True, "TWO_ANSWERS", "", ""),
    "and not a later one": ("<p>1</p></t><p>1<t>2</p><a>2</a><a>3</a>", True, "STRAY_CLOSE", "", ""),
    "a fault counts before a missing perception": ("<t>1</t></t>", True, "STRAY_CLOSE", "", ""),
    "unclosed counts before a missing perception": ("<t>1", True, "UNCLOSED", "", ""),
    "no perception": ("<t>1</t><a>2</a>", True, "NO_PERCEPTION", "", ""),
    "no perception, truncated": ("<t>1", False, "NO_PERCEPTION", "", ""),
    "no tags": ("12", True, "NO_PERCEPTION", "", ""),
    "nothing": ("", True, "NO_PERCEPTION", "", ""),
    "think before the first perception is other": ("<t>1</t><p>2</p><t>3</t>", True, "NONE", "2", "3"),
    "answer before the first perception is other": ("<a>1</a><p>2</p>", True, "NONE", "2", ""),
    "several blocks": ("<p>1</p><t>2</t><p>3</p><t>4</t><a>5</a>", True, "NONE", "13", "245"),
    "empty perception: reasoning becomes other": ("<p></p><t>2</t><a>3</a>", True, "NONE", "", ""),
    "empty perception, then a real one": ("<p></p><t>2</t><p>3</p><t>4</t>", True, "NONE", "3", "4"),
    "real perception, then an empty one": ("<p>1</p><p></p><t>4</t>", True, "NONE", "1", "4"),
    "empty reasoning": ("<p>1</p><t></t>", True, "NONE", "1", ""),
}


@pytest.mark.parametrize("read", [read_text, read_tags])
@pytest.mark.parametrize("rule", RULES)
def test_rule(rule, read):
    text, finished, *expected = RULES[rule]
    assert list(read(text, finished)) == expected


@pytest.mark.parametrize("read", [read_text, read_tags])
def test_answer_tokens_are_reasoning_or_other(read):
    text = "<p>1</p><t>2</t><a>3</a>"
    assert read(text, True, answer_role="reasoning") == ("NONE", "1", "23")
    assert read(text, True, answer_role="other") == ("NONE", "1", "2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p> \n</p><t>2</t>", ("NONE", "", "")),
        ("<p> </p><t>2</t><p>3</p><t> </t>", ("NONE", "3", " ")),
        ("<p> 3\n</p><t>2</t>", ("NONE", " 3\n", "2")),
    ],
)
def test_perception_of_whitespace_counts_as_empty(text, expected):
    assert read_text(text, True) == expected


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("<p>1</p>\\boxed{\\frac{2}{3}}x}", True, ("NONE", "1", "\\frac{2}{3}")),
        ("<p>{1}}{</p><t>}</t>\\boxed{2}", True, ("NONE", "{1}}{", "}2")),
        ("<p>1</p>\\boxed{\\left\\{2\\right.}", True, ("NONE", "1", "\\left\\{2\\right.")),
        ("<p>1</p>\\boxed{2\\\\}3", True, ("NONE", "1", "2\\\\")),
        ("<p>1</p>\\boxed{{2}", False, ("NONE", "1", "{2}")),
        ("<p>1</p>\\boxed{{2}", True, ("UNCLOSED", "", "")),
        ("<p>1</p>\\boxed{2}\\boxed{3}", True, ("TWO_ANSWERS", "", "")),
        ("<p>1\\boxed{2}</p>", True, ("NESTED", "", "")),
        ("<p>1</p>\\boxed{2<t>3}</t>", True, ("NESTED", "", "")),
        ("<p>1</p>\\boxed{2</p>}", True, ("STRAY_CLOSE", "", "")),
        ("}<p>1</p>{}", True, ("NONE", "1", "")),
    ],
)
def test_boxed_answers_close_at_their_own_brace(text, finished, expected):
    assert read_text(text, finished, BOXED) == expected


def test_any_strings_may_be_tags():
    tags = RoleTags(("<description>", "</description>"), ("# Think\n", "\n# End"), None)
    text = "<description>1</description># Think\n2\n# End<answer>3</answer>"
    assert read_text(text, True, tags) == ("NONE", "1", "2")
    # One tag may begin another: the longer one is meant.
    tags = RoleTags(("<p", "/p"), ("<p>>", "/p>>"), None)
    assert read_text("<p1/p<p>>2/p>>", True, tags) == ("NONE", "1", "2")


# A slow reader, written from the table of rules: character by character, and bytes instead of decoded tokens.


def slow_labels(text, tags, finished, answer_role):
    """The reason, and of each character "tag" or its role."""
    kinds = [("perception", *tags.perception), ("reasoning", *tags.reasoning)]
    kinds += [("answer", *tags.answer)] if tags.answer else []
    boxed = tags.answer == ("\\boxed{", "}")
    events, i, depth, in_box = [], 0, None, False
    while i < len(text):
        for kind, opening, closing in kinds:
            if text.startswith(opening, i):
                events.append((kind, "open", i, i + len(opening)))
                if kind == "answer" and boxed:
                    in_box, depth = True, 0
                i += len(opening)
                break
            if text.startswith(closing, i) and not (kind == "answer" and boxed):
                events.append((kind, "close", i, i + len(closing)))
                i += len(closing)
                break
        else:
            if in_box and text[i] == "}" and depth == 0:
                events.append(("answer", "close", i, i + 1))
                in_box = False
            elif in_box and text[i] in "{}":
                depth += 1 if text[i] == "{" else -1
            i += 1
    labels, stack, answers, perceived, seen_block, edge = [Role.OTHER] * len(text), [], 0, False, False, 0

    def fill(kind, start, end):
        nonlocal perceived
        if kind == "perception" and text[start:end].isspace():
            return
        perceived = perceived or (kind == "perception" and end > start)
        role = {"perception": Role.PERCEPTION, "reasoning": Role.REASONING, "answer": answer_role}[kind]
        labels[start:end] = [role if perceived else Role.OTHER] * (end - start)

    for number, (kind, what, start, end) in enumerate(events):
        if what == "open" and stack:
            following = events[number + 1][:2] if number + 1 < len(events) else None
            is_crossed = (
                following == (stack[-1], "close") and stack[-1] != kind and not (boxed and stack[-1] == "answer")
            )
            return BrokenReason.CROSSED if is_crossed else BrokenReason.NESTED, None
        if what == "open":
            answers += kind == "answer"
            if answers == 2 and kind == "answer":
                return BrokenReason.TWO_ANSWERS, None
            seen_block = seen_block or kind == "perception"
            stack.append(kind)
        elif stack != [kind]:
            return BrokenReason.STRAY_CLOSE, None
        else:
            fill(stack.pop(), edge, start)
        labels[start:end] = ["tag"] * (end - start)
        edge = end
    if stack and finished:
        return BrokenReason.UNCLOSED, None
    if not seen_block:
        return BrokenReason.NO_PERCEPTION, None
    if stack:
        fill(stack.pop(), edge, len(text))
    return BrokenReason.NONE, labels


def slow_segmentation(pieces, tags, finished, answer_role):
    """Reason, roles and boundary of tokens given as bytes."""
    data = b"".join(pieces)
    text = data.decode()
    reason, labels = slow_labels(text, tags, finished, answer_role)
    if labels is None:
        return reason, [0] * len(pieces), [False] * len(pieces)
    label_of_byte = [label for character, label in zip(text, labels, strict=True) for _ in character.encode()]
    roles, boundary, at = [], [], 0
    for piece in pieces:
        held = label_of_byte[at : at + len(piece)]
        roles.append(int(next((label for label in held if label not in ("tag", Role.OTHER)), Role.OTHER)))
        boundary.append("tag" in held)
        at += len(piece)
    return reason, roles, boundary


contents = st.lists(
    st.sampled_from(
        ["cat", " sees", " 3", "3", "\n", " ", "<", ">", "</", "猫", " 😀", "🧭", "é", "{", "}", "perception"]
    ),
    max_size=4,
).map("".join)


@st.composite
def responses(draw, tags):
    """Mostly well-formed; then one piece may go missing, be doubled or be moved."""
    pairs = [*tags.pairs.values()]
    order = draw(st.lists(st.sampled_from(range(len(pairs))), max_size=4)) if draw(st.booleans()) else range(len(pairs))
    pieces = [draw(contents)]
    for kind in order:
        pieces += [pairs[kind][0], draw(contents), pairs[kind][1], draw(contents)]
    if draw(st.booleans()) and len(pieces) > 1:
        moved = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        for _ in range(draw(st.integers(0, 2))):
            pieces.insert(draw(st.integers(0, len(pieces))), moved)
    return "".join(pieces)


ALL_TAGS = tuple(tag for pair in LONG_TAGS.pairs.values() for tag in pair)
FAMILIES = {
    "byte-level BPE": byte_bpe,
    "Unigram with byte fallback": unigram,
    "tags as added tokens": lambda: with_tags(byte_bpe(), ALL_TAGS),
    "tags as special tokens": lambda: with_tags(unigram(), ALL_TAGS, special=True),
}


@pytest.mark.parametrize(
    "tags", [LONG_TAGS, dataclasses.replace(LONG_TAGS, answer=("\\boxed{", "}"))], ids=["", "boxed"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_segment_responses_agrees_with_the_slow_reader_on_ragged_batches(family, tags):
    tokenizer = FAMILIES[family]()
    eos, padding = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PADDING)
    junk = tokenizer.encode("</think><answer>").ids

    @settings(max_examples=150)
    @given(
        texts=st.lists(st.tuples(responses(tags), st.booleans()), min_size=1, max_size=3),
        answer_role=st.sampled_from(["reasoning", "other"]),
        holes=st.randoms(use_true_random=False),
    )
    def check(texts, answer_role, holes):
        rows, expected = [], []
        for text, finished in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            pieces = [token_bytes(tokenizer, token) for token in ids]
            if pieces and tokenizer.encode("x").tokens[0].startswith("▁") and pieces[0].startswith(b" "):
                pieces[0] = pieces[0][1:]
            reason, roles, boundary = slow_segmentation(pieces, tags, finished, Role[answer_role.upper()])
            row = list(zip(ids, [True] * len(ids), roles, boundary, strict=True))
            for _ in range(holes.randrange(3)):
                row.insert(holes.randint(0, len(row)), (holes.choice([*junk, eos]), False, 0, False))
            row += [(eos, True, 0, False)] * finished
            rows.append(row)
            expected.append(int(reason))
        length = max(map(len, rows))
        rows = [row + [(padding, False, 0, False)] * (length - len(row)) for row in rows]
        ids, mask, roles, boundary = (torch.tensor([[cell[k] for cell in row] for row in rows]) for k in range(4))
        shape = (len(rows), length)
        result = segment_responses(
            ids.reshape(shape).long(),
            mask.reshape(shape).bool(),
            tokenizer,
            tags=tags,
            eos_token_id=eos,
            answer_role=answer_role,
        )
        assert result.broken.tolist() == expected
        assert result.roles.tolist() == roles.tolist()
        assert result.boundary.tolist() == boundary.bool().tolist()

    check()


@pytest.mark.parametrize("make", [byte_bpe, unigram])
def test_trained_tokens_do_straddle(make):
    """Else the agreement above would prove little."""
    tokenizer = make()
    text = "<perception>3 🧭\n</perception>\n<think>3</think><answer>\n</answer>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = [token_bytes(tokenizer, token) for token in ids]
    assert {b">3", b"><", b">\n"} <= set(pieces)
    assert any(b"\xf0" in piece and "🧭".encode() not in piece for piece in pieces)
    result = segment_responses(
        torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), tokenizer, eos_token_id=()
    )
    by_piece = list(zip(pieces, result.roles[0].tolist(), result.boundary[0].tolist(), strict=True))
    straddling = [(Role(role).name, boundary) for piece, role, boundary in by_piece if piece in (b">3", b"><", b">\n")]
    assert straddling == [
        ("PERCEPTION", True),  # <perception>3
        ("OTHER", True),  # </perception> and a line break
        ("REASONING", True),  # <think>3
        ("OTHER", True),  # </think><answer>
        ("REASONING", True),  # <answer> and a line break: whitespace is content too
    ]
    # Every token with a part of the emoji takes part in the perception.
    begin = next(i for i, (piece, _, _) in enumerate(by_piece) if b"\xf0" in piece)
    parts = by_piece[begin : 1 + next(i for i, (piece, _, _) in enumerate(by_piece) if piece.endswith(b"\xad"))]
    assert len(parts) >= 2
    assert {role for _, role, _ in parts} == {Role.PERCEPTION}


WORDS = ["cat", "sees", "3", "猫"]


@st.composite
def tagged_rows(draw):
    """Token ids and a mask with holes: whole blocks and stray tokens."""
    words = st.lists(st.integers(7, 10), max_size=2)
    blocks = st.builds(lambda tag, content: [tag, *content, tag + 1], st.sampled_from([1, 3, 5]), words)
    stray = st.integers(0, 10).map(lambda token: [token])
    row = [token for part in draw(st.lists(blocks | blocks | blocks | stray, max_size=5)) for token in part]
    holes = draw(st.lists(st.sampled_from([True] * 15 + [False]), min_size=len(row), max_size=len(row)))
    return list(zip(row, holes, strict=True))


@settings(max_examples=200)
@given(ids=st.lists(tagged_rows(), min_size=1, max_size=4), answer_role=st.sampled_from(["reasoning", "other"]))
def test_text_and_token_paths_agree(ids, answer_role):
    vocabulary = ["", *ID_OF, *WORDS]

    class Words:
        def decode(self, ids):
            return "".join(vocabulary[i] for i in ids)

    length = max(map(len, ids))
    rows = torch.tensor([row + [(9, False)] * (length - len(row)) for row in ids], dtype=torch.int64)
    rows = rows.reshape(len(ids), length, 2)
    token_ids, mask = rows[..., 0], rows[..., 1].bool()
    by_token = segment_roles(token_ids, mask, tag_ids=TAG_IDS, eos_token_id=EOS_ID, answer_role=answer_role)
    by_text = segment_responses(token_ids, mask, Words(), tags=TAGS, eos_token_id=EOS_ID, answer_role=answer_role)
    for one, other in zip(by_token, by_text, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("read", [read_text, read_tags])
def test_eos_inside_a_response_is_other_and_does_not_finish_it(read):
    """In a conversation with tools each turn ends with EOS; only the last tells whether the response was truncated."""
    text = "<p>1\0</p><t>2"
    assert read(text, False) == ("NONE", "1", "2")
    assert read(text, True) == ("UNCLOSED", "", "")


def test_any_of_several_eos_ids_finishes():
    ids = torch.tensor([[1, 9, 7], [1, 9, 8], [1, 9, 9]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    broken = segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=[7, 8]).broken
    assert broken.tolist() == [BrokenReason.UNCLOSED, BrokenReason.UNCLOSED, BrokenReason.NONE]
    broken = segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=()).broken
    assert broken.tolist() == [BrokenReason.NONE] * 3


def random_tokens(batch=16, length=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.9
    ids[: batch // 2, :6] = torch.tensor([1, 9, 2, 3, 9, 4])
    ids[: batch // 2, 6:] = 10
    mask[: batch // 2, :6] = True
    return ids, mask


def test_segment_roles_compiles_whole_and_equals_eager():
    ids, mask = random_tokens()
    eager = segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=(0, 11))
    whole = torch.compile(segment_roles, fullgraph=True, backend="aot_eager")
    compiled = whole(ids, mask, tag_ids=TAG_IDS, eos_token_id=(0, 11))
    assert (eager.broken == 0).any()
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


def test_segment_roles_never_reads_a_value_on_the_host():
    ids, mask = random_tokens()  # a meta tensor has no values: reading one raises
    result = segment_roles(ids.to("meta"), mask.to("meta"), tag_ids=TAG_IDS, eos_token_id=[0])
    assert result.roles.device.type == "meta"


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(shape):
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
    for result in (
        segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=0),
        segment_responses(ids, mask, Characters(), tags=TAGS),
    ):
        assert result.roles.shape == result.boundary.shape == shape
        assert result.broken.tolist() == [BrokenReason.NO_PERCEPTION] * shape[0]
        assert [tensor.dtype for tensor in result] == [torch.int64, torch.int64, torch.bool]


def test_inputs_stay_as_they_are_and_int32_ids_are_welcome():
    ids, mask = random_tokens()
    ids = ids.int()
    before = ids.clone(), mask.clone()
    result = segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=0)
    assert result.roles.dtype == torch.int64
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(result.roles, segment_roles(ids.long(), mask, tag_ids=TAG_IDS, eos_token_id=0).roles)


class Cleaning:
    """Decodes as WordPiece does: what a token spells depends on its neighbors, so that pieces do not add up."""

    eos_token_id = EOS_ID

    def decode(self, token_ids):
        return Characters().decode(token_ids).replace(" .", ".").lstrip(" ")


def test_decoders_that_look_at_neighbors_take_the_exact_path():
    text = " <p>a .</p> <t>b . </t> "
    ids = torch.tensor([list(map(ord, text))])
    decoded = Cleaning().decode(ids[0].tolist())
    assert decoded != text
    roles = segment_responses(ids, ids >= 0, Cleaning(), tags=TAGS, eos_token_id=()).roles[0].tolist()
    # The removed space before a full stop is a token without characters, inside the block that the full stop is in.
    expected = "".join({Role.OTHER: ".", Role.PERCEPTION: "p", Role.REASONING: "r"}[Role(role)] for role in roles)
    assert expected == "....ppp........rrrr....."


def test_bytes_of_no_character_keep_the_role_of_where_they_are():
    """Policies do emit them; decoders write one replacement character for several."""
    tokenizer = byte_bpe()
    pieces = [tokenizer.encode(tag).ids for tag in ("<perception>", "</perception><think>", "</think>")]
    broken = [
        next(token for token in range(300) if token_bytes(tokenizer, token) == byte) for byte in (b"\xf0", b"\x9f")
    ]
    ids = torch.tensor([[*pieces[0], *broken, *pieces[1], *broken, *pieces[2]]])
    result = segment_responses(ids, ids >= 0, tokenizer, eos_token_id=())
    assert [role for role in result.roles[0].tolist() if role] == [Role.PERCEPTION] * 2 + [Role.REASONING] * 2
    assert result.roles[0, len(pieces[0])] == Role.PERCEPTION


def test_a_token_with_two_contents_has_the_role_of_the_first():
    class Words:
        def decode(self, ids):
            return "".join(["<p>", "1</p><t>2", "</t>"][token] for token in ids)

    result = segment_responses(torch.tensor([[0, 1, 2]]), torch.ones(1, 3).bool(), Words(), tags=TAGS, eos_token_id=())
    assert result.roles.tolist() == [[Role.OTHER, Role.PERCEPTION, Role.OTHER]]
    assert result.boundary.all()


def test_transformers_tokenizers_fast_and_slow():
    transformers = pytest.importorskip("transformers")
    text = "<perception>the 🧭</perception>\n<think>3 猫</think>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_bpe(), eos_token=EOS)
    slow = transformers.ByT5Tokenizer()  # its tokens are bytes, and it needs no vocabulary file
    for tokenizer in (fast, slow):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = (
            [bytes([token - 3]) for token in ids] if tokenizer is slow else [token_bytes(byte_bpe(), i) for i in ids]
        )
        _, roles, boundary = slow_segmentation(pieces, LONG_TAGS, True, Role.REASONING)
        batch = torch.tensor([[*ids, tokenizer.eos_token_id]])
        result = segment_responses(batch, torch.ones_like(batch, dtype=torch.bool), tokenizer)
        assert result.roles[0].tolist() == [*roles, 0]
        assert result.boundary[0].tolist() == [*boundary, False]


def test_many_responses_take_well_under_a_second():
    tokenizer = byte_bpe()
    text = "<perception>" + "the cat 🧭 sees" * 20 + "</perception>\n<think>" + " 3 so 猫" * 40 + "</think>"
    ids = torch.tensor([tokenizer.encode(text).ids[:512]] * 128)
    assert ids.numel() > 40_000
    start = time.perf_counter()
    segment_responses(ids, torch.ones_like(ids, dtype=torch.bool), tokenizer, eos_token_id=())
    assert time.perf_counter() - start < 5.0  # about 0.1 s; a decode per prefix of each response takes a minute


def test_without_answer_tags_padding_of_minus_one_is_no_tag():
    ids = torch.tensor([[1, 9, 2, 3, 9, 4, -1]])
    result = segment_roles(ids, ids >= 0, tag_ids=RoleTagIds(1, 2, 3, 4), eos_token_id=0)
    assert result.roles.tolist() == [[0, 1, 0, 0, 2, 0, 0]]
    assert result.boundary.tolist() == [[True, False, True, True, False, True, False]]


def test_arguments_are_checked():
    ids, mask = random_tokens()
    with pytest.raises(TypeCheckError, match=r"mask must be Bool.*pass mask.bool\(\)"):
        segment_roles(ids, mask.long(), tag_ids=TAG_IDS, eos_token_id=0)
    with pytest.raises(ValueError, match="answer_role must be one of 'reasoning', 'other'"):
        segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=0, answer_role="perception")
    with pytest.raises(ValueError, match="tag_ids must be different"):
        segment_roles(ids, mask, tag_ids=RoleTagIds(1, 2, 3, 3), eos_token_id=0)
    with pytest.raises(ValueError, match="eos_token_id must be given"):
        segment_responses(ids, mask, byte_bpe())
    with pytest.raises(TypeCheckError):
        segment_responses(ids, mask, "gpt2", eos_token_id=0)


# The pieces


def test_role_masks_are_the_real_tokens_of_each_weighted_role():
    roles = torch.tensor([[Role.PERCEPTION, Role.REASONING, Role.OTHER, Role.PERCEPTION, Role.REASONING, 99]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    masks = role_masks(roles, mask)
    assert masks.perception.tolist() == [[True, False, False, False, False, False]]
    assert masks.reasoning.tolist() == [[False, True, False, False, False, False]]
    assert masks.scored().tolist() == [[True, True, False, False, False, False]]


def test_check_roles_names_the_first_wrong_one_of_a_real_token():
    roles, mask = torch.tensor([[0, 9, 1], [2, 3, 1]]), torch.tensor([[True, False, True], [True, True, True]])
    check_roles({"roles": roles[:1], "mask": mask[:1]})
    with pytest.raises(ValueError, match="^roles is 3 at trajectory 1 token 1; expected 0 .OTHER., 1 .PERCEPTION., 2"):
        check_roles({"roles": roles, "mask": mask})
    with pytest.raises(ValueError, match="^roles is -1 at trajectory 0 token 0"):
        check_roles({"roles": roles - 1, "mask": mask})


def test_roles_of_blocks_say_what_answers_count_as():
    assert roles_of_blocks("reasoning") == {"perception": 1, "reasoning": 2, "answer": 2}
    assert roles_of_blocks("other") == {"perception": 1, "reasoning": 2, "answer": 0}
    with pytest.raises(ValueError, match="^answer_role must be one of 'reasoning', 'other', got 'perception'"):
        roles_of_blocks("perception")


def test_label_tokens_by_hand():
    """Of tokens that straddle a tag and its content, and of one that holds no character."""
    text = "<p>ab</p><t>c</t>"
    pieces = ["<p>a", "b", "", "</p><", "t>", "c</t>"]
    ends = [4, 5, 5, 10, 12, 17]
    starts = [0, *ends[:-1]]
    assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == pieces
    roles, boundary = label_tokens(text, starts, ends, parse_response(text, TAGS), TAGS, roles_of_blocks("reasoning"))
    assert roles == [1, 1, 0, 0, 0, 2]
    assert boundary == [True, False, False, True, True, True]
    broken = parse_response(text + "</t>", TAGS)
    assert label_tokens(text, starts, ends, broken, TAGS, roles_of_blocks("reasoning")) == ([0] * 6, [False] * 6)
