"""Tags: how a response marks its perception, its reasoning and its answer, and how it is taken apart by them."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from srpo_core.checked import choose
from srpo_core.grammar import JSON, Block, BrokenReason, Kind, Parsed, heading_pattern, is_bracketed, take_apart

__all__ = [
    "DEFAULT_TAGS",
    "Block",
    "BrokenReason",
    "Kind",
    "Parsed",
    "RoleTagIds",
    "RoleTags",
    "open_block",
    "parse_response",
    "tag_pair",
]


class RoleTagIds(NamedTuple):
    """Token ids of the six tags; -1 for those of the answer where answers have no tags."""

    perception_open: int
    perception_close: int
    reasoning_open: int
    reasoning_close: int
    answer_open: int = -1
    answer_close: int = -1


def tag_pair(value: Any) -> tuple[str, str]:
    """The two tags as a tuple, the second "" of a heading: YAML gives lists, which do not hash."""
    parts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if all(isinstance(part, str) for part in parts):
        if len(parts) == 2 and parts[0].strip() and parts[1]:
            return (parts[0], parts[1])
        heading = parts[0].strip() if len(parts) == 1 or (len(parts) == 2 and not parts[1]) else ""
        # What begins like a tag of XML has a closing tag, which was forgotten.
        if re.search(r"\w", heading) and not heading.startswith("<") and len(heading.splitlines()) == 1:
            return (heading, "")
    raise ValueError(
        f"must be two non-empty strings, an opening and a closing tag, got {value!r}; "
        "or one string, a heading such as '### Perception'"
    )


@dataclass(frozen=True)
class RoleTags:
    r"""The format of a response: the opening and closing tag of each block; any strings.

    A pair such as ``("\\boxed{", "}")``, whose closing tag is the bracket its opening tag ends with, is read as TeX
    reads it: brackets inside are balanced, ``\{`` and ``\}`` are not brackets, and a bracket elsewhere is plain text.
    If there are several such answers, the last one counts; inside of reasoning they are text.

    A *heading* has no closing tag: ``"### Perception"`` or ``"Answer:"``. It is read at the start of a line, also with
    other markup around it (``**Answer:**``), and its block runs to the next tag or to the end of the response.
    With ``"json"`` the perception is a JSON array or object that begins a line, such as a list of boxes.

    Attributes:
        perception: Tags around what the model says it sees, or a heading.
        reasoning: Tags around what it concludes, or a heading.
        answer: Tags around the answer, or a heading; None where answers are not tagged.
        nested: Whether perceptions stand inside the reasoning, between its tags.

    Raises:
        ValueError: If something is neither a pair of tags nor a heading, or one tag would mean two things.

    Example:
        >>> RoleTags(perception=("<description>", "</description>"), answer=("\\boxed{", "}")).reasoning
        ('<think>', '</think>')
        >>> RoleTags("### Perception", "### Reasoning", "Answer:").perception
        ('### Perception', '')
    """

    perception: tuple[str, str] = ("<perception>", "</perception>")
    reasoning: tuple[str, str] = ("<think>", "</think>")
    answer: tuple[str, str] | None = ("<answer>", "</answer>")
    nested: bool = False

    def __post_init__(self) -> None:
        for name in ("perception", "reasoning", "answer"):
            if name != "answer" or self.answer is not None:
                try:
                    object.__setattr__(self, name, tag_pair(getattr(self, name)))
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from None
        if not isinstance(self.nested, bool):
            raise ValueError(f"nested must be True or False, got {self.nested!r}")
        for kind, pair in self.pairs.items():
            if pair == JSON and kind != "perception":
                raise ValueError(f"{kind} must be between tags or under a heading: only a perception can be json")
        if self.nested and not self.reasoning[1]:
            raise ValueError(
                f"reasoning must have a closing tag, because perceptions stand inside it, got {self.reasoning[0]!r}"
            )
        if self.nested and not self.perception[1] and self.perception != JSON:
            raise ValueError(
                f"perception must have a closing tag, because reasoning goes on after it, got {self.perception[0]!r}"
            )
        strict = [tag for pair in self.pairs.values() for tag in (pair[:1] if is_bracketed(pair) else pair) if tag]
        for tag in strict:
            if strict.count(tag) > 1:
                raise ValueError(f"each tag must mean one thing, got {tag!r} more than once")

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """The tags by kind of block, in the order perception, reasoning, answer; "" for no closing tag."""
        pairs = {"perception": self.perception, "reasoning": self.reasoning}
        return pairs if self.answer is None else pairs | {"answer": self.answer}

    @property
    def grammar(self) -> str:
        r"""The format in a few lines, as :meth:`of_grammar` reads it.

        Example:
            >>> print(RoleTags(answer=("\\boxed{", "}"), nested=True).grammar)
            perception in reasoning = <perception> ... </perception>
            reasoning = <think> ... </think>
            answer = \boxed{ ... }
        """
        lines = []
        for kind, pair in self.pairs.items():
            name = "perception in reasoning" if kind == "perception" and self.nested else kind
            lines.append(f"{name} = {_written(pair)}")
        return "\n".join(lines)

    @staticmethod
    def of_grammar(text: str) -> "RoleTags":
        r"""The format that a few lines describe, one for each kind of block.

        A line is ``kind = opening ... closing`` for tags around a block, ``kind = heading`` for a heading without a
        closing tag, or ``perception = json``. The kinds are ``perception`` (``perception in reasoning`` where it stands
        inside the reasoning), ``reasoning`` and ``answer``, which may be left out. A tag with ``...``, ``;``, a line
        break or spaces around it is written as a JSON string. Lines may also be separated by semicolons.

        Args:
            text: The lines, in any order.

        Raises:
            ValueError: If a line is none of these, a kind has two lines, or perception or reasoning has none.

        Example:
            >>> RoleTags.of_grammar("perception = <see> ... </see>; reasoning = <think> ... </think>; answer = Answer:")
            RoleTags(perception=('<see>', '</see>'), reasoning=('<think>', '</think>'), answer=('Answer:', ''), ...
        """
        found: dict[str, tuple[str, str]] = {}
        nested = False
        for number, (line, match) in enumerate(_lines(text), 1):
            place = f"line {number} of the format, {line!r},"
            name = " ".join(match["name"].split()) if match else ""
            kind = name.removesuffix(" in reasoning") if name.startswith("perception") else name
            if match is None or kind not in get_args(Kind):
                raise ValueError(
                    f"{place} must be 'perception = ...', 'perception in reasoning = ...', 'reasoning = ...' or "
                    "'answer = ...', with an opening tag, three dots and a closing tag, or a heading; a tag that is "
                    "in quotes is a JSON string"
                )
            if kind in found:
                raise ValueError(f"{place} is the second for {kind}: leave one of them")
            try:
                written = [tag for tag in match.group("opening", "closing") if tag]
                tags = [json.loads(tag) if tag.startswith('"') else tag for tag in written]
                found[kind] = tag_pair(tags if len(tags) > 1 else "".join(tags))
            except json.JSONDecodeError:
                raise ValueError(f"{place} has a tag in quotes that is not a JSON string") from None
            except ValueError as error:
                raise ValueError(f"{place} {error}") from None
            nested = nested or name != kind
        for kind in ("perception", "reasoning"):
            if kind not in found:
                raise ValueError(f"the format must have a line '{kind} = <{kind}> ... </{kind}>', got {text!r}")
        return RoleTags(found["perception"], found["reasoning"], found.get("answer"), nested=nested)

    def __str__(self) -> str:
        return self.grammar

    def token_ids(self, tokenizer: Any) -> RoleTagIds:
        """Ids of the tags, for :func:`segment_roles`.

        Args:
            tokenizer: Has ``convert_tokens_to_ids`` (transformers) or ``token_to_id`` (tokenizers). The tags should be
                added tokens: an ordinary vocabulary entry may also be reached by other merges, which ids cannot see.

        Raises:
            ValueError: If a tag is not a single token of the tokenizer, is a bracket, or has no closing tag.
        """
        to_id = getattr(tokenizer, "convert_tokens_to_ids", None) or tokenizer.token_to_id
        unknown = (None, getattr(tokenizer, "unk_token_id", None))
        for kind, pair in self.pairs.items():
            if not pair[1]:
                raise ValueError(f"{kind} {pair[0]!r} has no closing tag: use segment_responses, which needs none")
            if is_bracketed(pair):
                raise ValueError(
                    f"{kind} tags {pair} end in a bracket, which is also plain text: use segment_responses"
                )
            for tag in pair:
                if to_id(tag) in unknown:
                    raise ValueError(
                        f"{kind} tag {tag!r} must be a single token of the tokenizer: add it with "
                        f"tokenizer.add_tokens([{tag!r}]), or use segment_responses, which needs no single tokens"
                    )
        return RoleTagIds(*(to_id(tag) for pair in self.pairs.values() for tag in pair))


# A JSON string, or text without three dots, semicolon and line break.
_TAG = r'"(?:[^"\\\n]|\\.)*"|(?!")(?:(?!\.\.\.|…)[^;\n])*?'
_LINE = re.compile(
    rf"(?P<name>[^=;\n]*)=[ \t]*+(?P<opening>{_TAG})(?:[ \t]*(?:\.\.\.|…)[ \t]*+(?P<closing>{_TAG}))?[ \t]*(?=[;\n]|$)"
)


def _lines(text: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """The lines of a description, and each taken apart; None for one that is none."""
    at = 0
    while at < len(text):
        match = _LINE.match(text, at)
        end = match.end() if match else at + len(re.split(r"[;\n]", text[at:], maxsplit=1)[0])
        if line := text[at:end].strip():
            yield line, match
        at = end + 1


def _written(pair: tuple[str, str]) -> str:
    parts = [_quoted(tag) for tag in pair if tag]
    return "json" if pair == JSON else " ... ".join(parts)


def _quoted(tag: str) -> str:
    is_plain = tag == tag.strip() and tag.isprintable() and not re.search(r'\.\.\.|…|;|^"', tag)
    return tag if is_plain else json.dumps(tag)


#: The tags where none are given. A choice of this project: the paper's prompts are not public.
DEFAULT_TAGS = RoleTags()


def parse_response(
    text: str,
    tags: RoleTags = DEFAULT_TAGS,
    *,
    finished: bool = True,
    open_at_start: Kind | None = None,
    places: Mapping[str, Collection[int]] | None = None,
) -> Parsed:
    """The blocks of a response and, if it is malformed, where and why.

    Inside of reasoning, a tag of another kind is text that names the tag, unless it opens a block that is also closed
    there. Any other block that is open inside of a block is a fault.

    Args:
        text: The response, without its end-of-sequence token.
        tags: The opening and closing tag of each block.
        finished: Whether the model ended the response itself. If not, the last block may be open and runs to the end.
        open_at_start: The kind of block that the prompt left open, from :func:`open_block`; None: the response begins
            outside of blocks.
        places: For each tag that is a token of its own, the characters at which this token starts; the same letters
            elsewhere are text. Tags that are not listed count wherever their text stands. None: this holds for all
            tags.

    Raises:
        ValueError: If `open_at_start` is not a kind of block, or is a kind that has no tags.

    Example:
        >>> parse_response("<perception>a cat</perception> so <think>it purrs</think>").blocks
        (Block(kind='perception', start=12, end=17), Block(kind='reasoning', start=41, end=49))
        >>> text = "<perception>a cat<think>it purrs</think>"
        >>> _, reason, position = parse_response(text)
        >>> reason.name, text[position:]
        ('NESTED', '<think>it purrs</think>')
    """
    if open_at_start is not None:
        choose("open_at_start", open_at_start, tags.pairs)
    return take_apart(
        text, tags.pairs, nested=tags.nested, finished=finished, open_at_start=open_at_start, places=places
    )


def open_block(prompt: str, tags: RoleTags = DEFAULT_TAGS) -> Kind | None:
    """Which kind of block a prompt leaves open, so that responses begin inside it.

    The chat templates of thinking models do this: they end in ``<think>``.

    Args:
        prompt: The text of the prompt with its special tokens, or the end of that text.
        tags: The opening and closing tag of each block.

    Returns:
        The kind whose opening tag the prompt ends in, whitespace aside; None if it ends otherwise.

    Example:
        >>> open_block("<|im_start|>assistant\\n<think>\\n"), open_block("Put it in <think>, please.")
        ('reasoning', None)
    """
    end = prompt.rstrip()
    last_line = end.rpartition("\n")[2]
    longest, found = 0, None
    for kind in get_args(Kind):
        opening, closing = tags.pairs.get(kind, JSON)
        if not closing:
            is_open = (opening, closing) != JSON and re.fullmatch(heading_pattern(opening), last_line) is not None
            candidates = [(opening, kind)] if is_open else []
        else:
            candidates = [
                (tag, opens) for tag, opens in ((opening, kind), (closing, None)) if end.endswith(tag.rstrip())
            ]
        for tag, opens in candidates:
            if len(tag) > longest:
                longest, found = len(tag), opens
    return found
