"""Tags, and the grammar that takes a response apart: text -> blocks, or the first fault in it."""

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["DEFAULT_TAGS", "Block", "BrokenReason", "Parsed", "RoleTagIds", "RoleTags", "parse_response", "tag_pair"]


class BrokenReason(IntEnum):
    """Why a response is malformed, by its first fault; ``NONE`` is well-formed."""

    NONE = 0
    #: No perception block at all.
    NO_PERCEPTION = 1
    #: The last block is open though EOS was emitted. (Open because the response was truncated is well-formed.)
    UNCLOSED = 2
    #: A block opens inside another.
    NESTED = 3
    #: A block opens inside another, and the very next tag closes the outer one.
    CROSSED = 4
    #: A block closes that is not open.
    STRAY_CLOSE = 5
    #: A second answer block.
    TWO_ANSWERS = 6


class RoleTagIds(NamedTuple):
    """Token ids of the six tags; -1 for the answer's where answers are not tagged."""

    perception_open: int
    perception_close: int
    reasoning_open: int
    reasoning_close: int
    answer_open: int = -1
    answer_close: int = -1


_CLOSING_BRACKETS = {"}": "{", "]": "[", ")": "("}


def _is_bracketed(pair: tuple[str, str]) -> bool:
    return pair[1] in _CLOSING_BRACKETS and pair[0].endswith(_CLOSING_BRACKETS[pair[1]])


def tag_pair(value: Any) -> tuple[str, str]:
    """The two tags as a tuple: YAML gives lists, which do not hash."""
    is_two = isinstance(value, (tuple, list)) and len(value) == 2
    if not is_two or not all(isinstance(tag, str) and tag for tag in value):
        raise ValueError(f"must be two non-empty strings, an opening and a closing tag, got {value!r}")
    return (value[0], value[1])


@dataclass(frozen=True)
class RoleTags:
    r"""The opening and closing tag of each block; any strings.

    A pair such as ``("\\boxed{", "}")``, whose closing tag is the bracket its opening tag ends with, is read as TeX
    reads it: brackets inside are balanced, ``\{`` and ``\}`` are not brackets, and a bracket elsewhere is plain text.

    Attributes:
        perception: Tags around what the model says it sees.
        reasoning: Tags around what it concludes.
        answer: Tags around the answer; None where answers are not tagged.

    Raises:
        ValueError: If a pair is not two non-empty strings, or one tag would mean two things.

    Example:
        >>> RoleTags(perception=("<description>", "</description>"), answer=("\\boxed{", "}")).reasoning
        ('<think>', '</think>')
    """

    perception: tuple[str, str] = ("<perception>", "</perception>")
    reasoning: tuple[str, str] = ("<think>", "</think>")
    answer: tuple[str, str] | None = ("<answer>", "</answer>")

    def __post_init__(self) -> None:
        for name in ("perception", "reasoning", "answer"):
            if name != "answer" or self.answer is not None:
                try:
                    object.__setattr__(self, name, tag_pair(getattr(self, name)))
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from None
        strict = self._strict
        for tag in strict:
            if strict.count(tag) > 1:
                raise ValueError(f"each tag must mean one thing, got {tag!r} more than once")

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """The tags by kind of block, in the order perception, reasoning, answer."""
        pairs = {"perception": self.perception, "reasoning": self.reasoning}
        return pairs if self.answer is None else pairs | {"answer": self.answer}

    @property
    def _strict(self) -> list[str]:
        """Every tag but closing brackets: those only ever close their own block, and elsewhere are plain text."""
        return [tag for pair in self.pairs.values() for tag in (pair[:1] if _is_bracketed(pair) else pair)]

    def token_ids(self, tokenizer: Any) -> RoleTagIds:
        """Ids of the tags, for :func:`segment_roles`.

        Args:
            tokenizer: Has ``convert_tokens_to_ids`` (transformers) or ``token_to_id`` (tokenizers). The tags should be
                added tokens: an ordinary vocabulary entry may also be reached by other merges, which ids cannot see.

        Raises:
            ValueError: If a tag is not a single token of the tokenizer, or is a bracket.
        """
        to_id = getattr(tokenizer, "convert_tokens_to_ids", None) or tokenizer.token_to_id
        unknown = (None, getattr(tokenizer, "unk_token_id", None))
        for kind, pair in self.pairs.items():
            if _is_bracketed(pair):
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


#: The tags where none are given. A choice of this project: the paper's prompts are not public.
DEFAULT_TAGS = RoleTags()


