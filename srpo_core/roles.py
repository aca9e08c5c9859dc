"""What each response token does: blocks of tags -> a role for every token."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.grammar import JSON
from srpo_core.special_tokens import ending_ids
from srpo_core.tags import DEFAULT_TAGS, Block, BrokenReason, Kind, Parsed, RoleTagIds, RoleTags, parse_response
from srpo_core.token_text import TokenizerLike, added_tokens, text_decoder, token_spans
from srpo_core.typechecking import typechecked

__all__ = [
    "Role",
    "RoleMasks",
    "Segmentation",
    "check_roles",
    "ending_ids",
    "label_tokens",
    "role_masks",
    "roles_of_blocks",
    "segment_responses",
    "segment_roles",
]


class Role(IntEnum):
    """What a response token does. Tags, text outside of blocks, the end of the sequence and padding are ``OTHER``."""

    OTHER = 0
    PERCEPTION = 1
    REASONING = 2


class RoleMasks(NamedTuple):
    """The real tokens of each weighted role, [batch, time] booleans."""

    perception: Tensor
    reasoning: Tensor

    def scored(self) -> Tensor:
        """The tokens of either role: those that have a score, and a weight that may differ from 1."""
        return self.perception | self.reasoning


def role_masks(roles: Tensor, mask: Tensor) -> RoleMasks:
    """Where the real tokens of each weighted role are."""
    return RoleMasks(mask & (roles == int(Role.PERCEPTION)), mask & (roles == int(Role.REASONING)))


def check_roles(arguments: Mapping[str, Any]) -> None:
    """Raise if a real token has a role outside the enum: a stage of checks for ``typechecked``."""
    roles, mask = arguments["roles"], arguments["mask"]
    wrong = (((roles < min(Role)) | (roles > max(Role))) & mask).nonzero()
    if len(wrong):
        row, time = wrong[0].tolist()
        known = ", ".join(f"{role.value} ({role.name})" for role in Role)
        raise ValueError(
            f"roles is {roles[row, time]} at trajectory {row} token {time}; expected {known}: "
            "pass the roles of segment_responses or segment_roles"
        )


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


def roles_of_blocks(answer_role: str) -> dict[str, int]:
    """Role of the content of each kind of block."""
    answer = choose("answer_role", answer_role, {"reasoning": Role.REASONING, "other": Role.OTHER})
    return {"perception": int(Role.PERCEPTION), "reasoning": int(Role.REASONING), "answer": int(answer)}


@typechecked
def segment_roles(
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    tag_ids: RoleTagIds,
    eos_token_id: int | Sequence[int],
    answer_role: Literal["reasoning", "other"] = "reasoning",
    nested: bool = False,
    open_at_start: Kind | Sequence[Kind | None] | None = None,
    is_blank: Bool[Tensor, " vocabulary"] | None = None,
) -> Segmentation:
    """Role of each token where every tag is one token of its own.

    The function works on tensors only: it never waits for the device, and ``torch.compile(fullgraph=True)`` compiles it
    as a whole. It agrees with :func:`segment_responses` where the tags are added tokens of the tokenizer: both
    functions read a tag where its own token stands, and the same letters in other tokens as text. `is_blank` says which
    tokens are nothing but whitespace.

    Args:
        token_ids: Sampled tokens.
        mask: True at tokens the policy sampled. Tokens elsewhere (padding, tool outputs) are ignored.
        tag_ids: From :meth:`RoleTags.token_ids`.
        eos_token_id: The id or ids that end a response. A response whose last real token is one of them was finished.
            Any other response was truncated, and may leave its last block open. With an empty sequence all responses
            count as truncated.
        answer_role: What answer tokens count as.
        nested: Whether perceptions stand inside the reasoning: :attr:`RoleTags.nested`.
        open_at_start: The kind of block in which all responses begin, or that of each response, from
            :func:`~srpo_core.tags.open_block`; None: they begin outside of blocks.
        is_blank: Which tokens of the vocabulary are nothing but whitespace, from
            :func:`~srpo_core.special_tokens.blank_tokens`; at the edges of a block they are not content. None: all
            tokens are content.

    Returns:
        Roles, the reason why each response is broken, and the tag tokens as ``boundary``.

    Raises:
        ValueError: If two tags share an id, `answer_role` is unknown, or `open_at_start` is unknown, of a kind without
            tags, or not one for each response.

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
    answer = roles_of_blocks(answer_role)["answer"]
    ids = [tag_id for tag_id in tag_ids if tag_id >= 0]
    if len(set(ids)) < len(ids):
        raise ValueError(f"tag_ids must be different from one another, got {tuple(tag_ids)}")
    kinds = ("perception", "reasoning", "answer") if tag_ids.answer_open >= 0 else ("perception", "reasoning")
    opened = _checked_kinds(open_at_start, len(token_ids), kinds)

    # Opening tags are 1 perception, 2 reasoning, 3 answer; the closing tag of a kind is its negative; 0 is no tag. The
    # column before the first token is the tag that the prompt ended in.
    found = torch.zeros_like(token_ids, dtype=torch.int64)
    for code, tag_id in zip((1, -1, 2, -2, 3, -3), tag_ids, strict=True):
        found = torch.where(mask & (token_ids == tag_id), code, found)
    codes = torch.cat([_codes_of(opened, found), found], dim=1)
    is_eos = mask & _is_any(token_ids, eos_token_id)
    finished = _last_is(is_eos, mask)

    # Before its first fault a response is inside reasoning after an opening tag of reasoning, until its closing one.
    of_reasoning = _last_tags(torch.where(codes.abs() == 2, codes, 0))
    in_reasoning = of_reasoning == 2
    in_perception = torch.zeros_like(in_reasoning)
    if nested:
        in_perception = _last_tags(torch.where(codes.abs() == 1, codes, 0)) == 1
        in_reasoning = in_reasoning | ((codes[:, :1] == 1) & (of_reasoning == 0))
    reasons = _shifted(in_reasoning) & ~_shifted(in_perception)  # the tag itself stands in reasoning

    # There a tag of another kind is text: unless the next tag closes what it opens, or the next but one does and the
    # next closes the reasoning, or no tag follows that would tell.
    is_named = reasons & (codes.abs() == 3) if nested else reasons & ((codes.abs() == 3) | (codes.abs() == 1))
    after, after_that = _next_tags(codes)
    opens = is_named & (codes > 0)
    faults = torch.where(opens & ((after == -codes) | (after == 0)), int(BrokenReason.NESTED), 0)
    faults = torch.where(opens & (after == -2) & (after_that == -codes), int(BrokenReason.CROSSED), faults)

    # Of the other tags, the one before tells which block is open: opening and closing tags alternate.
    tags = torch.where(is_named, 0, codes)
    last = _last_tags(tags)
    outer = torch.where(reasons, 0, _shifted(last).clamp(min=0))
    nests = ((tags > 0) & (outer > 0)) | (reasons & (tags == 2))
    crosses = nests & (outer > 0) & (after == -outer) & (tags != outer)
    crosses = crosses | ((tags == -2) & _shifted(in_reasoning & in_perception))
    strays = (tags < 0) & torch.where(reasons, tags == -1, tags != -outer)
    two_answers = (tags == 3) & ((tags == 3).cumsum(dim=1) > 1)
    for fault, reason in (
        (two_answers, BrokenReason.TWO_ANSWERS),
        (strays, BrokenReason.STRAY_CLOSE),
        (nests, BrokenReason.NESTED),
        (crosses, BrokenReason.CROSSED),
    ):
        faults = torch.where(fault, int(reason), faults)
    first_fault = (faults != 0).int().argmax(dim=1, keepdim=True)
    broken = faults.gather(1, first_fault).squeeze(1)

    open_at_end = (last[:, -1] > 0) | in_reasoning[:, -1]
    has_perception = (tags == 1).any(dim=1)
    at_end = torch.where(has_perception, int(BrokenReason.NONE), int(BrokenReason.NO_PERCEPTION))
    at_end = torch.where(open_at_end & finished, int(BrokenReason.UNCLOSED), at_end)
    broken = torch.where(broken != 0, broken, at_end)
    well_formed = (broken == 0).unsqueeze(1)

    is_tag = tags[:, 1:] != 0
    content = mask & ~is_tag & ~is_eos & well_formed
    if is_blank is not None:
        content = content & _between(content & ~_is_in(token_ids, is_blank), is_tag)
    perception = content & (last[:, 1:] == 1)
    # Reasoning that no perception precedes depends on none: there is no contrast to weight it by.
    informed = content & (perception.cumsum(dim=1) > 0)
    roles = torch.where(perception, int(Role.PERCEPTION), 0)
    roles = torch.where(informed & in_reasoning[:, 1:] & ~perception, int(Role.REASONING), roles)
    roles = torch.where(informed & (last[:, 1:] == 3), answer, roles)
    return Segmentation(roles, broken, is_tag & well_formed)


