"""Tags and the grammar: which pairs may be tags, their ids, and where and why a response is malformed."""

import dataclasses

import pytest
from tiny_tokenizers import PADDING, byte_bpe, with_tags

from srpo_core import RoleTags
from srpo_core.tags import DEFAULT_TAGS, BrokenReason, RoleTagIds, parse_response, tag_pair

TAGS = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("<a>", "</a>"))
BOXED = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("\\boxed{", "}"))
ALL_TAGS = tuple(tag for pair in DEFAULT_TAGS.pairs.values() for tag in pair)


def contents(text, tags=TAGS, **options):
    """Kind and content of each block of a well-formed response."""
    parsed = parse_response(text, tags, **options)
    assert parsed.reason == BrokenReason.NONE
    assert parsed.position is None
    return [(block.kind, text[block.start : block.end]) for block in parsed.blocks]


# What each rule makes of whole responses is in test_roles.py, where roles show it.


def test_parse_response_finds_the_blocks_in_order():
    text = "x<p>12</p>y<t>34</t><a></a>z"
    assert contents(text) == [("perception", "12"), ("reasoning", "34"), ("answer", "")]
    assert contents("<p>1</p><t>2", finished=False) == [("perception", "1"), ("reasoning", "2")]
    assert parse_response("<perception>1</perception>").blocks == (("perception", 12, 13),)


def test_parse_response_balances_the_brackets_of_a_bracketed_tag():
    assert contents("<p>1</p>\\boxed{\\frac{2}{3}}x}", BOXED)[1] == ("answer", "\\frac{2}{3}")
    assert contents("<p>1</p>\\boxed{\\left\\{2\\right.}", BOXED)[1] == ("answer", "\\left\\{2\\right.")


@pytest.mark.parametrize(
    ("text", "finished", "fault"),
    [
        ("<p>1<t>2</t></p>", True, "<t>2</t></p>"),
        ("<p>1<t>2</p></t>", True, "</p></t>"),
        ("<p>1</p>x</t>y", True, "</t>y"),
        ("<p>1</p><a>2</a> <a>3</a>", True, "<a>3</a>"),
        ("<p>1</p><t>2", True, "<t>2"),
        ("<t>1</t>", True, ""),
    ],
)
def test_parse_response_points_at_the_faulty_tag(text, finished, fault):
    parsed = parse_response(text, TAGS, finished=finished)
    assert parsed.reason != BrokenReason.NONE
    assert parsed.position is not None
    assert text[parsed.position :] == fault


def test_parse_response_keeps_the_blocks_before_the_fault():
    parsed = parse_response("<p>1</p><t>23</t></a>", TAGS)
    assert parsed.blocks == (("perception", 3, 4), ("reasoning", 11, 13))
    assert parse_response("<p>1</p>", TAGS).position is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perception": ("<p>",)}, "perception must be two non-empty strings"),
        ({"perception": None}, "perception must be two non-empty strings"),
        ({"reasoning": "<>"}, "reasoning must be two non-empty strings"),
        ({"answer": ("<a>", "")}, "answer must be two non-empty strings"),
        ({"answer": ("<think>", "</a>")}, "'<think>' more than once"),
    ],
)
def test_tags_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoleTags(**arguments)


def test_tags_read_from_yaml_are_lists():
    tags = RoleTags(perception=["<p>", "</p>"], reasoning=["<t>", "</t>"], answer=["\\boxed{", "}"])
    assert tags == BOXED
    assert RoleTags(("\\see{", "}"), ("<t>", "</t>"), ("\\boxed{", "}")).perception == ("\\see{", "}")


def test_tag_pair_of_whatever_yaml_gives():
    assert tag_pair(["<p>", "</p>"]) == tag_pair(("<p>", "</p>")) == ("<p>", "</p>")
    for wrong in (None, "<>", ("<p>",), ("<p>", ""), ("<p>", 1), ("<p>", "</p>", "<q>"), {"<p>": "</p>", "a": "b"}):
        with pytest.raises(ValueError, match="^must be two non-empty strings, an opening and a closing tag, got"):
            tag_pair(wrong)


def test_closing_brackets_may_be_shared_and_other_tags_may_not():
    shared = RoleTags(("\\see{", "}"), ("\\think{", "}"), None)
    assert contents("\\see{a{b}}\\think{c}", shared) == [("perception", "a{b}"), ("reasoning", "c")]
    with pytest.raises(ValueError, match="'</x>' more than once"):
        RoleTags(("<p>", "</x>"), ("<t>", "</x>"), None)
    with pytest.raises(ValueError, match="'<p>' more than once"):
        RoleTags(("<p>", "<p>"), ("<t>", "</t>"), None)


def test_pairs_are_in_the_order_of_the_ids():
    assert [*TAGS.pairs] == ["perception", "reasoning", "answer"]
    assert [*dataclasses.replace(TAGS, answer=None).pairs] == ["perception", "reasoning"]
    assert hash(dataclasses.replace(TAGS)) == hash(TAGS)


class TestTagIds:
    def test_of_both_libraries(self):
        transformers = pytest.importorskip("transformers")
        tokenizer = with_tags(byte_bpe(), ALL_TAGS)
        expected = RoleTagIds(*(tokenizer.token_to_id(tag) for tag in ALL_TAGS))
        assert DEFAULT_TAGS.token_ids(tokenizer) == expected
        assert DEFAULT_TAGS.token_ids(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == expected
        assert dataclasses.replace(DEFAULT_TAGS, answer=None).token_ids(tokenizer) == RoleTagIds(*expected[:4], -1, -1)

    def test_unknown_tag_is_an_error_that_says_what_to_do(self):
        transformers = pytest.importorskip("transformers")
        with pytest.raises(ValueError, match=r"perception tag '<perception>' must be a single token.*add_tokens"):
            DEFAULT_TAGS.token_ids(byte_bpe())
        with_unknown = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_bpe(), unk_token=PADDING)
        with pytest.raises(ValueError, match="perception tag"):
            DEFAULT_TAGS.token_ids(with_unknown)

    def test_bracket_is_never_a_tag_token(self):
        tokenizer = with_tags(byte_bpe(), (*ALL_TAGS, "\\boxed{"))
        with pytest.raises(ValueError, match=r"answer tags .* use segment_responses"):
            dataclasses.replace(DEFAULT_TAGS, answer=("\\boxed{", "}")).token_ids(tokenizer)
