"""What each response token does: tags -> a role per token, and why a response is malformed."""

import inspect
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from srpo_core.typechecking import choose, typechecked

__all__ = [
    "Block",
    "BrokenReason",
    "Parsed",
    "Role",
    "RoleTagIds",
    "RoleTags",
    "Segmentation",
    "parse_response",
    "segment_responses",
    "segment_roles",
]


class Role(IntEnum):
    """What a response token does. Tags, text outside blocks, EOS and padding are ``OTHER``."""

    OTHER = 0
    PERCEPTION = 1
    REASONING = 2


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


def _pair(argument: str, value: Any) -> tuple[str, str]:
    """The two tags as a tuple: YAML gives lists, which do not hash."""
    is_two = isinstance(value, (tuple, list)) and len(value) == 2
    if not is_two or not all(isinstance(tag, str) and tag for tag in value):
        raise ValueError(f"{argument} must be two non-empty strings, an opening and a closing tag, got {value!r}")
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
                object.__setattr__(self, name, _pair(name, getattr(self, name)))
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


#: The tags of the paper.
DEFAULT_TAGS = RoleTags()


class Segmentation(NamedTuple):
    """Roles of a batch of responses.

    Attributes:
        roles: :class:`Role` of each token. A broken response is ``OTHER`` throughout.
        broken: :class:`BrokenReason` of each response.
        boundary: Tokens that share characters with a tag of a well-formed response: the tags, and tokens that straddle
            a tag and its content. They stay when a perception is dropped or swapped.
    """

    roles: Int[Tensor, "batch time"]
    broken: Int[Tensor, " batch"]
    boundary: Bool[Tensor, "batch time"]


_ANSWER_ROLES = {"reasoning": int(Role.REASONING), "other": int(Role.OTHER)}


