"""Roles: every rule in one table, then random responses against a slow reader that goes character by character."""

import dataclasses
import re
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from tiny_tokenizers import EOS, PADDING, byte_bpe, token_bytes, unigram, with_tags

from srpo_core import Role, RoleTags, segment_responses, segment_roles
from srpo_core.roles import check_roles, label_tokens, role_masks, roles_of_blocks
from srpo_core.special_tokens import blank_tokens, ending_ids
from srpo_core.tags import BrokenReason, RoleTagIds, parse_response

TAGS = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("<a>", "</a>"))
BOXED = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("\\boxed{", "}"))
LONG_TAGS = RoleTags()
TAG_IDS = RoleTagIds(1, 2, 3, 4, 5, 6)
ID_OF = dict(zip(("<p>", "</p>", "<t>", "</t>", "<a>", "</a>"), TAG_IDS, strict=True))
EOS_ID = 0
IS_BLANK = torch.tensor([chr(code).isspace() for code in range(128)])


class Characters:
    """Every character is a token; id 0 ends the text."""

    eos_token_id = EOS_ID

    def decode(self, ids):
        return "".join(map(chr, ids))


def read_text(text, finished, tags=TAGS, **options):
    """Roles of a text from its characters: reason, perception text, reasoning text, other text."""
    ids = torch.tensor([[ord(character) for character in text] + [EOS_ID] * finished], dtype=torch.int64)
    result = segment_responses(ids, torch.ones_like(ids, dtype=torch.bool), Characters(), tags=tags, **options)
    return summary(result, [*text, ""])


def read_tags(text, finished, tags=TAGS, **options):
    """The same from one token a tag."""
    pieces = re.findall("|".join(map(re.escape, ID_OF)) + "|.", text, flags=re.DOTALL)
    ids = torch.tensor([[ID_OF.get(piece, ord(piece[0])) for piece in pieces] + [EOS_ID] * finished], dtype=torch.int64)
    mask, nested = torch.ones_like(ids, dtype=torch.bool), tags.nested
    result = segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=EOS_ID, nested=nested, is_blank=IS_BLANK, **options)
    return summary(result, [*pieces, ""])


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
    # Naming a tag inside reasoning
    "an opening tag named in reasoning is text": ("<p>1</p><t>2<p>3</t>", True, "NONE", "1", "2<p>3"),
    "and then the answer": ("<p>1</p><t>2<a>3</t><a>4</a>", True, "NONE", "1", "2<a>34"),
    "and then another perception": ("<p>1</p><t>2<p>3</t><p>4</p>", True, "NONE", "14", "2<p>3"),
    "a closing tag named in reasoning is text": ("<p>1</p><t>2</p>3</t>", True, "NONE", "1", "2</p>3"),
    "closing tags of every kind": ("<p>1</p><t>2</p>3</a></t>", False, "NONE", "1", "2</p>3</a>"),
    "one named after another": ("<p>1</p><t>2<p>3<a>4</t>", True, "NONE", "1", "2<p>3<a>4"),
    "one named twice": ("<p>1</p><t>2<p>3<p>4</t>", True, "NONE", "1", "2<p>3<p>4"),
    "opened as one kind and closed as another": ("<p>1</p><t>2<p>3</a></t>", True, "NONE", "1", "2<p>3</a>"),
    "named in reasoning that is truncated later on": ("<p>1</p><t>2<p>3</a>4", False, "NONE", "1", "2<p>3</a>4"),
    "a whole block in reasoning": ("<p>1</p><t>2<p>3</p></t>", True, "NESTED", "", ""),
    "a whole answer in reasoning": ("<p>1</p><t>2<a>3</a></t>", True, "NESTED", "", ""),
    "a whole block after one that is named": ("<p>1</p><t>2<a>3<p>4</p></t>", True, "NESTED", "", ""),
    "closed right after the reasoning": ("<p>1</p><t>2<a>3</t>4</a>", True, "CROSSED", "", ""),
    "closed later than that": ("<p>1</p><t>2<p>3</t><a>4</a></p>", True, "STRAY_CLOSE", "", ""),
    "reasoning in reasoning": ("<p>1</p><t>2<t>3</t>", True, "NESTED", "", ""),
    "named, and no tag follows": ("<p>1</p><t>2<a>3", True, "NESTED", "", ""),
    "named in a perception is a fault": ("<p>1<a>2</p>", True, "CROSSED", "", ""),
    "closing tag named in an answer is a fault": ("<p>1</p><a>2</p>3</a>", True, "STRAY_CLOSE", "", ""),
    "named is no perception": ("<t>1<p>2</t>", True, "NO_PERCEPTION", "", ""),
    # Whitespace at the edges of a block is none of its content
    "whitespace at the edges": ("<p> 1\n2\n</p><t>\n3 4 </t>", True, "NONE", "1\n2", "3 4"),
    "perception of whitespace": ("<p> \n</p><t>2</t>", True, "NONE", "", ""),
    "a perception of whitespace is not the first": ("<p> </p><t>2</t><p>3</p><t> </t>", True, "NONE", "3", ""),
    "truncated after whitespace": ("<p>1</p><t> 2 ", False, "NONE", "1", "2"),
}


