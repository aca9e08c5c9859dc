"""What each response token does: blocks of tags -> a role for every token."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.tags import DEFAULT_TAGS, BrokenReason, Parsed, RoleTagIds, RoleTags, parse_response
from srpo_core.token_text import TokenizerLike, text_decoder, token_spans
from srpo_core.typechecking import typechecked

__all__ = [
    "Role",
    "RoleMasks",
    "Segmentation",
    "check_roles",
    "label_tokens",
    "role_masks",
    "roles_of_blocks",
    "segment_responses",
    "segment_roles",
]


class Role(IntEnum):
    """What a response token does. Tags, text outside blocks, EOS and padding are ``OTHER``."""

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
    answer = roles_of_blocks(answer_role)["answer"]
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
    # Reasoning that no perception precedes depends on none: there is no contrast to weight it by.
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


@typechecked
def segment_responses(
    token_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    tokenizer: TokenizerLike,
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
    role_of = roles_of_blocks(answer_role)
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
        # Reasoning that no perception precedes depends on none: there is no contrast to weight it by.
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