@typechecked
def segment_roles(
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    tag_ids: RoleTagIds,
    eos_token_id: int | Sequence[int],
    answer_role: Literal["reasoning", "other"] = "reasoning",
) -> Segmentation:
    """Role of each token where every tag is one token of its own.

    Tensors only: nothing waits for the device, and ``torch.compile(fullgraph=True)`` compiles it whole. It agrees with
    :func:`segment_responses`, but cannot see that a perception holds nothing but whitespace.

    Args:
        token_ids: Sampled tokens.
        mask: True at tokens the policy sampled. Elsewhere (padding anywhere, tool outputs) tokens are read as nothing.
        tag_ids: From :meth:`RoleTags.token_ids`.
        eos_token_id: Id or ids that end a response. A response whose last real token is one of them was finished,
            any other was truncated and may leave its last block open. An empty sequence: all were truncated.
        answer_role: What answer tokens count as.

    Returns:
        Roles, the reason each response is broken, and the tag tokens as ``boundary``.

    Raises:
        ValueError: If two tags share an id, or ``answer_role`` is unknown.

    Example:
        >>> tags = RoleTagIds(1, 2, 3, 4)
        >>> ids = torch.tensor([[1, 7, 7, 2, 3, 8, 4, 0], [3, 8, 8, 4, 0, 0, 0, 0]])
        >>> mask = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
        >>> roles, broken, _ = segment_roles(ids, mask, tag_ids=tags, eos_token_id=0)
        >>> roles
        tensor([[0, 1, 1, 0, 0, 2, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0]])
        >>> [BrokenReason(reason).name for reason in broken.tolist()]
        ['NONE', 'NO_PERCEPTION']
    """
    answer = choose("answer_role", answer_role, _ANSWER_ROLES)
    ids = [tag_id for tag_id in tag_ids if tag_id >= 0]
    if len(set(ids)) < len(ids):
        raise ValueError(f"tag_ids must be different from one another, got {tuple(tag_ids)}")

    # Opening tags are 1 perception, 2 reasoning, 3 answer; the closing tag of a kind is its negative; 0 is no tag.
    codes = torch.zeros_like(token_ids, dtype=torch.int64)
    for code, tag_id in zip((1, -1, 2, -2, 3, -3), tag_ids, strict=True):
        codes = torch.where(mask & (token_ids == tag_id), code, codes)
    is_tag = codes != 0
    is_eos = mask & _is_any(token_ids, eos_token_id)
    finished = _last_is(is_eos, mask)

    # The tags alone, one after another: column n holds the n-th tag of a response, column 0 and the rest hold 0. All
    # other tokens write their 0 to the last column.
    count = is_tag.cumsum(dim=1)
    batch, time = token_ids.shape
    tags = codes.new_zeros(batch, time + 3).scatter(1, torch.where(is_tag, count, time + 2), codes)
    before, now, after = tags[:, :-2], tags[:, 1:-1], tags[:, 2:]

    # Before its first fault a response alternates open and close, so the tag before tells which block is open.
    nested = (now > 0) & (before > 0)
    crossed = nested & (after == -before) & (before != now)
    stray = (now < 0) & (now != -before)
    two_answers = (now == 3) & ((now == 3).cumsum(dim=1) > 1)
    faults = torch.where(two_answers, int(BrokenReason.TWO_ANSWERS), 0)
    faults = torch.where(stray, int(BrokenReason.STRAY_CLOSE), faults)
    faults = torch.where(nested, int(BrokenReason.NESTED), faults)
    faults = torch.where(crossed, int(BrokenReason.CROSSED), faults)
    first_fault = (faults != 0).int().argmax(dim=1, keepdim=True)
    broken = faults.gather(1, first_fault).squeeze(1)

    open_at_end = tags.gather(1, is_tag.sum(dim=1, keepdim=True)).squeeze(1) > 0
    has_perception = (codes == 1).any(dim=1)
    at_end = torch.where(has_perception, int(BrokenReason.NONE), int(BrokenReason.NO_PERCEPTION))
    at_end = torch.where(open_at_end & finished, int(BrokenReason.UNCLOSED), at_end)
    broken = torch.where(broken != 0, broken, at_end)
    well_formed = (broken == 0).unsqueeze(1)

    block = tags.gather(1, count)  # the last tag at or before each token: positive inside its block
    content = mask & ~is_tag & ~is_eos & well_formed
    perception = content & (block == 1)
    # Reasoning that no perception precedes owes nothing to any: there is no contrast to weigh it by.
    informed = content & (perception.cumsum(dim=1) > 0)
    roles = torch.where(perception, int(Role.PERCEPTION), 0)
    roles = torch.where(informed & (block == 2), int(Role.REASONING), roles)
    roles = torch.where(informed & (block == 3), answer, roles)
    return Segmentation(roles, broken, is_tag & well_formed)


def _last_is(found: Tensor, mask: Tensor) -> Tensor:
    """Whether each row's last real token is among those found, which are all real."""
    is_last = mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)
    return (found & is_last).any(dim=1)


def _is_any(token_ids: Tensor, values: int | Sequence[int]) -> Tensor:
    # One comparison each: torch.isin would copy the values to the device, and wait.
    found = torch.zeros_like(token_ids, dtype=torch.bool)
    for value in (values,) if isinstance(values, int) else values:
        found = found | (token_ids == value)
    return found


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


@runtime_checkable
class _Tokenizer(Protocol):
    """A tokenizer of ``tokenizers`` or ``transformers``, or anything else that decodes."""

    def decode(self, token_ids: Any, /, *args: Any, **kwargs: Any) -> Any: ...


