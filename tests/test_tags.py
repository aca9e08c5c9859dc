"""Tags and the grammar: which pairs may be tags, their ids, and where and why a response is malformed."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_tokenizers import PADDING, byte_bpe, with_tags

from srpo_core import RoleTags
from srpo_core.tags import DEFAULT_TAGS, BrokenReason, RoleTagIds, open_block, parse_response, tag_pair

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
        ("<p>1</p><t>2<a>3</a></t>", True, "<a>3</a></t>"),
        ("<p>1</p><t>2<p>3<a>4</a></t>", True, "<a>4</a></t>"),
        ("<p>1</p><t>2<a>3</t></a>", True, "</t></a>"),
        ("<p>1</p><t>2<a>3", False, "<a>3"),
        ("<p>1</p><t>2</a>3", True, "<t>2</a>3"),
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
        ({"answer": "..."}, "answer must be two non-empty strings"),
        ({"answer": "Answer:\n" * 2}, "answer must be two non-empty strings"),
        ({"answer": "Answer:", "reasoning": "Answer:"}, "'Answer:' more than once"),
        ({"nested": 1}, "nested must be True or False, got 1"),
        (
            {"nested": True, "reasoning": "Think:"},
            "^reasoning must have a closing tag, because perceptions",
        ),
        (
            {"nested": True, "perception": "See:"},
            "^perception must have a closing tag, because reasoning",
        ),
        ({"reasoning": "json"}, "^reasoning must be between tags or under a heading: only a perception can be json"),
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
    assert tag_pair("### See ") == tag_pair(["### See"]) == tag_pair(("### See", "")) == ("### See", "")
    for wrong in (
        None,
        "",
        "###",
        "<>",
        ("<p>",),
        ("<p>", ""),
        ("<p>", 1),
        ("<p>", "</p>", "<q>"),
        {"<p>": "</p>", "a": "b"},
    ):
        with pytest.raises(ValueError, match="^must be two non-empty strings, an opening and a closing tag, got"):
            tag_pair(wrong)


def test_closing_brackets_may_be_shared_and_other_tags_may_not():
    shared = RoleTags(("\\see{", "}"), ("\\think{", "}"), None)
    assert contents("\\see{a{b}}\\think{c}", shared) == [("perception", "a{b}"), ("reasoning", "c")]
    with pytest.raises(ValueError, match="'</x>' more than once"):
        RoleTags(("<p>", "</x>"), ("<t>", "</x>"), None)
    with pytest.raises(ValueError, match="'<p>' more than once"):
        RoleTags(("<p>", "<p>"), ("<t>", "</t>"), None)


HEADINGS = RoleTags("### Perception", "### Reasoning", "Answer:")


def test_headings_begin_blocks_that_run_to_the_next_tag():
    text = "Sure!\n### Perception\na cat\n\n### Reasoning\nit purrs\nAnswer: yes"
    assert contents(text, HEADINGS) == [
        ("perception", "\na cat\n\n"),
        ("reasoning", "\nit purrs\n"),
        ("answer", " yes"),
    ]
    assert contents(text, HEADINGS, finished=False) == contents(text, HEADINGS)


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("Answer: 3", True),
        ("  Answer: 3", True),
        ("**Answer:** 3", True),
        ("**Answer**: 3", True),
        ("### Answer: 3", True),
        ("> **Answer:** 3", True),
        ("The Answer: 3", False),
        ("answer: 3", False),
        ("Answer 3", False),
        ("Answers: 3", False),
    ],
)
def test_a_heading_stands_at_the_start_of_a_line_in_any_markup(line, counts):
    text = f"### Perception\na cat\n{line}"
    blocks = contents(text, HEADINGS)
    assert blocks[0] == ("perception", "\na cat\n" if counts else f"\na cat\n{line}")
    assert blocks[1:] == ([("answer", " 3")] if counts else [])


def test_a_heading_is_a_whole_word():
    tags = RoleTags("### Perception", "### Reasoning", None)
    for line in ("### Perceptions", "### Perceptional", "about ### Perception"):
        assert parse_response(f"{line}\na cat", tags).reason == BrokenReason.NO_PERCEPTION
    for line in ("### Perception", "### Perception:", "**### Perception**", "#### Perception"):
        assert contents(f"{line}\na cat", tags) == [("perception", "\na cat")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("### Perception\n1\nAnswer: 2\nAnswer: 3", "TWO_ANSWERS"),
        ("### Reasoning\n1", "NO_PERCEPTION"),
        ("", "NO_PERCEPTION"),
    ],
)
def test_headings_are_never_unclosed_but_have_the_other_faults(text, reason):
    for finished in (True, False):
        assert parse_response(text, HEADINGS, finished=finished).reason.name == reason


def test_headings_and_tags_mix():
    tags = RoleTags("See:", ("<t>", "</t>"), "Answer:")
    text = "See: a cat <t>so\nAnswer: 1, or\nSee: 2</t>\nAnswer: 3"
    assert contents(text, tags) == [
        ("perception", " a cat "),
        ("reasoning", "so\nAnswer: 1, or\nSee: 2"),
        ("answer", " 3"),
    ]
    assert parse_response("See: a cat <t>so", tags).reason == BrokenReason.UNCLOSED
    assert parse_response("See: a cat </t>", tags).reason == BrokenReason.STRAY_CLOSE
    boxed = RoleTags("See:", "Think:", ("\\boxed{", "}"))
    text = "See: 1\nThink: \\boxed{2}, no,\n\\boxed{3}."
    assert contents(text, boxed) == [("perception", " 1\n"), ("reasoning", " \\boxed{2}, no,\n"), ("answer", "3")]


def test_json_that_begins_a_line_is_a_perception():
    tags = RoleTags("json", ("<t>", "</t>"), None)
    boxes = '[{"bbox_2d": [4, 8], "label": "a ] or a \\" and {"},\n {"bbox_2d": []}]'
    assert contents(f"Boxes:\n{boxes}\n<t>[1, 2]\n[3]</t>", tags) == [
        ("perception", boxes),
        ("reasoning", "[1, 2]\n[3]"),
    ]
    assert contents('  {"a": {"b": [1]}} <t>2</t>', tags)[0] == ("perception", '{"a": {"b": [1]}}')
    assert contents("```json\n[1]\n```<t>2</t>", tags)[0] == ("perception", "[1]")
    for text in ("A list [1, 2] in a line", "[Note] this", "{x}"):
        assert parse_response(text, tags).reason == BrokenReason.NO_PERCEPTION
    assert parse_response("so\n[[1, 2]", tags) == ((), BrokenReason.UNCLOSED, 3)
    assert parse_response('so\n[1, "]', tags, finished=False).blocks == (("perception", 3, 9),)
    nested = dataclasses.replace(tags, nested=True)
    assert contents("<t>look:\n[1]\nso 2</t>", nested) == [
        ("reasoning", "look:\n"),
        ("perception", "[1]"),
        ("reasoning", "\nso 2"),
    ]


def test_reasoning_around_perceptions_comes_in_pieces():
    nested = dataclasses.replace(TAGS, nested=True)
    parsed = parse_response("<t>0<p>1</p>2</t><a>3</a>", nested)
    assert parsed.blocks == (("reasoning", 3, 4), ("perception", 7, 8), ("reasoning", 12, 13), ("answer", 20, 21))


def test_a_response_that_begins_inside_a_block():
    parsed = parse_response("1</p><t>2</t>", TAGS, open_at_start="perception")
    assert parsed.blocks == (("perception", 0, 1), ("reasoning", 8, 9))
    assert parse_response("1", TAGS, open_at_start="reasoning") == ((), BrokenReason.UNCLOSED, 0)
    assert contents(" a cat\n### Reasoning\n2", HEADINGS, open_at_start="perception")[0] == ("perception", " a cat\n")
    with pytest.raises(ValueError, match="^open_at_start must be one of 'perception', 'reasoning', got 'answer'"):
        parse_response("1", dataclasses.replace(TAGS, answer=None), open_at_start="answer")


def test_a_tag_counts_only_at_its_places():
    """Of each tag that has any; a tag may begin inside one that does not count."""
    text = "<p>1</p><t></p>2</t>"
    assert contents("<p>1</p></p><t>2</t>", TAGS, places={"</p>": {4}})[1] == ("reasoning", "2")
    assert parse_response(text, TAGS, places={"</p>": {4}, "<t>": set()}).reason == BrokenReason.STRAY_CLOSE
    inner = RoleTags(("<<p>", "</p>"), ("<p>>", "/p>>"), None)
    text = "<<p>1</p><<p>>2/p>>"
    assert [block.kind for block in parse_response(text, inner, places={"<<p>": {0}}).blocks] == [
        "perception",
        "reasoning",
    ]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("<|im_start|>assistant\n<t>", "reasoning"),
        ("assistant\n<t>\n\n", "reasoning"),
        ("<p> ", "perception"),
        ("<a>", "answer"),
        ("assistant\n", None),
        ("<t>\n\n</t>\n\n", None),
        ("Put it in <t>.", None),
        ("", None),
    ],
)
def test_open_block_is_the_tag_that_a_prompt_ends_in(prompt, kind):
    assert open_block(prompt, TAGS) == kind


def test_open_block_of_other_formats():
    assert open_block("Look.\n\n### Perception\n", HEADINGS) == "perception"
    assert open_block("Look.\n**Answer:**", HEADINGS) == "answer"
    assert open_block("Look. ### Perception", HEADINGS) is None
    assert open_block("so \\boxed{", BOXED) == "answer"
    assert open_block("json", RoleTags("json")) is None
    assert open_block("<<p>", RoleTags(("<p>", "</p>"), ("<<p>", "</t>"))) == "reasoning"
    assert open_block("a</p", RoleTags(("/p", "p/"), ("<t>", "</p"), None)) is None


# The description of a few lines


def test_grammar_of_a_format_and_back():
    text = "perception in reasoning = <p> ... </p>\nreasoning = <t> ... </t>\nanswer = \\boxed{ ... }"
    tags = RoleTags.of_grammar(text)
    assert tags == RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("\\boxed{", "}"), nested=True)
    assert tags.grammar == str(tags) == text
    assert RoleTags.of_grammar("reasoning=Think:;perception=json\n\n") == RoleTags("json", "Think:", None)
    assert RoleTags.of_grammar("perception = <p>...</p>; reasoning = <t>…</t>; answer = # A") == RoleTags(
        ("<p>", "</p>"), ("<t>", "</t>"), "# A"
    )
    quoted = 'perception = " ... " ... "\\n;"; reasoning = "a\\"" ... b=c'
    assert RoleTags.of_grammar(quoted) == RoleTags((" ... ", "\n;"), ('a"', "b=c"), None)


tag_texts = st.text(st.sampled_from('<>/pt#. …;="\\\n{}é猫 '), min_size=1, max_size=6) | st.text(min_size=1, max_size=4)


@given(pairs=st.lists(st.tuples(tag_texts, tag_texts | st.just("")), min_size=2, max_size=3), nested=st.booleans())
def test_every_grammar_that_is_printed_reads_back(pairs, nested):
    try:
        tags = RoleTags(pairs[0], pairs[1], pairs[2] if len(pairs) > 2 else None, nested=nested)
    except ValueError:
        assume(False)
        return
    assert RoleTags.of_grammar(tags.grammar) == tags
    assert RoleTags.of_grammar("; ".join(tags.grammar.split("\n"))) == tags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^the format must have a line 'perception = <perception> ... </perception>', got ''$"),
        ("perception = <p> ... </p>", "^the format must have a line 'reasoning = <reasoning> ... </reasoning>', got"),
        ("perception = <p> ... </p>\nreasonin = <t>", "^line 2 of the format, 'reasonin = <t>', must be 'perception ="),
        ("<p> ... </p>", "^line 1 of the format, '<p> ... </p>', must be 'perception ="),
        ("answer in reasoning = <a> ... </a>", "^line 1 of the format, .* must be 'perception ="),
        ("perception = <p> ... </p>; perception = json", "^line 2 of the format, .* is the second for perception"),
        ("perception = <p>", "^line 1 of the format, 'perception = <p>', must be two non-empty strings, .*, got '<p>'"),
        ("perception =", "^line 1 of the format, 'perception =', must be two non-empty strings, .*, got ''"),
        ("perception = <p> ... ", "^line 1 of the format, .*, must be two non-empty strings, .*, got "),
        ('perception = "<p> ... </p>', "^line 1 of the format, .*; a tag that is in quotes is a JSON string"),
        ('perception = "\\p" ... </p>', "^line 1 of the format, .* has a tag in quotes that is not a JSON string"),
        ("perception = <p> ... a ... </p>", "^line 1 of the format, .* with an opening tag, three dots and a closing"),
        ("perception = <p> ... </p>; reasoning = <p> ... </t>", "^each tag must mean one thing, got '<p>' more than"),
    ],
)
def test_grammar_errors_name_the_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        RoleTags.of_grammar(text)
    assert "\n" not in str(error.value).replace(repr(text), "")


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

    def test_headings_and_json_have_no_ids(self):
        tokenizer = with_tags(byte_bpe(), (*ALL_TAGS, "Answer:"))
        with pytest.raises(ValueError, match="^answer 'Answer:' has no closing tag: use segment_responses"):
            dataclasses.replace(DEFAULT_TAGS, answer="Answer:").token_ids(tokenizer)
        with pytest.raises(ValueError, match="^perception 'json' has no closing tag: use segment_responses"):
            RoleTags("json").token_ids(tokenizer)

    def test_bracket_is_never_a_tag_token(self):
        tokenizer = with_tags(byte_bpe(), (*ALL_TAGS, "\\boxed{"))
        with pytest.raises(ValueError, match=r"answer tags .* use segment_responses"):
            dataclasses.replace(DEFAULT_TAGS, answer=("\\boxed{", "}")).token_ids(tokenizer)
