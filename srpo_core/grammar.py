"""The grammar that takes a response apart: text -> blocks, or the first fault in it."""

import re
from collections.abc import Collection, Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Literal, NamedTuple

__all__ = [
    "JSON",
    "Block",
    "BrokenReason",
    "Kind",
    "Pairs",
    "Parsed",
    "heading_pattern",
    "is_bracketed",
    "take_apart",
]

#: What a block is.
Kind = Literal["perception", "reasoning", "answer"]
#: Kind of block -> its opening and closing tag. A heading has the closing tag "", and so has :data:`JSON`.
Pairs = Mapping[str, tuple[str, str]]
#: Instead of tags: a block is a JSON array or object that begins a line.
JSON = ("json", "")


class BrokenReason(IntEnum):
    """Why a response is malformed: its first fault. ``NONE`` is a well-formed response."""

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


class Block(NamedTuple):
    """A block: its kind (``perception``, ``reasoning`` or ``answer``) and its content, ``text[start:end]``."""

    kind: str
    start: int
    end: int


class Parsed(NamedTuple):
    """A response taken apart.

    Attributes:
        blocks: The blocks in order; of a broken response, those that were complete before the fault. Reasoning that
            holds perceptions comes in pieces, with the perceptions between them.
        reason: The first fault, or ``BrokenReason.NONE``.
        position: Character at which the faulty tag starts (``UNCLOSED``: the tag left open; ``NO_PERCEPTION``: the end
            of the text). None where the response is well-formed.
    """

    blocks: tuple[Block, ...]
    reason: BrokenReason
    position: int | None


_CLOSING_BRACKETS = {"}": "{", "]": "[", ")": "("}


def is_bracketed(pair: tuple[str, str]) -> bool:
    """Whether the closing tag is the bracket that the opening tag ends with."""
    return pair[1] in _CLOSING_BRACKETS and pair[0].endswith(_CLOSING_BRACKETS[pair[1]])


def heading_pattern(heading: str) -> str:
    """A regular expression for a heading at the start of a line, in whatever markup."""
    word = heading.removesuffix(":")
    end_of_word = r"(?!\w)" if re.search(r"\w$", word) else ""
    colon = ":" if heading.endswith(":") else ":?"
    return rf"^[#>* \t]*{re.escape(word)}{end_of_word}(?:\*\*)?{colon}(?:\*\*)?"


def take_apart(
    text: str,
    pairs: Pairs,
    *,
    nested: bool = False,
    finished: bool = True,
    open_at_start: str | None = None,
    places: Mapping[str, Collection[int]] | None = None,
) -> Parsed:
    """What :func:`~srpo_core.tags.parse_response` returns, of tags by kind of block."""

    def read(box: int | None) -> tuple[Parsed, int | None]:
        reader = _Reader(text, pairs, nested, open_at_start, box)
        try:
            return reader.read(finished, places or {}), reader.last_box
        except _Broken as fault:
            return Parsed(tuple(reader.blocks), fault.reason, fault.position), reader.last_box

    parsed, last_box = read(None)
    # A fault before any of them stays the first one, even if only a later tag showed it.
    at_the_end = parsed.reason in (BrokenReason.NONE, BrokenReason.UNCLOSED, BrokenReason.NO_PERCEPTION)
    if last_box is None or (not at_the_end and parsed.position is not None and parsed.position < last_box):
        return parsed
    # Of several answers in brackets the last one counts: known only at the end, so that the text is read once more.
    return read(last_box)[0]


class _Broken(Exception):
    def __init__(self, reason: BrokenReason, position: int) -> None:
        super().__init__(reason.name)
        self.reason, self.position = reason, position


