"""Token ids to text, and which characters of it each token holds."""

import inspect
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, groupby
from typing import Any, Protocol, runtime_checkable

__all__ = ["Decoder", "TokenizerLike", "added_tokens", "text_decoder", "token_spans"]

Decoder = Callable[[list[int]], str]


@runtime_checkable
class TokenizerLike(Protocol):
    """A tokenizer of ``tokenizers`` or ``transformers``, or anything else that decodes."""

    def decode(self, token_ids: Any, /, *args: Any, **kwargs: Any) -> Any: ...


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that were added to a tokenizer's vocabulary, including special tokens, and their ids.

    Args:
        tokenizer: A tokenizer of ``transformers`` or ``tokenizers``, or a processor that has one. For anything else the
            result is empty.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> tokenizer = Tokenizer(models.WordLevel({"cat": 0}, unk_token="cat"))
        >>> _ = tokenizer.add_tokens(["<think>"])
        >>> added_tokens(tokenizer), added_tokens(object())
        ({'<think>': 1}, {})
    """
    sources: tuple[Any, ...] = (tokenizer, getattr(tokenizer, "tokenizer", None))
    for source in sources:
        if hasattr(source, "get_added_tokens_decoder"):  # tokenizers
            return {token.content: index for index, token in source.get_added_tokens_decoder().items()}
        for name in ("get_added_vocab", "added_tokens_encoder"):  # transformers
            try:
                found = getattr(source, name, None)
                found = found() if callable(found) else found
            except NotImplementedError:  # the stub of a base class
                continue
            if isinstance(found, Mapping):
                return dict(found)
    return {}


def text_decoder(tokenizer: TokenizerLike) -> Decoder:
    """What the tokens spell, however the tokenizer prints them.

    The tokenizer's ``decode`` is told to keep special tokens and to leave spaces alone, where it can be told. Added
    tokens are spelled as they were added, and it decodes only what stands between them: Python tokenizers of
    transformers 4 put spaces around added tokens and strip the space after one, and byte-level decoders take an added
    ``é`` for a byte.
    """
    return _TextDecoder(tokenizer)


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACES = ("▁", "Ġ", "Ċ")  # how SentencePiece and byte-level BPE write spaces in a vocabulary
_SEARCHED = 4096  # ids among which every vocabulary has a word or a letter
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not, or not yet, a character


class _TextDecoder:
    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._decode = tokenizer.decode
        self._named, self._untold = _quiet_options(tokenizer.decode)
        # Added tokens that spell spaces or a byte in the vocabulary's own way have to be decoded.
        self._added = {
            index: text
            for text, index in added_tokens(tokenizer).items()
            if text.strip() and not text.startswith(_SPACES) and not _BYTE_TOKEN.fullmatch(text)
        }
        self._anchor: tuple[int, str] | None = None  # a whole word, and its text
        self._has_searched = False

    def __call__(self, ids: list[int]) -> str:
        if not any(token in self._added for token in ids):
            return self._plain(ids)
        text = ""
        for added, run in groupby(ids, key=self._added.get):
            tokens = list(run)
            if added is not None:
                text += added * len(tokens)
            else:
                text += self._inside(tokens) if text else self._plain(tokens)
        return text

    def _plain(self, ids: list[int]) -> str:
        if self._untold:
            try:
                return self._decode(ids, **self._named, **self._untold)
            except (TypeError, ValueError):  # MistralCommonBackend takes any keyword, to refuse it
                self._untold = {}
        return self._decode(ids, **self._named)

    def _inside(self, ids: list[int]) -> str:
        """Text of tokens that do not begin a text, where many decoders strip a space: what they add to a word."""
        if self._anchor is None:
            self._anchor = next(self._words(ids), None)
        if self._anchor is None and not self._has_searched:
            self._has_searched = True
            self._anchor = next(self._words(range(_SEARCHED)), None)
        if self._anchor is not None:
            token, word = self._anchor
            text = self._plain([token, *ids])
            if text.startswith(word):
                return text[len(word) :]
        return self._plain(ids)

    def _words(self, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Those of the tokens that are a whole word, and their texts."""
        for token in ids:
            try:
                word = self._plain([token])
            except Exception:  # of a vocabulary that ends here, whatever its decoder raises
                return
            if token not in self._added and word.strip().isalnum():
                yield token, word