class Block(NamedTuple):
    """A block: its kind (``perception``, ``reasoning`` or ``answer``) and its content, ``text[start:end]``."""

    kind: str
    start: int
    end: int


class Parsed(NamedTuple):
    """A response taken apart.

    Attributes:
        blocks: The blocks in order; of a broken response, those complete before the fault.
        reason: The first fault, or ``BrokenReason.NONE``.
        position: Character at which the faulty tag starts (``UNCLOSED``: the tag left open; ``NO_PERCEPTION``: the end
            of the text). None where the response is well-formed.
    """

    blocks: tuple[Block, ...]
    reason: BrokenReason
    position: int | None


def parse_response(text: str, tags: RoleTags = DEFAULT_TAGS, *, finished: bool = True) -> Parsed:
    """Blocks of a response, and where and why it is malformed.

    Args:
        text: The response, without its end-of-sequence token.
        tags: The opening and closing tag of each block.
        finished: Whether the model ended the response itself. If not, the last block may be open and runs to the end.

    Example:
        >>> parse_response("<perception>a cat</perception> so <think>it purrs</think>").blocks
        (Block(kind='perception', start=12, end=17), Block(kind='reasoning', start=41, end=49))
        >>> text = "<perception>a cat<think>it purrs</think>"
        >>> _, reason, position = parse_response(text)
        >>> reason.name, text[position:]
        ('NESTED', '<think>it purrs</think>')
    """
    pairs = tags.pairs
    grammar = _grammar(tags)
    blocks: list[Block] = []
    current, start, depth = None, 0, 0  # kind of the open block, where its content starts, brackets open inside it
    outer = None  # kind of the block around it, which is a fault already: the next tag tells nested from crossed

    def broken(reason: BrokenReason, position: int) -> Parsed:
        return Parsed(tuple(blocks), reason, position)

    def current_tag() -> int:
        return start - len(pairs[current][0]) if current is not None else len(text)

    for match in grammar.pattern.finditer(text):
        found = match.group()
        closes = current is not None and depth == 0 and found == pairs[current][1]
        if not closes and found not in grammar.tags:
            if current in grammar.brackets and found in grammar.brackets[current]:
                depth += 1 if found == grammar.brackets[current][0] else -1
        elif outer is not None:
            if outer != current and found == pairs[outer][1]:
                return broken(BrokenReason.CROSSED, match.start())
            return broken(BrokenReason.NESTED, current_tag())
        elif current is not None and closes:
            blocks.append(Block(current, start, match.start()))
            current = None
        elif found not in grammar.opening:
            return broken(BrokenReason.STRAY_CLOSE, match.start())
        elif current is None and grammar.opening[found] == "answer" and any(b.kind == "answer" for b in blocks):
            return broken(BrokenReason.TWO_ANSWERS, match.start())
        else:
            outer, current, start = current, grammar.opening[found], match.end()
    if outer is not None:
        return broken(BrokenReason.NESTED, current_tag())
    if current is not None and finished:
        return broken(BrokenReason.UNCLOSED, current_tag())
    if current is not None:
        blocks.append(Block(current, start, len(text)))
    if not any(block.kind == "perception" for block in blocks):
        return broken(BrokenReason.NO_PERCEPTION, len(text))
    return Parsed(tuple(blocks), BrokenReason.NONE, None)


class _Grammar(NamedTuple):
    pattern: re.Pattern[str]
    opening: dict[str, str]  # opening tag -> kind of block
    tags: frozenset[str]  # every tag but closing brackets
    brackets: dict[str, tuple[str, str]]  # kind of block -> the brackets to balance inside it


@lru_cache(maxsize=64)
def _grammar(tags: RoleTags) -> _Grammar:
    opening = {pair[0]: kind for kind, pair in tags.pairs.items()}
    brackets = {kind: (pair[0][-1], pair[1]) for kind, pair in tags.pairs.items() if _is_bracketed(pair)}
    strict = frozenset(tags._strict)
    # Longest first: one tag may begin another. Escapes come last, since a tag may itself begin with a backslash.
    alternatives = [re.escape(tag) for tag in sorted(strict, key=len, reverse=True)]
    if brackets:
        any_bracket = "".join(re.escape(bracket) for bracket in sorted({b for pair in brackets.values() for b in pair}))
        alternatives += [rf"\\[\\{any_bracket}]", f"[{any_bracket}]"]
    return _Grammar(re.compile("|".join(alternatives)), opening, strict, brackets)