@pytest.mark.parametrize("read", [read_text, read_tags])
@pytest.mark.parametrize("rule", RULES)
def test_rule(rule, read):
    text, finished, *expected = RULES[rule]
    assert list(read(text, finished)) == expected


NESTED = dataclasses.replace(TAGS, nested=True)
# The same where perceptions stand inside the reasoning.
NESTED_RULES = {
    "perceptions in reasoning": ("<t>0<p>1</p>2<p>3</p>4</t><a>5</a>", True, "NONE", "13", "245"),
    "before the reasoning too": ("<p>1</p><t>2<p>3</p></t>", True, "NONE", "13", "2"),
    "none": ("<t>1</t><a>2</a>", True, "NO_PERCEPTION", "", ""),
    "empty ones": ("<t>0<p> </p>1<p>2</p>3</t>", True, "NONE", "2", "3"),
    "whitespace at every edge": ("<t> 0 <p> 1 </p> 2 <p> 3 </p> 4 </t>", True, "NONE", "13", "24"),
    "truncated in the perception": ("<t>0<p>1", False, "NONE", "1", ""),
    "truncated after it": ("<t>0<p>1</p>2", False, "NONE", "1", "2"),
    "unclosed perception": ("<t>0<p>1", True, "UNCLOSED", "", ""),
    "unclosed reasoning": ("<t>0<p>1</p>2", True, "UNCLOSED", "", ""),
    "the reasoning closes first": ("<t>0<p>1</t>2</p>", True, "CROSSED", "", ""),
    "a perception closes that is not open": ("<t>0</p>1</t>", True, "STRAY_CLOSE", "", ""),
    "a perception in a perception": ("<t>0<p>1<p>2</p></p></t>", True, "NESTED", "", ""),
    "reasoning in a perception": ("<t>0<p>1<t>2</t></p></t>", True, "NESTED", "", ""),
    "reasoning in reasoning": ("<t>0<p>1</p><t>2</t></t>", True, "NESTED", "", ""),
    "an answer crosses a perception": ("<t>0<p>1<a>2</p></a></t>", True, "CROSSED", "", ""),
    "an answer closes in a perception": ("<t>0<p>1</a>2</p></t>", True, "STRAY_CLOSE", "", ""),
    "an answer named in reasoning": ("<t>0<p>1</p>2<a>3<p>4</p></t>", True, "NONE", "14", "2<a>3"),
    "an answer in reasoning": ("<t>0<p>1</p><a>2</a></t>", True, "NESTED", "", ""),
    "two answers": ("<t>0<p>1</p></t><a>2</a><a>3</a>", True, "TWO_ANSWERS", "", ""),
    "reasoning again": ("<t>0<p>1</p></t><t>2</t>", True, "NONE", "1", "2"),
}


@pytest.mark.parametrize("read", [read_text, read_tags])
@pytest.mark.parametrize("rule", NESTED_RULES)
def test_rule_of_nested_perceptions(rule, read):
    text, finished, *expected = NESTED_RULES[rule]
    assert list(read(text, finished, NESTED)) == expected