class _Reader:
    """One pass over the tags of a text: which block is open, and what must not come next."""

    def __init__(self, text: str, pairs: Pairs, nested: bool, open_at_start: str | None, box: int | None) -> None:
        self.text, self.pairs, self.nested = text, pairs, nested
        self.box = box  # where the answer in brackets opens: all others are part of what is around them
        self.last_box: int | None = None  # the last such place outside of reasoning
        self.scanner = _scanner(tuple(pairs.items()))
        self.blocks: list[Block] = []
        self.answered = open_at_start == "answer"
        self.current = open_at_start  # kind of the open block
        self.start = self.opened = 0  # where its content begins, and its opening tag
        self.depth = 0  # brackets open inside it
        # Where the reasoning around an open perception begins; None: no reasoning is around it.
        self.around = 0 if nested and open_at_start == "perception" else None
        self.outer: str | None = (
            None  # kind of a block that another one opened in: the next tag tells which fault it is
        )
        self.mention: tuple[str, int] | None = None  # inside reasoning: the last tag, if it opens another kind
        self.crossing: tuple[str, int] | None = None  # that kind, where the next tag after it closed the reasoning

    def read(self, finished: bool, places: Mapping[str, Collection[int]]) -> Parsed:
        at = 0
        while match := self.scanner.pattern.search(self.text, at):
            begin, at = match.span()
            found = self.scanner.headings.get(match.lastgroup or "", match.group())
            if found in places and begin not in places[found]:
                at = begin + 1  # spelled with other tokens than its own: text, in which another tag may begin
            elif match.lastgroup == "json" and (self.current is None or (self.nested and self.current == "reasoning")):
                at = self._json(at - 1, finished)
            elif (tag := self._meaning(found[-1:] if match.lastgroup == "json" else found, begin)) is not None:
                self._tag(*tag, begin, at)
        return self._end(finished)

    def _meaning(self, found: str, begin: int) -> tuple[str, bool] | None:
        """The kind of a tag and whether it opens; None for text. Keeps count of the brackets in a bracketed block."""
        opening, closing = self.scanner.brackets.get(self.current or "", ("", ""))
        if found == closing != "":
            if self.depth == 0:
                return self.current or "", False
            self.depth -= 1
            return None
        kind, opens = self.scanner.tags.get(found, ("", False))
        if opens and kind in self.scanner.brackets and (kind == "answer" or kind == self.current):
            if kind == "answer" and self.current != "answer" and not self._in_reasoning():
                self.last_box = begin
            kind = kind if begin == self.box else ""
        if not kind and opening and found.endswith(opening) and not found.startswith("\\" + opening):
            self.depth += 1
        return (kind, opens) if kind else None

    def _in_reasoning(self) -> bool:
        """Whether this is between the tags of reasoning; what a heading began ends at the next tag."""
        return self.around is not None or (self.current == "reasoning" and self._closes("reasoning"))

    def _closes(self, kind: str) -> bool:
        """Whether blocks of the kind have a closing tag."""
        return self.pairs[kind][1] != ""

    def _tag(self, kind: str, opens: bool, begin: int, end: int) -> None:
        crossing, self.crossing = self.crossing, None
        if self.outer is not None:
            if kind == self.outer and not opens:
                raise _Broken(BrokenReason.CROSSED, begin)
            raise _Broken(BrokenReason.NESTED, self.opened)
        if self.current is None or not self._closes(self.current):
            if not opens:
                if crossing is not None and crossing[0] == kind:
                    raise _Broken(BrokenReason.CROSSED, crossing[1])
                raise _Broken(BrokenReason.STRAY_CLOSE, begin)
            if self.current is not None:  # a heading ends what the heading before it began
                self._append(begin)
            self._open(kind, begin, end)
        elif kind == self.current:
            if opens:
                raise _Broken(BrokenReason.NESTED, begin)
            self._append(begin)
            self.crossing = None if self.mention is None else (self.mention[0], begin)
            self.mention = self.current = None
            if self.around is not None:
                self.current, self.start, self.opened, self.around = "reasoning", end, self.around, None
        elif self.current == "reasoning":
            self._tag_in_reasoning(kind, opens, begin, end)
        elif opens:
            self.outer = self.current
            self.current, self.opened, self.depth = kind, begin, 0
        else:
            is_crossed = self.around is not None and kind == "reasoning"
            raise _Broken(BrokenReason.CROSSED if is_crossed else BrokenReason.STRAY_CLOSE, begin)

    def _tag_in_reasoning(self, kind: str, opens: bool, begin: int, end: int) -> None:
        if kind == "perception" and self.nested:
            if not opens:
                raise _Broken(BrokenReason.STRAY_CLOSE, begin)
            self._append(begin)
            self.mention, self.around = None, self.opened
            self._open(kind, begin, end)
        elif opens and kind in self.scanner.brackets:
            raise _Broken(BrokenReason.NESTED, begin)
        elif opens:  # a heading there is text: it has no closing tag that could tell
            self.mention = (kind, begin) if self._closes(kind) else self.mention
        elif self.mention is not None and self.mention[0] == kind:
            raise _Broken(BrokenReason.NESTED, self.mention[1])
        else:
            self.mention = None

    def _open(self, kind: str, begin: int, end: int) -> None:
        if kind == "answer":
            if self.answered:
                raise _Broken(BrokenReason.TWO_ANSWERS, begin)
            self.answered = True
        self.current, self.start, self.opened, self.depth = kind, end, begin, 0

    def _append(self, end: int) -> None:
        self.blocks.append(Block(self.current or "", self.start, end))

    def _json(self, begin: int, finished: bool) -> int:
        end = _json_end(self.text, begin)
        if end is None and finished:
            raise _Broken(BrokenReason.UNCLOSED, begin)
        end = len(self.text) if end is None else end
        if self.current is not None:
            self._append(begin)
            self.start = end
        self.blocks.append(Block("perception", begin, end))
        self.mention = self.crossing = None
        return end

    def _end(self, finished: bool) -> Parsed:
        if self.outer is not None:
            raise _Broken(BrokenReason.NESTED, self.opened)
        if self.mention is not None:  # no tag follows that would tell a mention from a block
            raise _Broken(BrokenReason.NESTED, self.mention[1])
        if self.current is not None:
            if finished and self._closes(self.current):
                raise _Broken(BrokenReason.UNCLOSED, self.opened)
            self._append(len(self.text))
        if not any(block.kind == "perception" for block in self.blocks):
            raise _Broken(BrokenReason.NO_PERCEPTION, len(self.text))
        return Parsed(tuple(self.blocks), BrokenReason.NONE, None)