def _checked_kinds(
    open_at_start: Kind | Sequence[Kind | None] | None, batch: int, kinds: Collection[str]
) -> Sequence[Kind | None]:
    """The kind of block that each response begins in."""
    is_one = open_at_start is None or isinstance(open_at_start, str)
    opened: Any = [open_at_start] * batch if is_one else open_at_start
    if len(opened) != batch:
        raise ValueError(
            f"open_at_start must be one kind of block, or one for each of the {batch} responses, got {len(opened)}"
        )
    for kind in opened:
        if kind is not None and kind not in kinds:
            raise ValueError(f"open_at_start must be one of {', '.join(map(repr, kinds))}, got {kind!r}")
    return opened


def _codes_of(opened: Sequence[Kind | None], like: Tensor) -> Tensor:
    """The opening tags of the blocks that the responses begin in, [batch, 1]."""
    order = [None, "perception", "reasoning", "answer"]
    codes = [order.index(kind) for kind in opened]
    if len(set(codes)) <= 1:  # without a copy to the device
        return torch.full((len(like), 1), codes[0] if codes else 0, dtype=like.dtype, device=like.device)
    return torch.tensor(codes, dtype=like.dtype, device=like.device).unsqueeze(1)


def _last_tags(codes: Tensor) -> Tensor:
    """The last code other than 0 at or before each place, 0 if there is none."""
    places = torch.arange(codes.shape[1], device=codes.device)
    return codes.gather(1, torch.where(codes != 0, places, 0).cummax(dim=1).values)