# Responses that begin inside a block: kind, text, finished, tags, reason, what is perception, what is reasoning
OPENED = {
    "perception": ("perception", "1</p><t>2</t>", True, TAGS, "NONE", "1", "2"),
    "reasoning": ("reasoning", "1</t><p>2</p><a>3</a>", True, TAGS, "NONE", "2", "3"),
    "answer": ("answer", "1</a><p>2</p>", True, TAGS, "NONE", "2", ""),
    "nothing": (None, "<p>1</p><t>2</t>", True, TAGS, "NONE", "1", "2"),
    "never closed": ("perception", "1", True, TAGS, "UNCLOSED", "", ""),
    "truncated": ("perception", "1", False, TAGS, "NONE", "1", ""),
    "empty": ("perception", "", False, TAGS, "NONE", "", ""),
    "opened once more": ("perception", "<p>1</p>", True, TAGS, "NESTED", "", ""),
    "reasoning opened once more": ("reasoning", "<t>1</t><p>2</p>", True, TAGS, "NESTED", "", ""),
    "crossed": ("perception", "<t>1</p></t>", True, TAGS, "CROSSED", "", ""),
    "another kind closes": ("perception", "1</t>", True, TAGS, "STRAY_CLOSE", "", ""),
    "a second answer": ("answer", "1</a><p>2</p><a>3</a>", True, TAGS, "TWO_ANSWERS", "", ""),
    "a tag is named": ("reasoning", "1<a>2</t><p>3</p><t>4</t>", True, TAGS, "NONE", "3", "4"),
    "a closing tag is named": ("reasoning", "</p>2</t><p>3</p>", True, TAGS, "NONE", "3", ""),
    "no perception": ("reasoning", "1</t>", True, TAGS, "NO_PERCEPTION", "", ""),
    "reasoning around perceptions": ("reasoning", "0<p>1</p>2</t><a>3</a>", True, NESTED, "NONE", "1", "23"),
    "a perception in reasoning": ("perception", "1</p>2</t><a>3</a>", True, NESTED, "NONE", "1", "23"),
    "that never ends": ("perception", "1</p>2", True, NESTED, "UNCLOSED", "", ""),
    "and is crossed": ("perception", "1</t>2</p>", True, NESTED, "CROSSED", "", ""),
}


@pytest.mark.parametrize("read", [read_text, read_tags])
@pytest.mark.parametrize("case", OPENED)
def test_responses_that_begin_inside_a_block(case, read):
    kind, text, finished, tags, *expected = OPENED[case]
    assert list(read(text, finished, tags, open_at_start=kind)) == expected
    assert list(read(text, finished, tags, open_at_start=[kind])) == expected


def test_open_at_start_is_one_kind_or_one_for_each_response():
    ids = torch.tensor([[9, 2, 3, 8, 4, 0], [1, 9, 2, 3, 8, 4]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -1] = False

    class Words:
        def decode(self, ids):
            return "".join(["", *ID_OF, "?", "so", "cat"][token] for token in ids)

    for segment in (
        lambda opened: segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=(), open_at_start=opened),
        lambda opened: segment_responses(ids, mask, Words(), tags=TAGS, eos_token_id=(), open_at_start=opened),
    ):
        result = segment(["perception", None])
        assert result.roles.tolist() == [[1, 0, 0, 2, 0, 0], [0, 1, 0, 0, 2, 0]]
        assert result.boundary.tolist() == [
            [False, True, True, False, True, False],
            [True, False, True, True, False, True],
        ]
        assert segment("perception").broken.tolist() == [BrokenReason.NONE, BrokenReason.NESTED]
        with pytest.raises(ValueError, match="^open_at_start must be one kind of block, or one for each of the 2 resp"):
            segment(["perception"])
        # Of a list the type check reads one value.
        with pytest.raises(
            (ValueError, TypeCheckError), match="open_at_start must be .*one of 'perception', .* got .*think"
        ):
            segment(["think", None])
    no_answers = RoleTagIds(*TAG_IDS[:4])
    with pytest.raises(ValueError, match="^open_at_start must be one of .*'reasoning', got 'answer'"):
        segment_roles(ids, mask, tag_ids=no_answers, eos_token_id=(), open_at_start=["answer", None])


