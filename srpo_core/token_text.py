"""Token ids to text, and which characters of it each token holds."""

import inspect
from collections.abc import Callable
from functools import partial
from itertools import accumulate, groupby
from typing import Any, Protocol, runtime_checkable

__all__ = ["Decoder", "TokenizerLike", "text_decoder", "token_spans"]

Decoder = Callable[[list[int]], str]


@runtime_checkable
class TokenizerLike(Protocol):
    """A tokenizer of ``tokenizers`` or ``transformers``, or anything else that decodes."""

    def decode(self, token_ids: Any, /, *args: Any, **kwargs: Any) -> Any: ...


def text_decoder(tokenizer: TokenizerLike) -> Decoder:
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


def token_spans(ids: list[int], decode: Decoder, known: dict[Any, Any]) -> tuple[str, list[int], list[int]]:
    """Text of the tokens, and where in it each token starts and ends.

    Each distinct token is decoded once (``known`` remembers), and tokens that hold only parts of a character together
    with their neighbors. These pieces are right if they add up to the text. If they do not, because the decoder looks
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


def _piece(token: int, decode: Decoder, known: dict[Any, Any]) -> str:
    """What a token adds to a text that does not start with it."""
    if token not in known:
        known[token] = decode([token, token])[len(decode([token])) :]
    return known[token]


def _prefix_spans(
    ids: tuple[int, ...], decode: Decoder, *, after: tuple[int, ...] = ()
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