def _quiet_options(decode: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that a ``decode`` names, and others that it may take."""
    try:
        parameters = inspect.signature(decode).parameters
    except ValueError:  # compiled without a signature
        return {}, {}
    wanted: dict[str, Any] = dict.fromkeys(
        ("skip_special_tokens", "clean_up_tokenization_spaces", "spaces_between_special_tokens"), False
    )
    named = {name: value for name, value in wanted.items() if name in parameters}
    if "special_token_policy" in parameters:  # mistral-common's, whose default drops special tokens
        policies = type(parameters["special_token_policy"].default)
        named |= {"special_token_policy": policies.KEEP} if hasattr(policies, "KEEP") else {}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return named, {name: value for name, value in wanted.items() if name not in named and takes_any}


def token_spans(ids: list[int], decode: Decoder, known: dict[Any, Any]) -> tuple[str, list[int], list[int]]:
    """Text of the tokens, and where in it each token starts and ends.

    Each distinct token is decoded once (``known`` remembers), and tokens that hold only parts of a character together
    with their neighbors. These pieces are right if they add up to the text. If they do not, because the decoder looks
    further than one token, growing prefixes are decoded instead, each from a few tokens before the last place where
    the text is known to split. The number of tokens decoded grows with the number of tokens, whatever they are.

    Where a decoder's text stays undecided over more than 256 tokens (one that writes a text backward, say), the
    tokens of that stretch share its characters: each holds all of them.
    """
    text = decode(ids)
    pieces = [_piece(token, decode, known) for token in ids]
    if ids:
        pieces[0] = decode(ids[:1])  # many decoders strip the space at the start of a text
    for joins in (False, True):  # joins are rare, and dear to look for
        starts, ends = _piece_spans(text, ids, pieces, decode, known, joins=joins)
        if len(ends) == len(ids) and (ends[-1] if ids else 0) == len(text):
            return text, starts, ends
    return (text, *_prefix_spans(text, ids, decode))


def _piece_spans(
    text: str, ids: list[int], pieces: list[str], decode: Decoder, known: dict[Any, Any], *, joins: bool
) -> tuple[list[int], list[int]]:
    """Spans of the tokens whose pieces add up to the text: all of them, or those before the first that does not."""
    starts, ends, length = [], [], 0
    for is_partial, first, last in _runs(ids, pieces, decode, known, joins=joins):
        if is_partial:
            piece, run_starts, run_ends = _characters(ids[max(first - 1, 0) : first], ids[first:last], decode, known)
        else:
            piece = "".join(pieces[first:last])
            run_ends = [*accumulate(map(len, pieces[first:last]))]
            run_starts = [0, *run_ends[:-1]]
        if not text.startswith(piece, length):
            break
        starts += [length + start for start in run_starts]
        ends += [length + end for end in run_ends]
        length += len(piece)
    return starts, ends


def _piece(token: int, decode: Decoder, known: dict[Any, Any]) -> str:
    """What a token adds to a text that does not start with it."""
    if token not in known:
        known[token] = decode([token, token])[len(decode([token])) :]
    return known[token]


def _runs(
    ids: list[int], pieces: list[str], decode: Decoder, known: dict[Any, Any], *, joins: bool
) -> Iterator[tuple[bool, int, int]]:
    """Tokens that spell characters only together, and tokens that do so alone, from the first to before the last."""
    joined: list[int | None] = [
        token if _REPLACEMENT in piece else None for token, piece in zip(ids, pieces, strict=True)
    ]
    # A decoder with byte fallback makes no character of any byte beside one that it can make nothing of.
    for order in (range(1, len(ids)), range(len(ids) - 2, -1, -1)) if joins else ():
        for index in order:
            partial = joined[index - order.step]
            if partial is not None and joined[index] is None and _joins(ids[index], partial, decode, known):
                joined[index] = partial
    end = 0
    for is_partial, run in groupby(joined, key=lambda partial: partial is not None):
        start, end = end, end + len(list(run))
        yield is_partial, start, end


def _joins(token: int, partial: int, decode: Decoder, known: dict[Any, Any]) -> bool:
    """Whether a token spells something else beside a part of a character."""
    if ("joins", token, partial) not in known:
        after, before = decode([partial, token]), decode([token, partial])
        alone = _alone(token, decode, known)
        part = _alone(partial, decode, known)
        known["joins", token, partial] = after not in (part + alone, part + _piece(token, decode, known)) or (
            before not in (alone + part, alone + _piece(partial, decode, known))
        )
    return known["joins", token, partial]


def _alone(token: int, decode: Decoder, known: dict[Any, Any]) -> str:
    if ("alone", token) not in known:
        known["alone", token] = decode([token])
    return known["alone", token]


def _characters(
    before: list[int], ids: list[int], decode: Decoder, known: dict[Any, Any]
) -> tuple[str, list[int], list[int]]:
    """Text and spans of tokens that spell characters together, behind the token before them."""
    key = (*before, None, *ids) if len(ids) <= _REACH else None
    if key is None or key not in known:
        text = decode([*before, *ids])[len(decode(before)) if before else 0 :]
        alone = [_alone(token, decode, known) for token in ids]
        in_bytes = [at for at, character in enumerate(text) for _ in character.encode(errors="replace")]
        # Putting tokens together only ever makes fewer characters of them: as many means that none were joined.
        if "".join(alone) == text or (len(text) == len(ids) and all(len(each) == 1 for each in alone)):
            ends = [*accumulate(map(len, alone))]
            starts = [0, *ends[:-1]]
        elif _REPLACEMENT not in text and len(in_bytes) == len(ids):  # each token is a byte
            starts, ends = in_bytes, [at + 1 for at in in_bytes]
        else:
            starts, ends = _prefix_spans(text, ids, decode, after=before)
        if key is None:
            return text, starts, ends
        known[key] = text, starts, ends
    return known[key]


_CONTEXT, _REACH = 8, 32  # tokens


def _prefix_spans(
    text: str, ids: list[int], decode: Decoder, *, after: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Spans from the prefixes of the tokens, each decoded ``after`` some others."""
    for scale in (1, 8):  # how far a decoder looks back, nobody says
        starts, ends, is_exact = _sliding_spans(text, ids, decode, after or [], _CONTEXT * scale, _REACH * scale)
        if is_exact:
            break
    return starts, ends


def _sliding_spans(
    text: str, ids: list[int], decode: Decoder, after: list[int], context: int, reach: int
) -> tuple[list[int], list[int], bool]:
    """Spans from prefixes that begin where the text splits, and whether each is exact.

    A prefix that is one of the text is settled there. Once it is longer than ``reach``, the next ones begin at the last
    place that was settled ``context`` tokens ago. Where nothing settles for ``reach`` tokens, only prefixes of twice,
    four times, ... that length are decoded. Both bound what is decoded for each token.
    """
    tokens, starts, ends = [*after, *ids], [], []
    begin, at, base = 0, 0, decode(after) if after else ""  # prefixes begin at this token; `base` ends `at` in the text
    splits, probe = [len(after)], reach
    settled, agreed, unfinished, is_exact = 0, 0, False, True
    for count in range(len(after) + 1, len(tokens) + 1):
        undecided = count - splits[-1]
        if undecided > reach and undecided < probe and count < len(tokens):
            continue
        if undecided > reach:
            probe = 2 * undecided
        prefix = decode(tokens[begin:count])
        known_part, prefix = prefix.startswith(base), prefix[len(base) :]
        agreed = _agreement(prefix, text[at : at + len(prefix)]) if known_part else 0
        # What does not agree yet is a character this token leaves unfinished: it holds a part of it all the same.
        unfinished = not known_part or agreed < len(prefix)
        # A token that adds nothing (one more byte of no character) belongs to the character before it.
        before, settled = settled, max(settled, at + agreed)
        share = count - len(after) - len(starts)  # this token, and those not decoded since the last one
        is_exact = is_exact and share == 1
        starts += [min(before, max(settled + unfinished - 1, 0))] * share
        ends += [min(settled + unfinished, len(text))] * share
        if not unfinished:
            splits.append(count)
            probe = reach
            earlier = bisect_right(splits, count - context) - 1
            if count - begin > reach and earlier >= 0 and splits[earlier] > begin:
                begin, at = splits[earlier], at + agreed
                base = decode(tokens[begin:count])
    is_exact = is_exact and not unfinished and at + agreed == len(text)
    for index in range(max(splits[-1] - len(after), 0), len(ids)):  # never decided: all of them hold what is left
        ends[index] = len(text)
    if ids and ends[-1] < len(text):
        ends[-1] = len(text)
    return starts, ends, is_exact


def _agreement(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    if first == second:
        return len(first)
    differs = (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differs, min(len(first), len(second)))