@typechecked
def segment_responses(
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    tokenizer: _Tokenizer,
    *,
    tags: RoleTags = DEFAULT_TAGS,
    eos_token_id: int | Sequence[int] | None = None,
    answer_role: Literal["reasoning", "other"] = "reasoning",
) -> Segmentation:
    r"""Role of each token, from the character offsets of the decoded tokens.

    Works where tags are several tokens and where tokens straddle a tag and its content (``>3``, ``><``, ``>\n``), as
    the BPE of real models does. A token's role is that of its first content character, if it has any; a multi-byte
    character split over tokens belongs to each of them. A perception of nothing but whitespace counts as empty: its
    tokens are ``OTHER``. Runs on the host, once per rollout batch.

    Args:
        token_ids: Sampled tokens.
        mask: True at tokens the policy sampled. Elsewhere (padding anywhere, tool outputs) tokens are read as nothing.
        tokenizer: Anything with ``decode(list_of_ids) -> str``. Special tokens are kept and spaces not cleaned up,
            where its ``decode`` has such options.
        tags: The opening and closing tag of each block.
        eos_token_id: Id or ids that end a response; None for the tokenizer's. See :func:`segment_roles`. Models often
            have several, listed in their generation config.
        answer_role: What answer tokens count as.

    Returns:
        Roles, the reason each response is broken, and the tokens that share characters with a tag as ``boundary``; on
        the device of ``token_ids``.

    Raises:
        ValueError: If ``eos_token_id`` is None and the tokenizer has none, or ``answer_role`` is unknown.

    Example:
        >>> class Characters:
        ...     eos_token_id = 0
        ...     def decode(self, ids):
        ...         return "".join(map(chr, ids))
        >>> tags = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), None)
        >>> ids = torch.tensor([[ord(character) for character in "<p>me</p><t>u</t>"] + [0]])
        >>> segment_responses(ids, ids >= 0, Characters(), tags=tags).roles
        tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]])
    """
    role_of = {
        "perception": int(Role.PERCEPTION),
        "reasoning": int(Role.REASONING),
        "answer": choose("answer_role", answer_role, _ANSWER_ROLES),
    }
    if eos_token_id is None:
        eos_token_id = getattr(tokenizer, "eos_token_id", None)
    if eos_token_id is None:
        raise ValueError("eos_token_id must be given, because the tokenizer has none; pass () if no response ends")

    decode, pieces = text_decoder(tokenizer), {}
    host_ids, host_mask = token_ids.cpu(), mask.cpu()
    is_eos = host_mask & _is_any(host_ids, eos_token_id)
    read = host_mask & ~is_eos
    ids = host_ids[read].tolist()
    flat_roles, flat_boundary, broken = [], [], []
    begin = 0
    for length, finished in zip(read.sum(dim=1).tolist(), _last_is(is_eos, host_mask).tolist(), strict=True):
        text, starts, ends = token_spans(ids[begin : begin + length], decode, pieces)
        parsed = parse_response(text, tags, finished=finished)
        row_roles, row_boundary = label_tokens(text, starts, ends, parsed, tags, role_of)
        flat_roles += row_roles
        flat_boundary += row_boundary
        broken.append(int(parsed.reason))
        begin += length

    roles = torch.zeros_like(host_ids, dtype=torch.int64)
    roles[read] = torch.tensor(flat_roles, dtype=torch.int64)
    boundary = torch.zeros_like(host_mask)
    boundary[read] = torch.tensor(flat_boundary, dtype=torch.bool)
    device = token_ids.device
    return Segmentation(roles.to(device), torch.tensor(broken, dtype=torch.int64, device=device), boundary.to(device))


def label_tokens(
    text: str, starts: list[int], ends: list[int], parsed: Parsed, tags: RoleTags, role_of: dict[str, int]
) -> tuple[list[int], list[bool]]:
    """Role of each token of one response, and whether it shares characters with a tag."""
    roles, boundary = [int(Role.OTHER)] * len(starts), [False] * len(starts)
    if parsed.reason != BrokenReason.NONE:
        return roles, boundary
    informed = False
    for kind, start, end in parsed.blocks:
        opening, closing = tags.pairs[kind]
        # A block cut short has no closing tag: nothing lies beyond the end of the text.
        for span in ((start - len(opening), start), (end, end + len(closing))):
            for token in _overlapping(starts, ends, *span):
                boundary[token] = True
        if kind == "perception" and not text[start:end].strip():
            continue
        # Reasoning that no perception precedes owes nothing to any: there is no contrast to weigh it by.
        informed = informed or kind == "perception"
        if informed:
            for token in _overlapping(starts, ends, start, end):
                roles[token] = roles[token] or role_of[kind]
    return roles, boundary


