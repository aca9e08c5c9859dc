"""Ask for a format, reward it, and read the answer out of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo_core import RoleTags, extract_answer, format_reward, system_prompt
from srpo_core.formats import FORMATS, PUBLISHED
from srpo_core.prompting import example_response
from srpo_core.tags import open_block, parse_response

BOXED = RoleTags(answer=("\\boxed{", "}"))
HEADINGS = RoleTags("### Perception", "### Reasoning", "Answer:")
UNTAGGED = RoleTags(answer=None)
SEEN = "<perception>a cat</perception>"
WHOLE = f"{SEEN}<think>one</think><answer> 1 </answer>"

# A response of each published format, written by hand, and its answer.
WRITTEN = {
    "default": (WHOLE, "1"),
    "vision-sr1": (
        "<description>Two bars.</description><think>Half: \\boxed{2}?</think> \\boxed{\\frac{1}{2}}",
        "\\frac{1}{2}",
    ),
    "visionary-r1": ("<info>Two bars.</info><think>Half.</think><answer>B</answer>", "B"),
    "observe-r1": ("<observe>Two bars.</observe><think>Half.</think><answer>\\boxed{B}</answer>", "B"),
    "spatial-thinker": (
        "<observe>x</observe><scene>{}, a bar</scene><think>Left.</think><answer>left</answer>",
        "left",
    ),
    "satori-r1": ("<caption>A bar.</caption><bbox>[1, 2, 3, 4]</bbox><answer>yes</answer>", "yes"),
    "llava-cot": ("<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING>\n<CONCLUSION>7</CONCLUSION>", "7"),
    "nested": ("<think>See: <perception>a bar</perception> so one.</think><answer>1</answer>", "1"),
    "headings": ("### Perception\nA bar.\n### Reasoning\nOne.\n### Answer\n1\n", "1"),
    "json-boxes": ('```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```\n<think>One.</think><answer>1</answer>', "1"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_format_can_be_asked_for_rewarded_and_read(name):
    tags = FORMATS[name]
    prompt, (response, answer) = system_prompt(tags), WRITTEN[name]
    assert all(tag in prompt for pair in tags.pairs.values() for tag in pair)
    assert open_block(prompt, tags) is None
    assert format_reward(response, tags) == 1.0
    assert extract_answer(response, tags) == answer
    assert format_reward(PUBLISHED[name].example, tags) == 1.0
    broken = response.replace(tags.perception[0], "")
    assert format_reward(broken, tags) == 0.0
    assert extract_answer(broken, tags) == answer


tag_names = st.text("abcxyz", min_size=1, max_size=6)


@given(
    names=st.lists(tag_names, min_size=3, max_size=3, unique=True),
    shapes=st.tuples(*[st.integers(0, 4)] * 3),
    data=st.data(),
)
def test_the_example_of_a_system_prompt_is_well_formed_and_has_its_answer(names, shapes, data):
    def pair(name, shape):
        return (
            (f"<{name}>", f"</{name}>"),
            (f"\\{name}{{", "}"),
            f"## {name}",
            f"{name.title()}:",
            (f"[{name}]", f"[/{name}]"),
        )

    pairs = [pair(name, shape)[shape] for name, shape in zip(names, shapes, strict=True)]
    pairs[0] = data.draw(st.sampled_from([pairs[0], "json"]))
    can_nest = isinstance(pairs[1], tuple) and (isinstance(pairs[0], tuple) or pairs[0] == "json")
    tags = RoleTags(*pairs, nested=data.draw(st.booleans()) and can_nest)
    response = example_response(tags)
    assert system_prompt(tags).endswith(f"For example:\n\n{response}")
    parsed = parse_response(response, tags)
    assert parsed.reason.name == "NONE"
    assert {block.kind for block in parsed.blocks} == {"perception", "reasoning", "answer"}
    assert format_reward(response, tags) == 1.0
    assert extract_answer(response, tags) in ("3", "6")


def test_system_prompt_of_untagged_answers_asks_for_one_at_the_end():
    assert "the final answer alone, at the end." in system_prompt(UNTAGGED)
    assert extract_answer(example_response(UNTAGGED), UNTAGGED) == "3"
    assert "<answer>" not in system_prompt(UNTAGGED)


def test_system_prompt_says_where_perceptions_stand():
    assert "inside your reasoning" in system_prompt(FORMATS["nested"])
    assert "write each part once" not in system_prompt(FORMATS["nested"])
    assert "after a line that begins with ### Perception" in system_prompt(HEADINGS)
    assert "in \\boxed{}" in system_prompt(BOXED)
    assert "as JSON that begins a line" in system_prompt(RoleTags("json"))


def test_example_response_avoids_words_that_are_tags():
    tags = RoleTags(("Two", "red"), ("and", "make"))
    assert parse_response(example_response(tags), tags).reason.name == "NONE"


@pytest.mark.parametrize(
    ("text", "tags", "expected"),
    [
        (WHOLE, RoleTags(), "1"),
        ("<answer>1</answer>", RoleTags(), "1"),  # no perception: broken, and the answer is an answer
        (f"{WHOLE}<answer>2</answer>", RoleTags(), "2"),  # two answers
        (f"{SEEN}<think>one</think><answer>1", RoleTags(), None),  # never closed
        (f"{SEEN}<think><answer>1</answer></think>", RoleTags(), "1"),
        (f"{SEEN}<think>one</think><answer>  </answer>", RoleTags(), None),
        (f"{SEEN}<think>one</think>", RoleTags(), None),
        ("", RoleTags(), None),
        (f"{SEEN}<think>so</think><answer>It is \\boxed{{4}}, not \\boxed{{5}}</answer>", RoleTags(), "5"),
        (f"{SEEN}<think>\\boxed{{3}}</think> then \\boxed{{\\sqrt{{4}}}}", BOXED, "\\sqrt{4}"),
        (f"{SEEN}<think>\\boxed{{3}}</think> then \\boxed{{4", BOXED, None),  # cut: not the 3 of the reasoning
        ("\\boxed{3} or \\boxed{ 4 }", BOXED, "4"),
        ("\\boxed{\\left\\{1, 2\\right\\}}", BOXED, "\\left\\{1, 2\\right\\}"),
        ("\\boxed{ I mean \\boxed{4}", BOXED, "4"),
        ("\\boxed{\\boxed{4}}", BOXED, "\\boxed{4}"),
        ("}\\boxed{4}}", BOXED, "4"),
        ("\\boxed{}", BOXED, None),
        ("### Perception\na cat\n### Reasoning\none\nAnswer: 1\n", HEADINGS, "1"),
        ("### Perception\na cat\n### Reasoning\none\n**Answer:** 1\n", HEADINGS, "1"),
        ("I think.\nAnswer: 1", HEADINGS, "1"),  # no perception
        ("Answer: 1\n### Reasoning\nbecause", HEADINGS, "1"),
        ("The Answer: 1", HEADINGS, None),  # not at the start of a line
        (f"{SEEN}<think>one</think> 1\n", UNTAGGED, "1"),
        (f"{SEEN}<think>one</think> so \\boxed{{1}}.", UNTAGGED, "1"),
        ("<think>one</think> 1", UNTAGGED, "1"),
        (f"{SEEN}<think>one</think>", UNTAGGED, None),
        ("1", UNTAGGED, None),
    ],
)
def test_extract_answer_by_hand(text, tags, expected):
    assert extract_answer(text, tags) == expected


def test_extract_answer_of_a_response_cut_short():
    cut = f"{SEEN}<think>one</think><answer>1"
    assert extract_answer(cut, finished=False) is None
    assert extract_answer(f"{cut}</answer>", finished=False) == "1"
    assert extract_answer("### Perception\na\nAnswer: 1", HEADINGS, finished=False) is None
    assert extract_answer("Answer: 1", HEADINGS, finished=False) is None
    assert extract_answer("Answer: 1\n### Reasoning", HEADINGS, finished=False) == "1"
    assert extract_answer(f"{SEEN}<think>one</think> 1", UNTAGGED, finished=False) is None


def test_extract_answer_where_the_prompt_opened_a_block():
    assert extract_answer(" 1 </answer>", open_at_start="answer") == "1"
    assert extract_answer("4}", BOXED, open_at_start="answer") == "4"
    assert extract_answer("a cat</perception><think>one</think><answer>1</answer>", open_at_start="perception") == "1"


def test_format_reward_is_1_for_well_formed_responses_with_an_answer():
    assert format_reward(WHOLE) == 1.0
    assert format_reward(f"{SEEN}<think>one</think>") == 0.0
    assert format_reward(f"{SEEN}<think>one</think><answer> </answer>") == 0.0
    assert format_reward(f"{SEEN}<think>one</think>", UNTAGGED) == 1.0
    assert format_reward(WHOLE, FORMATS["visionary-r1"]) == 0.0
    assert format_reward("") == 0.0


def test_format_reward_of_a_response_cut_short_is_0():
    assert format_reward(f"{SEEN}<think>one", finished=False) == 0.0
    assert format_reward(f"{SEEN}<think>one", UNTAGGED, finished=False) == 0.0
    assert format_reward(WHOLE, finished=False) == 1.0


def test_format_reward_where_the_prompt_opened_a_block():
    rest = "a cat</perception><think>one</think><answer>1</answer>"
    assert format_reward(rest, open_at_start="perception") == 1.0
    assert format_reward(rest) == 0.0
    with pytest.raises(ValueError, match="open_at_start must be one of 'perception', 'reasoning'"):
        format_reward(rest, UNTAGGED, open_at_start="answer")


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "assistant", "content": WHOLE}],
        [{"content": WHOLE}],
        [{"role": "assistant", "content": [{"type": "text", "text": WHOLE}]}],
        [
            {"role": "assistant", "content": SEEN},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "<answer>9</answer>"},
            {"role": "assistant", "content": WHOLE.removeprefix(SEEN)},
        ],
    ],
)
def test_conversations_are_what_the_assistant_wrote(conversation):
    assert format_reward(conversation) == 1.0
    assert extract_answer(conversation) == "1"


def test_what_is_no_response_is_refused():
    for response in (3, None, [WHOLE], [[{"role": "assistant", "content": WHOLE}]]):
        for function in (extract_answer, format_reward):
            with pytest.raises(TypeError, match="response must be one text, or one conversation.*for each response"):
                function(response)
    for function in (system_prompt, example_response):
        with pytest.raises(TypeError, match="tags must be RoleTags, such as .*got 'headings'"):
            function("headings")
    with pytest.raises(TypeError, match="tags must be RoleTags"):
        extract_answer("1", "headings")


def test_reading_an_answer_takes_linear_time():
    for text in ("\\boxed{" * 20_000, "\\boxed{" * 20_000 + "}" * 10_000, "<answer>" * 20_000, "Answer: \n" * 20_000):
        for tags in (BOXED, RoleTags(), HEADINGS):
            assert format_reward(text, tags) == 0.0