@pytest.mark.parametrize("read", [read_text, read_tags])
def test_answer_tokens_are_reasoning_or_other(read):
    text = "<p>1</p><t>2</t><a>3</a>"
    assert read(text, True, answer_role="reasoning") == ("NONE", "1", "23")
    assert read(text, True, answer_role="other") == ("NONE", "1", "2")


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("<p>1</p>\\boxed{\\frac{2}{3}}x}", True, ("NONE", "1", "\\frac{2}{3}")),
        ("<p>{1}}{</p><t>}</t>\\boxed{2}", True, ("NONE", "{1}}{", "}2")),
        ("<p>1</p>\\boxed{\\left\\{2\\right.}", True, ("NONE", "1", "\\left\\{2\\right.")),
        ("<p>1</p>\\boxed{2\\\\}3", True, ("NONE", "1", "2\\\\")),
        ("<p>1</p>\\boxed{{2}", False, ("NONE", "1", "{2}")),
        ("<p>1</p>\\boxed{{2}", True, ("UNCLOSED", "", "")),
        ("<p>1</p>\\boxed{2}\\boxed{3}", True, ("NONE", "1", "3")),
        ("<p>1</p><t>2\\boxed{3}</t>\\boxed{4}", True, ("NONE", "1", "2\\boxed{3}4")),
        ("<p>1</p><t>2\\boxed{3</t>\\boxed{4}", True, ("NONE", "1", "2\\boxed{34")),
        ("<p>1</p><t>2\\boxed{3}</t>", True, ("NONE", "1", "2\\boxed{3}")),
        ("<p>1\\boxed{2}</p>\\boxed{3}", True, ("NONE", "1\\boxed{2}", "3")),
        ("<p>1</p>\\boxed{2 \\boxed{3}}", True, ("NONE", "1", "3")),
        ("<p>1</p>\\boxed{2 so \\boxed{3}", True, ("NONE", "1", "3")),
        ("<p>1</p>\\boxed{2} or \\boxed{3", False, ("NONE", "1", "3")),
        ("<p>1</p><t>2<p>\\boxed{3}</t>\\boxed{4}", True, ("NONE", "1", "2<p>\\boxed{3}4")),
        ("\\boxed{1}<p>2</p>", True, ("NONE", "2", "")),
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


# A slow reader, written from the tables of rules: character by character, bytes instead of decoded tokens, and a look
# at the tags that follow instead of a memory of those that came before.


def slow_events(text, tags, box, places):
    """Every tag that may count: kind, whether it opens, where it starts and ends."""
    found, i = [], 0
    while i < len(text):
        length = 0
        for kind, (opening, closing) in tags.pairs.items():
            for tag, opens in ((opening, True), (closing, False)):
                is_there = text.startswith(tag, i) and (places is None or tag not in places or i in places[tag])
                if tag == "}" or not is_there or (tag == "\\boxed{" and i != box):
                    continue
                length = len(tag)
                found.append((kind, opens, i, i + length))
        i += max(length, 1)
    if box is not None:
        depth = 0
        for j in range(box, len(text)):
            depth += (text[j] == "{") - (text[j] == "}")
            if depth == 0 and text[j] == "}":
                found.append(("answer", False, j, j + 1))
                break
    return sorted(found, key=lambda event: event[2])


def slow_labels(text, tags, finished, answer_role, opened=None, places=None):
    """The reason, and of each character "tag" or its role."""
    boxes = [i for i in range(len(text)) if text.startswith("\\boxed{", i)] if tags.answer == ("\\boxed{", "}") else []
    reason, labels, stacks = slow_reading(text, tags, finished, answer_role, opened, places, None)
    outside = [i for i in boxes if i < len(stacks) and "reasoning" not in stacks[i]]
    if outside:
        reason, labels, _ = slow_reading(text, tags, finished, answer_role, opened, places, outside[-1])
    return reason, labels