_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]|"', re.DOTALL)


def _json_end(text: str, begin: int) -> int | None:
    """Where the array or object that begins there ends; None: it does not."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text, begin):
        found = match.group()
        if found == '"':  # a string that does not end
            return None
        depth += 1 if found in "[{" else -1 if found in "]}" else 0
        if depth == 0:
            return match.end()
    return None


class _Scanner(NamedTuple):
    pattern: re.Pattern[str]
    tags: dict[str, tuple[str, bool]]  # every tag but closing brackets -> its kind, and whether it opens
    brackets: dict[str, tuple[str, str]]  # kind of block -> the brackets to balance inside it
    headings: dict[str, str]  # name of a group of the pattern -> heading


@lru_cache(maxsize=256)
def _scanner(pairs: tuple[tuple[str, tuple[str, str]], ...]) -> _Scanner:
    tags: dict[str, tuple[str, bool]] = {}
    brackets: dict[str, tuple[str, str]] = {}
    for kind, pair in pairs:
        if pair == JSON:
            continue
        tags[pair[0]] = (kind, True)
        if is_bracketed(pair):
            brackets[kind] = (pair[0][-1], pair[1])
        elif pair[1]:
            tags[pair[1]] = (kind, False)
    # Longest first: one tag may begin another. Escapes come last, since a tag may itself begin with a backslash.
    longest_first = sorted(tags, key=len, reverse=True)
    is_heading = {pair[0] for _, pair in pairs if not pair[1]}
    headings = {f"heading{n}": tag for n, tag in enumerate(longest_first) if tag in is_heading}
    alternatives = [f"(?P<{name}>{heading_pattern(tag)})" for name, tag in headings.items()]
    alternatives += [re.escape(tag) for tag in longest_first if tag not in is_heading]
    if any(pair == JSON for _, pair in pairs):
        alternatives.append(r'(?P<json>^[ \t]*[\[{](?=\s*[\[{"\]}\d-]))')
    if brackets:
        any_bracket = "".join(re.escape(bracket) for bracket in sorted({b for pair in brackets.values() for b in pair}))
        alternatives += [rf"\\[\\{any_bracket}]", f"[{any_bracket}]"]
    return _Scanner(re.compile("|".join(alternatives), re.MULTILINE), tags, brackets, headings)