def _next_tags(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The first code other than 0 after each place, and the second; 0 where there is none."""
    length = codes.shape[1]
    places = torch.where(codes != 0, torch.arange(length, device=codes.device), length)
    # One more place, at which there is no tag: what follows it is itself.
    following = torch.cat([places[:, 1:], torch.full_like(places[:, :1], length)], dim=1)
    following = following.flip(1).cummin(dim=1).values.flip(1)
    following = torch.cat([following, torch.full_like(places[:, :1], length)], dim=1)
    padded = torch.cat([codes, torch.zeros_like(codes[:, :1])], dim=1)
    return padded.gather(1, following)[:, :-1], padded.gather(1, following.gather(1, following))[:, :-1]


def _shifted(values: Tensor) -> Tensor:
    """Each value one place later; 0 or False at the first."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)


def _between(found: Tensor, is_tag: Tensor) -> Tensor:
    """What lies between the first and the last one found after a tag and before the next."""
    return _since_tag(found, is_tag) & _since_tag(found.flip(1), is_tag.flip(1)).flip(1)


def _since_tag(found: Tensor, is_tag: Tensor) -> Tensor:
    """Whether there is one, at or before each place, that no tag follows up to there."""
    counts = found.cumsum(dim=1)
    at_tag = torch.where(is_tag, counts, 0).cummax(dim=1).values if counts.shape[1] else counts
    return counts > at_tag


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


def _is_in(token_ids: Tensor, table: Tensor) -> Tensor:
    """What a table over the vocabulary says of each token; False of ids outside of it."""
    known = (token_ids >= 0) & (token_ids < len(table))
    return known & table[torch.where(known, token_ids, 0)]


@typechecked
def segment_responses(
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    tokenizer: TokenizerLike,
    *,
    tags: RoleTags = DEFAULT_TAGS,
    eos_token_id: int | Sequence[int] | None = None,
    answer_role: Literal["reasoning", "other"] = "reasoning",
    open_at_start: Kind | Sequence[Kind | None] | None = None,
) -> Segmentation:
    r"""Role of each token, from the character offsets of the decoded tokens.

    A tag may be several tokens, and a token may hold parts of a tag and of its content (``>3``, ``><``, ``>\n``), as
    happens with the BPE of real models. A token has the role of its first content character, if it has one; a character
    whose bytes are split over several tokens belongs to each of them. Whitespace at the edges of a block is not
    content: a token that holds nothing else is ``OTHER``, and a perception of nothing but whitespace is empty.

    A tag that is an added token of the tokenizer counts where this token stands, as in :func:`segment_roles`; the same
    letters in other tokens are text that names the tag. Other tags count wherever their text stands.

    The function runs on the host. Call it once per rollout batch.

    Args:
        token_ids: Sampled tokens.
        mask: True at tokens the policy sampled. Tokens elsewhere (padding, tool outputs) are ignored.
        tokenizer: Anything with ``decode(list_of_ids) -> str``. Where its ``decode`` has options for this, special
            tokens are kept and spaces are not cleaned up.
        tags: The opening and closing tag of each block.
        eos_token_id: The id or ids that end a response, see :func:`segment_roles`; None: those that
            :func:`~srpo_core.special_tokens.ending_ids` finds in the tokenizer. The generation config may list more.
        answer_role: What answer tokens count as.
        open_at_start: The kind of block in which all responses begin, or that of each response, from
            :func:`~srpo_core.tags.open_block`; None: they begin outside of blocks.

    Returns:
        Roles, the reason why each response is broken, and the tokens that share characters with a tag as ``boundary``;
        on the device of ``token_ids``.

    Raises:
        ValueError: If `eos_token_id` is None and the tokenizer has none, `answer_role` is unknown, or `open_at_start`
            is unknown, of a kind without tags, or not one for each response.

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
    role_of = roles_of_blocks(answer_role)
    if eos_token_id is None:
        try:
            eos_token_id = ending_ids(tokenizer)
        except ValueError:
            raise ValueError(
                "eos_token_id must be given, because the tokenizer has none; pass () if no response ends with one"
            ) from None
    opened = _checked_kinds(open_at_start, len(token_ids), tags.pairs)

    decode, pieces = text_decoder(tokenizer), {}
    own_ids = _own_ids(tokenizer, tags)
    host_ids, host_mask = token_ids.cpu(), mask.cpu()
    is_eos = host_mask & _is_any(host_ids, eos_token_id)
    read = host_mask & ~is_eos
    all_ids = host_ids[read].tolist()
    flat_roles, flat_boundary, broken = [], [], []
    begin = 0
    for length, finished, kind in zip(
        read.sum(dim=1).tolist(), _last_is(is_eos, host_mask).tolist(), opened, strict=True
    ):
        ids = all_ids[begin : begin + length]
        text, starts, ends = token_spans(ids, decode, pieces)
        places: dict[str, set[int]] = {tag: set() for tag in own_ids.values()}
        for token, start in zip(ids, starts, strict=True):
            if token in own_ids:
                places[own_ids[token]].add(start)
        parsed = parse_response(text, tags, finished=finished, open_at_start=kind, places=places)
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


def _own_ids(tokenizer: TokenizerLike, tags: RoleTags) -> dict[int, str]:
    """The tags that are added tokens of the tokenizer, by their ids."""
    added = added_tokens(tokenizer)
    return {added[tag]: tag for pair in tags.pairs.values() for tag in pair if tag in added}


def label_tokens(
    text: str, starts: list[int], ends: list[int], parsed: Parsed, tags: RoleTags, role_of: dict[str, int]
) -> tuple[list[int], list[bool]]:
    """Role of each token of one response, and whether it shares characters with a tag."""
    roles, boundary = [int(Role.OTHER)] * len(starts), [False] * len(starts)
    if parsed.reason != BrokenReason.NONE:
        return roles, boundary
    informed = False
    for block in parsed.blocks:
        for span in _tag_spans(text, block, tags.pairs[block.kind]):
            for token in _overlapping(starts, ends, *span):
                boundary[token] = True
        # Whitespace at the edges is no content.
        content = text[block.start : block.end]
        start, end = block.start + len(content) - len(content.lstrip()), block.start + len(content.rstrip())
        if start >= end:
            continue
        # Reasoning that no perception precedes depends on none: there is no contrast to weight it by.
        informed = informed or block.kind == "perception"
        if informed:
            for token in _overlapping(starts, ends, start, end):
                roles[token] = roles[token] or role_of[block.kind]
    return roles, boundary


def _tag_spans(text: str, block: Block, pair: tuple[str, str]) -> list[tuple[int, int]]:
    """Where the tags of a block stand. One that begins or ends elsewhere than at its tag has fewer than two."""
    opening, closing = pair
    if pair == JSON:
        return []
    if not closing:  # a heading, in whatever markup: from the start of its line
        return [(text.rfind("\n", 0, block.start) + 1, block.start)]
    before, after = max(block.start - len(opening), 0), block.end + len(closing)
    spans = [(before, block.start)] if text[before : block.start] == opening else []
    return spans + ([(block.end, after)] if text[block.end : after] == closing else [])


def _overlapping(starts: list[int], ends: list[int], start: int, end: int) -> range:
    """Tokens that hold a character of ``[start, end)``, or lie inside it and hold none."""
    if start == end:  # an empty block: the token that straddles it holds nothing of it
        return range(0)
    return range(bisect_right(ends, start), bisect_left(starts, end))