def slow_reading(text, tags, finished, answer_role, opened, places, box):
    """The same with the answer's brackets at one place only; and what is open at each character before the fault."""
    events = slow_events(text, tags, box, places)
    stack = ["reasoning", opened] if tags.nested and opened == "perception" else [opened] * (opened is not None)
    labels, stacks, edge = [Role.OTHER] * len(text), [], 0
    answers, seen, perceived = int(opened == "answer"), opened == "perception", False
    roles = {"perception": Role.PERCEPTION, "reasoning": Role.REASONING, "answer": answer_role}

    def fill(end):
        nonlocal perceived
        content = text[edge:end]
        if stack and content.strip():
            perceived = perceived or stack[-1] == "perception"
            start = edge + content.index(content.strip()[0])
            stop = end - content[::-1].index(content.strip()[-1])
            labels[start:stop] = [roles[stack[-1]] if perceived else Role.OTHER] * (stop - start)

    for number, (kind, opens, start, end) in enumerate(events):
        stacks += [tuple(stack)] * (start - len(stacks))
        following = [event[:2] for event in events[number + 1 : number + 3]]
        top = stack[-1] if stack else None
        if top == "reasoning" and kind != top and not (tags.nested and kind == "perception"):
            if opens and (not following or following[0] == (kind, False)):
                return BrokenReason.NESTED, None, stacks
            if opens and following == [("reasoning", False), (kind, False)]:
                return BrokenReason.CROSSED, None, stacks
            continue  # it is named
        if opens:
            if stack and not (stack == ["reasoning"] and kind == "perception"):
                is_crossed = following[:1] == [(top, False)] and top != kind and (top != "answer" or box is None)
                return BrokenReason.CROSSED if is_crossed else BrokenReason.NESTED, None, stacks
            answers += kind == "answer"
            if answers == 2 and kind == "answer":
                return BrokenReason.TWO_ANSWERS, None, stacks
            seen = seen or kind == "perception"
            fill(start)
            stack.append(kind)
        elif top != kind:
            is_crossed = stack == ["reasoning", "perception"] and kind == "reasoning"
            return BrokenReason.CROSSED if is_crossed else BrokenReason.STRAY_CLOSE, None, stacks
        else:
            fill(start)
            stack.pop()
        labels[start:end] = ["tag"] * (end - start)
        edge = end
    stacks += [tuple(stack)] * (len(text) - len(stacks))
    if stack and finished:
        return BrokenReason.UNCLOSED, None, stacks
    if not seen:
        return BrokenReason.NO_PERCEPTION, None, stacks
    fill(len(text))
    return BrokenReason.NONE, labels, stacks


def slow_segmentation(pieces, tags, finished, answer_role, opened=None, own=None):
    """Reason, roles and boundary of tokens given as bytes; those numbered in `own` are tags of their own."""
    data = b"".join(pieces)
    text = data.decode()
    places = None
    if own is not None:
        starts = [len(b"".join(pieces[:number]).decode()) for number in own]
        places = {tag: starts for pair in tags.pairs.values() for tag in pair}
    reason, labels = slow_labels(text, tags, finished, answer_role, opened, places)
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


openings = st.sampled_from([None, None, "perception", "reasoning"])


@st.composite
def responses(draw, tags):
    """Mostly well-formed; then one piece may go missing, be doubled or be moved."""
    pairs = [*tags.pairs.values()]
    order = draw(st.lists(st.sampled_from(range(len(pairs))), max_size=4)) if draw(st.booleans()) else range(len(pairs))
    pieces = [draw(contents)]
    for kind in order:
        pieces += [pairs[kind][0], draw(contents), pairs[kind][1], draw(contents)]
        if kind == 1 and draw(st.booleans()):  # something stands in the reasoning, or is named there
            inside = draw(st.sampled_from([pairs[0], pairs[0][:1], pairs[0][1:], pairs[-1], pairs[-1][:1]]))
            pieces[-2:-2] = [part for tag in inside for part in (tag, draw(contents))]
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


def test_a_fault_before_the_answers_brackets_stays_the_first():
    """A perception that the reasoning names closes after it, inside the brackets of the answer."""
    text = "<perception></perception><think><perception></think>\\boxed{</perception>}"
    parsed = parse_response(text, RoleTags(answer=("\\boxed{", "}")), finished=False)
    assert (parsed.reason, parsed.position) == (BrokenReason.CROSSED, text.index("</think>"))


