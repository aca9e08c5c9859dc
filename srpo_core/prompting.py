"""Ask for a format, reward it, and read the answer out of it: plain functions on text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from srpo_core.grammar import JSON, BrokenReason, Kind, Parsed, heading_pattern, is_bracketed
from srpo_core.tags import DEFAULT_TAGS, RoleTags, parse_response

__all__ = ["Text", "example_response", "extract_answer", "format_reward", "system_prompt"]

#: A response: its text, or a conversation as chat trainers have it, a list of messages with ``content``.
Text = str | Sequence[Mapping[str, Any]]

_ASKED = {
    "perception": "what you see in the image that bears on the question",
    "reasoning": "how the answer follows from what you see",
    "answer": "the final answer alone",
}
# Examples of perception, reasoning and answer; the second is for tags that are words of the first.
_EXAMPLES = (
    ("Two red squares and one blue square.", "Two and one make three.", "3"),
    ("A 5.", "5 + 1 = 6.", "6"),
    ("...", "...", "..."),
)
_JSON_EXAMPLE = '[{"bbox_2d": [10, 20, 60, 70], "label": "square"}]'


def system_prompt(tags: RoleTags = DEFAULT_TAGS) -> str:
    r"""A system message that asks for the format in plain words and shows an example.

    Args:
        tags: The format.

    Raises:
        TypeError: If `tags` is not a format.

    Example:
        >>> print(system_prompt())
        Write your response in this format, and write each part once:
        <BLANKLINE>
        - what you see in the image that bears on the question, between <perception> and </perception>;
        - how the answer follows from what you see, between <think> and </think>;
        - the final answer alone, between <answer> and </answer>.
        <BLANKLINE>
        For example:
        <BLANKLINE>
        <perception>Two red squares and one blue square.</perception>
        <think>Two and one make three.</think>
        <answer>3</answer>
    """
    _check(tags)
    parts = []
    for kind, pair in tags.pairs.items():
        where = _where(pair)
        if kind == "perception" and tags.nested:
            where += ", inside your reasoning"
        parts.append(f"- {_ASKED[kind]}, {where}")
    if tags.answer is None and tags.reasoning[1]:
        parts.append(f"- {_ASKED['answer']}, at the end")
    once = "" if tags.nested else ", and write each part once"
    return (
        f"Write your response in this format{once}:\n\n"
        + ";\n".join(parts)
        + f".\n\nFor example:\n\n{example_response(tags)}"
    )


def _where(pair: tuple[str, str]) -> str:
    opening, closing = pair
    if pair == JSON:
        return "as JSON that begins a line"
    if not closing:
        return f"after a line that begins with {opening}"
    if is_bracketed(pair):
        return f"in {opening}{closing}"
    return f"between {opening} and {closing}"


def example_response(tags: RoleTags = DEFAULT_TAGS) -> str:
    """A well-formed response, the one that :func:`system_prompt` shows.

    Args:
        tags: The format.

    Raises:
        TypeError: If `tags` is not a format.

    Example:
        >>> print(example_response(RoleTags("### Perception", "### Reasoning", "Answer:")))
        ### Perception
        Two red squares and one blue square.
        ### Reasoning
        Two and one make three.
        Answer: 3
    """
    _check(tags)
    response = ""
    for contents in _EXAMPLES:
        response = _written(tags, *contents)
        if parse_response(response, tags).reason == BrokenReason.NONE:
            break
    return response


def _written(tags: RoleTags, perception: str, reasoning: str, answer: str) -> str:
    is_json = "json" in tags.perception[0].lower()  # also a fenced block
    perception = _block(tags.perception, _JSON_EXAMPLE if is_json else perception)
    if tags.nested:
        look = "\n" if tags.perception == JSON else "I look. "
        lines = [_block(tags.reasoning, f"{look}{perception}{look[-1]}{reasoning}")]
    else:
        lines = [perception, _block(tags.reasoning, reasoning)]
    if tags.answer is not None:
        lines.append(_block(tags.answer, answer))
    elif tags.reasoning[1]:
        lines.append(answer)
    return "\n".join(lines)


def _block(pair: tuple[str, str], content: str) -> str:
    opening, closing = pair
    if pair == JSON:
        return content
    if closing:
        return f"{opening}{content}{closing}"
    return f"{opening}{' ' if opening.endswith(':') else chr(10)}{content}"


def format_reward(
    response: Text, tags: RoleTags = DEFAULT_TAGS, *, finished: bool = True, open_at_start: Kind | None = None
) -> float:
    """1 for a well-formed response, with an answer if the format has tags for answers; otherwise 0.

    If you add it to the reward, a reward above 0 no longer means that the answer is right: use the option `correct` to
    say what does.

    Args:
        response: A text without its end-of-sequence token, or a conversation, of which the text of the assistant
            counts.
        tags: The format.
        finished: Whether the model ended the response itself. A response that was cut short has no answer, and gets 0.
        open_at_start: The kind of block that the prompt left open, from :func:`~srpo_core.tags.open_block`.

    Raises:
        TypeError: If `response` is neither of these, for example a batch of responses, or `tags` is not a format.
        ValueError: If `open_at_start` is not a kind of block that has tags.

    Example:
        >>> format_reward("<perception>a cat</perception><think>one</think><answer>1</answer>")
        1.0
        >>> format_reward([{"role": "assistant", "content": "<think>one</think><answer>1</answer>"}])
        0.0

        As a reward function of TRL, and as one of verl:

        >>> def well_formed(completions, **columns):
        ...     return [format_reward(completion) for completion in completions]
        >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        ...     return float(extract_answer(solution_str) == ground_truth) + 0.1 * format_reward(solution_str)
        >>> compute_score("cats", "<perception>a cat</perception><think>one</think><answer>1</answer>", "1")
        1.1
    """
    _check(tags)
    text = _text(response)
    parsed = parse_response(text, tags, finished=finished, open_at_start=open_at_start)
    if parsed.reason != BrokenReason.NONE:
        return 0.0
    if tags.answer is None:
        return float(finished)
    return float(extract_answer(text, tags, finished=finished, open_at_start=open_at_start) is not None)


def extract_answer(
    response: Text, tags: RoleTags = DEFAULT_TAGS, *, finished: bool = True, open_at_start: Kind | None = None
) -> str | None:
    r"""The answer, without whitespace around it; None if there is none, or if it was cut short.

    The answer is the content of the last answer block, or of the last ``\boxed{...}`` in that block. Where the format
    has no tags for answers, it is the text after the last block. A fault elsewhere in the response does not make the
    answer None, because rewards should not depend on the format by accident.

    Args:
        response: A text without its end-of-sequence token, or a conversation, of which the text of the assistant
            counts.
        tags: The format.
        finished: Whether the model ended the response itself. In a response that was cut short, a block that only the
            end of the response closes, such as that of a heading, is not yet an answer.
        open_at_start: The kind of block that the prompt left open, from :func:`~srpo_core.tags.open_block`.

    Raises:
        TypeError: If `response` is neither of these, for example a batch of responses, or `tags` is not a format.
        ValueError: If `open_at_start` is not a kind of block that has tags.

    Example:
        >>> extract_answer("<perception>a cat</perception><think>one</think><answer> 1 </answer>")
        '1'
        >>> extract_answer(r"So \boxed{\frac{1}{2}}.", RoleTags(answer=("\\boxed{", "}")))
        '\\frac{1}{2}'
        >>> extract_answer("I do not know.") is None
        True
    """
    _check(tags)
    text = _text(response)
    parsed = parse_response(text, tags, finished=finished, open_at_start=open_at_start)
    if tags.answer is None:
        answer = text[_end_of_blocks(text, tags, parsed) :] if finished else None
    elif parsed.reason == BrokenReason.NONE:
        blocks = [block for block in parsed.blocks if block.kind == "answer"]
        # A block that is open at the end of a response cut short: more of it would have come.
        is_cut = bool(blocks) and blocks[-1].end == len(text) and not finished
        answer = text[blocks[-1].start : blocks[-1].end] if blocks and not is_cut else None
    else:
        answer = _last_answer(text, tags, finished=finished, starts_open=open_at_start == "answer")
    if answer is None or not answer.strip():
        return None
    boxed = _last_in_brackets(answer, "\\boxed{", "}") if tags.answer != ("\\boxed{", "}") else None
    return (answer if boxed is None else boxed).strip() or None


def _check(tags: RoleTags) -> None:
    if not isinstance(tags, RoleTags):
        raise TypeError(f"tags must be RoleTags, such as RoleTags() or one of srpo_core.formats.FORMATS, got {tags!r}")


def _text(response: Text) -> str:
    """What the assistant wrote."""
    if isinstance(response, str):
        return response
    if not isinstance(response, Sequence) or not all(isinstance(message, Mapping) for message in response):
        raise TypeError(
            f"response must be one text, or one conversation with a 'content' in each message, got {response!r}; "
            "call this for each response of a batch"
        )
    written = []
    for message in response:
        if message.get("role", "assistant") != "assistant":
            continue
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        written.append("".join(parts))
    return "\n".join(written)


def _end_of_blocks(text: str, tags: RoleTags, parsed: Parsed) -> int:
    ends = [block.end + len(tags.pairs[block.kind][1]) for block in parsed.blocks]
    if parsed.reason != BrokenReason.NONE:  # there may be others after the fault
        ends += [text.rfind(tag) + len(tag) for _, tag in tags.pairs.values() if tag and tag in text]
    return max(ends, default=len(text))


def _last_answer(text: str, tags: RoleTags, *, finished: bool, starts_open: bool) -> str | None:
    """The answer of a response that is broken."""
    opening, closing = tags.answer or ("", "")
    text = (opening if starts_open else "") + text
    if is_bracketed((opening, closing)):
        return _last_in_brackets(text, opening, closing)
    if closing:
        begin = text.rfind(opening)
        end = text.find(closing, begin) if begin >= 0 else -1
        return text[begin + len(opening) : end] if end >= 0 else None
    headings = [*re.finditer(heading_pattern(opening), text, re.MULTILINE)]
    if not headings:
        return None
    begin = headings[-1].end()
    others = (
        re.search(heading_pattern(tag) if not pair[1] else re.escape(tag), text[begin:], re.MULTILINE)
        for kind, pair in tags.pairs.items()
        for tag in pair
        if kind != "answer" and tag and pair != JSON
    )
    end = min((begin + other.start() for other in others if other), default=None)
    return None if end is None and not finished else text[begin:end]


def _last_in_brackets(text: str, opening: str, closing: str) -> str | None:
    """What the last pair of brackets holds that is not inside another; None if there is none, or it does not close."""
    content, at = None, 0
    bracket = re.compile(rf"\\[{re.escape(opening[-1] + closing)}]|[{re.escape(opening[-1] + closing)}]")
    unclosed = False
    while not unclosed and (begin := text.find(opening, at)) >= 0:
        at, depth, end = begin + len(opening), 1, None
        for match in bracket.finditer(text, at):
            depth += (match.group() == opening[-1]) - (match.group() == closing)
            if depth == 0:
                end = match.start()
                break
        if end is None:  # nor does any bracket around the ones inside it: the last of those counts, if any
            last = text.rfind(opening)
            unclosed = last == begin
            content, at = None, last
        else:
            content, at = text[at:end], end
    return content