def _overlapping(starts: list[int], ends: list[int], start: int, end: int) -> range:
    """Tokens that hold a character of ``[start, end)``, or lie inside it and hold none."""
    if start == end:  # an empty block: the token that straddles it holds nothing of it
        return range(0)
    return range(bisect_right(ends, start), bisect_left(starts, end))


_Decode = Callable[[list[int]], str]


def text_decoder(tokenizer: _Tokenizer) -> _Decode:
    """The tokenizer's ``decode``, told to leave the text alone as far as it can be told."""
    wanted = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    try:
        parameters = inspect.signature(tokenizer.decode).parameters.values()
    except ValueError:  # compiled without a signature
        return tokenizer.decode
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return partial(tokenizer.decode, **{name: value for name, value in wanted.items() if takes_any or name in names})


_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not, or not yet, a character


def token_spans(ids: list[int], decode: _Decode, known: dict[Any, Any]) -> tuple[str, list[int], list[int]]:
    """Text of the tokens, and where in it each token starts and ends.

    Each distinct token is decoded once (``known`` remembers), and tokens that hold only parts of a character together
    with their neighbours. These pieces are right if they add up to the text. If they do not, because the decoder looks
    further than one token, growing prefixes of the response are decoded instead: exact, but quadratic.
    """
    text = decode(ids)
    pieces = [_piece(token, decode, known) for token in ids]
    if ids:
        pieces[0] = decode(ids[:1])  # many decoders strip the space at the start of a text
    starts, ends, length = [], [], 0
    for is_partial, group in groupby(range(len(ids)), key=lambda token: _REPLACEMENT in pieces[token]):
        run = list(group)
        if is_partial:
            before, run_ids = tuple(ids[max(run[0] - 1, 0) : run[0]]), tuple(ids[run[0] : run[-1] + 1])
            if (before, run_ids) not in known:
                known[before, run_ids] = _prefix_spans(run_ids, decode, after=before)
            joint, run_starts, run_ends = known[before, run_ids]
            pieces[run[0] : run[-1] + 1] = [joint] + [""] * (len(run) - 1)
            starts += [length + start for start in run_starts]
            ends += [length + end for end in run_ends]
        else:
            edges = list(accumulate((len(pieces[token]) for token in run), initial=length))
            starts += edges[:-1]
            ends += edges[1:]
        length = sum(map(len, pieces[run[0] : run[-1] + 1]), start=length)
    return (text, starts, ends) if "".join(pieces) == text else _prefix_spans(tuple(ids), decode)


def _piece(token: int, decode: _Decode, known: dict[Any, Any]) -> str:
    """What a token adds to a text that does not start with it."""
    if token not in known:
        known[token] = decode([token, token])[len(decode([token])) :]
    return known[token]


def _prefix_spans(
    ids: tuple[int, ...], decode: _Decode, *, after: tuple[int, ...] = ()
) -> tuple[str, list[int], list[int]]:
    """The same from the prefixes of the tokens, each decoded ``after`` some others."""
    skipped = len(decode([*after])) if after else 0
    text = decode([*after, *ids])[skipped:]
    starts, ends, settled = [], [], 0
    for count in range(1, len(ids) + 1):
        prefix = decode([*after, *ids[:count]])[skipped:]
        agreed = len(prefix)
        while not text.startswith(prefix[:agreed]):
            agreed -= 1
        # What does not agree yet is a character this token leaves unfinished: it holds a part of it all the same.
        unfinished = agreed < len(prefix)
        # A token that adds nothing (one more byte of no character) belongs to the character before it.
        before, settled = settled, max(settled, agreed)
        starts.append(min(before, max(settled + unfinished - 1, 0)))
        ends.append(settled + unfinished)
    return text, starts, ends