@pytest.mark.parametrize(
    "tags",
    [
        LONG_TAGS,
        dataclasses.replace(LONG_TAGS, answer=("\\boxed{", "}")),
        dataclasses.replace(LONG_TAGS, nested=True),
        dataclasses.replace(LONG_TAGS, answer=("\\boxed{", "}"), nested=True),
    ],
    ids=["", "boxed", "nested", "boxed and nested"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_segment_responses_agrees_with_the_slow_reader_on_ragged_batches(family, tags):
    tokenizer = FAMILIES[family]()
    eos, padding = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PADDING)
    junk = tokenizer.encode("</think><answer>").ids

    @settings(max_examples=50)
    @given(
        texts=st.lists(st.tuples(responses(tags), st.booleans(), openings), min_size=1, max_size=3),
        answer_role=st.sampled_from(["reasoning", "other"]),
        holes=st.randoms(use_true_random=False),
    )
    def check(texts, answer_role, holes):
        rows, expected = [], []
        for text, finished, opened in texts:
            if opened is not None:  # what a prompt ended in is not written again
                text = text.partition(tags.pairs[opened][0])[2]
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            pieces = [token_bytes(tokenizer, token) for token in ids]
            if pieces and tokenizer.encode("x").tokens[0].startswith("▁") and pieces[0].startswith(b" "):
                pieces[0] = pieces[0][1:]
            reason, roles, boundary = slow_segmentation(pieces, tags, finished, Role[answer_role.upper()], opened)
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
            open_at_start=[opened for _, _, opened in texts],
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
        ("OTHER", True),  # <answer> and a line break: an answer of whitespace has no content
    ]
    # Every token with a part of the emoji takes part in the perception.
    begin = next(i for i, (piece, _, _) in enumerate(by_piece) if b"\xf0" in piece)
    parts = by_piece[begin : 1 + next(i for i, (piece, _, _) in enumerate(by_piece) if piece.endswith(b"\xad"))]
    assert len(parts) >= 2
    assert {role for _, role, _ in parts} == {Role.PERCEPTION}


# Tags that are tokens of their own: ids and text must tell the same, and what the slow reader tells.

WORDS = ["cat", " sees", "3", "猫", " ", "\n", " \n\n", "<p", "`"]
OWN = [*ID_OF]  # ids 1 to 6
SPELLED = [*ID_OF]  # the same texts under ids of other tokens
VOCABULARY = ["", *OWN, *WORDS, *SPELLED]


class Vocabulary:
    """A tokenizer with six added tokens, whose texts other tokens spell as well."""

    def __len__(self):
        return len(VOCABULARY)

    def get_added_vocab(self):
        return ID_OF

    def decode(self, ids):
        return "".join(VOCABULARY[i] for i in ids)


@st.composite
def tagged_rows(draw):
    """Token ids and a mask with holes: whole blocks, named and spelled tags, stray tokens."""
    words = st.lists(st.integers(len(OWN) + 1, len(VOCABULARY) - 1), max_size=3)
    block = st.tuples(st.sampled_from([1, 3, 5]), words).map(lambda part: [part[0], *part[1], part[0] + 1])
    inside = st.one_of(words, words, st.sampled_from([1, 2, 5, 6]).map(lambda tag: [tag]), block)
    reasoning = st.lists(inside, max_size=4).map(lambda parts: [3, *(token for part in parts for token in part), 4])
    stray = st.integers(0, len(VOCABULARY) - 1).map(lambda token: [token])
    row = [
        token for part in draw(st.lists(block | block | reasoning | reasoning | stray, max_size=5)) for token in part
    ]
    holes = draw(st.lists(st.sampled_from([True] * 15 + [False]), min_size=len(row), max_size=len(row)))
    return list(zip(row, holes, strict=True))


@settings(max_examples=300)
@given(
    ids=st.lists(st.tuples(tagged_rows(), openings | st.just("answer")), min_size=1, max_size=4),
    answer_role=st.sampled_from(["reasoning", "other"]),
    nested=st.booleans(),
)
def test_text_and_token_paths_agree(ids, answer_role, nested):
    rows, opened = [row for row, _ in ids], [kind for _, kind in ids]
    length = max(map(len, rows))
    cells = torch.tensor([row + [(9, False)] * (length - len(row)) for row in rows], dtype=torch.int64)
    cells = cells.reshape(len(rows), length, 2)
    token_ids, mask = cells[..., 0], cells[..., 1].bool()
    options = {"eos_token_id": EOS_ID, "answer_role": answer_role, "open_at_start": opened}
    is_blank = blank_tokens(Vocabulary())
    by_token = segment_roles(token_ids, mask, tag_ids=TAG_IDS, nested=nested, is_blank=is_blank, **options)
    tags = dataclasses.replace(TAGS, nested=nested)
    by_text = segment_responses(token_ids, mask, Vocabulary(), tags=tags, **options)
    for one, other in zip(by_token, by_text, strict=True):
        assert torch.equal(one, other)
    for number, (row, kind) in enumerate(ids):
        real = [place for place, (token, is_real) in enumerate(row) if is_real and token != EOS_ID]
        ends = [token == EOS_ID for token, is_real in row if is_real]
        pieces = [VOCABULARY[row[place][0]].encode() for place in real]
        own = [at for at, place in enumerate(real) if row[place][0] in TAG_IDS]
        role = Role[answer_role.upper()]
        reason, roles, boundary = slow_segmentation(pieces, tags, ends[-1:] == [True], role, kind, own=own)
        assert by_text.broken[number] == reason
        assert by_text.roles[number, real].tolist() == roles
        assert by_text.boundary[number, real].tolist() == boundary


@pytest.mark.parametrize("spelled", [False, True])
def test_a_tag_spelled_with_other_tokens_than_its_own_is_text(spelled):
    """Counted by hand, with a real tokenizer: `</think>` in the reasoning in letters, then as its own token."""
    tokenizer = with_tags(byte_bpe(), ALL_TAGS)
    tag_ids = LONG_TAGS.token_ids(tokenizer)
    named = byte_bpe().encode("</think>").ids if spelled else []
    words = byte_bpe().encode("so3").ids
    row = [tag_ids[0], *words, tag_ids[1], tag_ids[2], *words, *named, *words, tag_ids[3]]
    ids = torch.tensor([row])
    expected = [0, *[1] * len(words), 0, 0, *[2] * (2 * len(words) + len(named)), 0]
    for result in (
        segment_responses(ids, ids >= 0, tokenizer, eos_token_id=()),
        segment_roles(ids, ids >= 0, tag_ids=tag_ids, eos_token_id=()),
    ):
        assert result.broken.tolist() == [BrokenReason.NONE]
        assert result.roles.tolist() == [expected]
        assert result.boundary.sum() == 4
    if spelled:  # where no token is the tag, its letters are it: and then it is closed twice
        ids = torch.tensor([byte_bpe().encode("<perception>3</perception><think>3</think>3</think>").ids])
        assert segment_responses(ids, ids >= 0, byte_bpe(), eos_token_id=()).broken.tolist() == [
            BrokenReason.STRAY_CLOSE
        ]


def test_tokens_that_share_only_whitespace_with_a_block_are_tags():
    """By hand: of a space before a closing tag, a line break after an opening one, and whitespace by itself."""
    pieces = ["<p>", "\n", "a", " ", "b", " </p>", "\n<t>\n", "c", ".\n</t>", "<a> ", " ", " </a>"]

    class Words:
        def decode(self, ids):
            return "".join(pieces[token] for token in ids)

    ids = torch.arange(len(pieces)).unsqueeze(0)
    result = segment_responses(ids, ids >= 0, Words(), tags=TAGS, eos_token_id=())
    assert result.roles.tolist() == [[0, 0, 1, 1, 1, 0, 0, 2, 2, 0, 0, 0]]
    assert result.boundary.int().tolist() == [[1, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1]]


# What ends a response


class Known:
    def __init__(self, eos_token_id=None, added=None, **more):
        self.eos_token_id, self._added = eos_token_id, added or {}
        self.__dict__.update(more)

    def get_added_vocab(self):
        return self._added

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("tokenizer", "config", "expected"),
    [
        (Known(7), None, (7,)),
        (Known(7), Known([9, 7, 3]), (3, 7, 9)),
        (Known([7, 8]), {"eos_token_id": 5}, (5, 7, 8)),
        (Known(None), Known(torch.tensor([5, 4])), (4, 5)),
        (Known(0), Known(None), (0,)),
        # Gemma, Qwen, Llama, Phi, GPT-OSS, Idefics: the end of a turn beside the end of a text.
        (Known(1, {"<eos>": 1, "<end_of_turn>": 106, "<start_of_turn>": 105}), None, (1, 106)),
        (Known(2, {"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 3, "<tool_call>": 4}), None, (2, 3)),
        (Known(1, {"<|end_of_text|>": 1, "<|eom_id|>": 8, "<|eot_id|>": 9}), Known([1, 8, 9]), (1, 8, 9)),
        (Known(5, {"<|end|>": 7, "<|assistant|>": 6, "<|endoftext|>": 5}), None, (5, 7)),
        (Known(2, {"<|return|>": 2, "<|call|>": 12, "<|channel|>": 5}), None, (2,)),
        (Known(2, {"</s>": 2, "<end_of_utterance>": 9, "<image>": 5}), None, (2, 9)),
        (Known(None, {"<|im_end|>": 4}), None, (4,)),
        (Known(None, {"<|over|>": 4, "<image>": 5}, eot_token="<|over|>"), None, (4,)),
        (Known(1, {}, eot_token_id=3), None, (1, 3)),
        (SimpleNamespace(tokenizer=Known(1, {"<end_of_turn>": 6})), None, (1, 6)),  # a processor
    ],
)
def test_ending_ids_of_tokenizers_and_generation_configs(tokenizer, config, expected):
    assert ending_ids(tokenizer, config) == expected


def test_ending_ids_where_there_are_none():
    for nothing in (Known(None), Known(None, {"<image>": 5}), object()):
        with pytest.raises(ValueError, match="^neither the tokenizer nor the generation config has an eos_token_id"):
            ending_ids(nothing, Known(None))


def test_a_second_end_of_sequence_ends_a_response_by_default():
    """Left open and ended by either: a fault. Truncated: none. The ending token is no content."""
    text = [*map(ord, "<p>1</p><t>2")]
    tokenizer = Known(1, {"<eos>": 1, "<end_of_turn>": 6})
    ids = torch.tensor([[*text, 6], [*text, 1], [*text, ord("3")]])
    result = segment_responses(ids, ids >= 0, tokenizer, tags=TAGS)
    assert result.broken.tolist() == [BrokenReason.UNCLOSED, BrokenReason.UNCLOSED, BrokenReason.NONE]
    ids = torch.tensor([[*map(ord, "<p>1</p>2<t>3</t>"), 6]])
    assert segment_responses(ids, ids >= 0, tokenizer, tags=TAGS).roles[0, -5:].tolist() == [0, 0, 0, 0, 0]
    headings = RoleTags("See:", "So:", None)
    ids = torch.tensor([[*map(ord, "See:1\nSo:2"), 6]])
    roles = segment_responses(ids, ids >= 0, tokenizer, tags=headings).roles
    assert roles.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0]]


def test_blank_tokens_of_a_tokenizer():
    tokenizer = with_tags(byte_bpe(), ALL_TAGS)
    blank = blank_tokens(tokenizer).nonzero().flatten().tolist()
    assert len(blank_tokens(tokenizer)) == tokenizer.get_vocab_size()
    assert {b" ", b"\n", b"\t"} <= {token_bytes(tokenizer, token) for token in blank}
    assert all(token_bytes(tokenizer, token).decode().isspace() for token in blank)


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


@pytest.mark.parametrize("more", [{}, {"nested": True, "open_at_start": "reasoning", "is_blank": IS_BLANK}])
def test_segment_roles_compiles_whole_and_equals_eager(more, fresh_compiler):
    ids, mask = random_tokens()
    if more:
        ids[: len(ids) // 2, :6] = torch.tensor([9, 1, 10, 2, 9, 4])
    eager = segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=(0, 11), **more)
    whole = torch.compile(segment_roles, fullgraph=True, backend="aot_eager")
    compiled = whole(ids, mask, tag_ids=TAG_IDS, eos_token_id=(0, 11), **more)
    assert (eager.broken == 0).any()
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


def test_segment_roles_never_reads_a_value_on_the_host():
    ids, mask = random_tokens()  # a meta tensor has no values: reading one raises
    for more in ({}, {"nested": True, "open_at_start": "perception", "is_blank": IS_BLANK.to("meta")}):
        result = segment_roles(ids.to("meta"), mask.to("meta"), tag_ids=TAG_IDS, eos_token_id=[0], **more)
        assert result.roles.device.type == "meta"


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(shape):
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
    for result in (
        segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=0),
        segment_roles(ids, mask, tag_ids=TAG_IDS, eos_token_id=0, nested=True, is_blank=IS_BLANK, open_at_start=None),
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
    assert expected == "....ppp........rrr......"


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
    with pytest.raises(ValueError, match="eos_token_id must be given, because the tokenizer has none"):
        segment_responses(ids, mask, SimpleNamespace(decode=Characters().decode))
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
