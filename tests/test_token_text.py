"""Tokens to text: decoders that are told to leave it alone, and which characters of it each token holds."""

import codecs
from enum import Enum
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import EOS, PythonTokenizer, byte_bpe, token_bytes, unigram, with_tags, wordpiece
from tokenizers import decoders

from srpo_core import segment_responses
from srpo_core.token_text import TokenizerLike, added_tokens, text_decoder, token_spans

FAMILIES = pytest.mark.parametrize("tokenizer", [byte_bpe(), unigram()], ids=["byte-level BPE", "Unigram"])
EACH_MAKER = pytest.mark.parametrize("make", [byte_bpe, unigram, wordpiece])
TAGS = ("<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>", "<réponse>")


class Characters:
    """Every character is a token."""

    def decode(self, ids):
        return "".join(map(chr, ids))


class Counting:
    """Counts what is decoded; strips the first space of a text, as SentencePiece does, where asked to."""

    def __init__(self, decode, *, strips=False):
        self._decode, self._strips, self.calls, self.tokens = decode, strips, 0, 0

    def decode(self, ids):
        self.calls += 1
        self.tokens += len(ids)
        return self._decode(ids).removeprefix(" " * self._strips)


# Independent references: spans from the bytes that the vocabulary says each token has


def begins_a_character(spelled):
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(spelled)
    except UnicodeDecodeError:
        return False
    return text == "" or (len(text) == 1 and len(text.encode()) == len(spelled))


def characters_of_bytes(spelled):
    """The character of each byte where the longest beginnings of characters become one replacement each."""
    found, character = [], 0
    while len(found) < len(spelled):
        rest = spelled[len(found) : len(found) + 4]
        sizes = [size for size in range(1, len(rest) + 1) if begins_a_character(rest[:size])]
        found += [character] * max(sizes, default=1)
        character += 1
    return found


def spans_of_bytes(pieces, characters):
    edges = [0]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    return [(characters[start], characters[end - 1] + 1) for start, end in pairwise(edges)]


def characters_with_fallback(tokenizer, ids):
    """The character that each byte belongs to where a run of byte tokens is text, or else a replacement for each."""
    found, character, run = [], 0, []
    for token in [*ids, None]:
        if token is not None and tokenizer.id_to_token(token).startswith("<0x"):
            run.append(token_bytes(tokenizer, token))
            continue
        joined = b"".join(run)
        try:
            sizes = [len(each.encode()) for each in joined.decode()]
        except UnicodeDecodeError:
            sizes = [1] * len(joined)
        for size in sizes:
            found += [character] * size
            character += 1
        run = []
        if token is not None:
            for each in token_bytes(tokenizer, token).decode():
                found += [character] * len(each.encode())
                character += 1
    return found


def spans_of_prefixes(ids, decode):
    """Each token holds what it settles of the text, or else the first character that is not settled yet."""
    text, spans, settled = decode(ids), [], 0
    for count in range(1, len(ids) + 1):
        prefix = decode(ids[:count])
        agreed = max(size for size in range(len(prefix) + 1) if text[:size] == prefix[:size])
        unfinished = agreed < len(prefix)
        before, settled = settled, max(settled, agreed)
        spans.append((min(before, max(settled + unfinished - 1, 0)), settled + unfinished))
    return spans


def awkward_tokens(tokenizer):
    """Parts of characters, bytes of no character, bytes that are characters, and words."""
    spelled = {token_bytes(tokenizer, token): token for token in reversed(range(tokenizer.get_vocab_size()))}
    tokens = [spelled[byte] for byte in (b"\xc3", b"\xa9", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xff")]
    if tokenizer.token_to_id("<0x0A>") is not None:
        tokens += [tokenizer.token_to_id("<0x0A>"), tokenizer.token_to_id("<0x41>")]
    tokens += [token for piece, token in spelled.items() if piece.startswith(b" \xf0") or piece.endswith(b"\xf0\x9f")]
    return tokens + tokenizer.encode("xthe cat", add_special_tokens=False).ids[1:]


# Spans


@FAMILIES
def test_token_spans_of_text_are_the_characters_of_each_token(tokenizer):
    """Read off the vocabulary; a character split over tokens belongs to each of them."""
    ids = tokenizer.encode("the cat sees 🧭 猫\n3", add_special_tokens=False).ids
    text, starts, ends = token_spans(ids, tokenizer.decode, {})
    assert text == tokenizer.decode(ids) == "the cat sees 🧭 猫\n3"
    spelled = b"".join(token_bytes(tokenizer, token) for token in ids)
    stripped = len(spelled) - len(text.encode())  # the space that a Unigram puts before a text
    at = -stripped
    for token, start, end in zip(ids, starts, ends, strict=True):
        piece = token_bytes(tokenizer, token)
        before, after = (text.encode()[: max(edge, 0)] for edge in (at, at + len(piece)))
        assert start == len(before.decode(errors="ignore"))
        whole = after.decode(errors="ignore")
        assert end == len(whole) + (len(whole.encode()) < len(after))
        at += len(piece)


@FAMILIES
@given(picks=st.lists(st.integers(0, 9), max_size=8))
@example(picks=[0, 1, 0, 1, 3])  # with byte fallback two characters, until the last byte makes none of them one
def test_token_spans_are_in_order_and_leave_no_character_out(tokenizer, picks):
    """Whatever the tokens, bytes of no character included: looking tokens up by bisection relies on it."""
    spelled = {token_bytes(tokenizer, token): token for token in range(256 + 1)}
    tokens = [spelled[byte] for byte in (b"\xc3", b"\xa9", b"\xf0", b"\xff")]
    tokens += tokenizer.encode("the cat", add_special_tokens=False).ids
    ids = [tokens[pick % len(tokens)] for pick in picks]
    text, starts, ends = token_spans(ids, tokenizer.decode, {})
    assert text == tokenizer.decode(ids)
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    assert {at for start, end in zip(starts, ends, strict=True) for at in range(start, end)} == set(range(len(text)))


def test_token_spans_of_nothing():
    assert token_spans([], Characters().decode, {}) == ("", [], [])


class Cleaning:
    """Decodes as WordPiece does: what a token spells depends on its neighbors, so that pieces do not add up."""

    def decode(self, token_ids):
        return Characters().decode(token_ids).replace(" .", ".").lstrip(" ")


def test_token_spans_of_decoders_that_look_at_neighbors_are_exact_all_the_same():
    written = " a . b"
    text, starts, ends = token_spans([*map(ord, written)], Cleaning().decode, {})
    assert text == "a. b"
    # The space before a full stop is removed once the stop is there: until then it holds the place of it.
    held = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    assert held == ["", "a", ".", ".", " ", "b"]


@settings(max_examples=200)
@given(picks=st.lists(st.integers(0, 40), max_size=60))
@example(picks=[0, 1, 0, 1, 3])
@example(picks=[2, 3] * 40)
@example(picks=[2, 3, 4] * 60 + [1])
@example(picks=[2, 3, 4, 5] * 60 + [6])
def test_token_spans_of_any_bytes_are_those_of_a_byte_level_decoder(picks):
    tokenizer = byte_bpe()
    tokens = awkward_tokens(tokenizer)
    ids = [tokens[pick % len(tokens)] for pick in picks]
    pieces = [token_bytes(tokenizer, token) for token in ids]
    text, starts, ends = token_spans(ids, tokenizer.decode, {})
    assert text == b"".join(pieces).decode(errors="replace")
    assert [*zip(starts, ends, strict=True)] == spans_of_bytes(pieces, characters_of_bytes(b"".join(pieces)))


@settings(max_examples=200)
@given(picks=st.lists(st.integers(0, 8), max_size=60))
@example(picks=[2, 3, 7])  # half an emoji before a byte that is a character elsewhere
@example(picks=[0, 1, 7, 2])
@example(picks=[2, 3, 4, 5] * 60)
@example(picks=[2, 3, 4, 5] * 60 + [3])
def test_token_spans_of_byte_fallback_are_those_of_each_run_of_bytes(picks):
    """One byte that is no character makes the whole run of byte tokens none: each is a replacement then."""
    tokenizer = unigram()
    tokens, word = awkward_tokens(tokenizer), tokenizer.token_to_id("a")
    ids = [word, *(tokens[pick] for pick in picks), word]
    pieces = [token_bytes(tokenizer, token) for token in ids]
    text, starts, ends = token_spans(ids, tokenizer.decode, {})
    assert text == tokenizer.decode(ids)
    assert [*zip(starts, ends, strict=True)] == spans_of_bytes(pieces, characters_with_fallback(tokenizer, ids))


class Backward:
    """Nothing of what it decodes is settled before the last token."""

    def decode(self, ids):
        return Characters().decode(ids)[::-1]


def test_token_spans_of_a_decoder_that_decides_at_the_end_share_the_text():
    ids = [*range(200, 200 + 5_000)]
    counting = Counting(Backward().decode)
    text, starts, ends = token_spans(ids, counting.decode, {})
    assert text == Backward().decode(ids)
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    assert (starts[0], ends[-1]) == (0, len(text))
    assert counting.tokens <= 200 * len(ids)


class Counted:
    """How a character is written depends on how many stand before it, however far away."""

    def decode(self, ids):
        text = Characters().decode(ids)
        return "".join(each.upper() if at % 1000 == 7 else each for at, each in enumerate(text))


def test_token_spans_of_a_decoder_that_looks_back_without_end_leave_no_character_out():
    ids = [*map(ord, "abcdefghij" * 300)]
    counting = Counting(Counted().decode)
    text, starts, ends = token_spans(ids, counting.decode, {})
    assert text == Counted().decode(ids)
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    assert all(start <= at < end for at, (start, end) in enumerate(zip(starts, ends, strict=True)))
    assert counting.tokens <= 400 * len(ids)


class FarSighted:
    """A bracket changes how the 20 characters before it are written, and a tilde the 20 after it."""

    def decode(self, ids):
        text = Characters().decode(ids)
        changed = [
            character.upper() if ")" in text[at : at + 20] or "~" in text[max(at - 20, 0) : at] else character
            for at, character in enumerate(text)
        ]
        return "".join(changed)


def test_token_spans_are_exact_where_a_decoder_looks_far():
    written = ("a~bcdefghijklmnopqrs tuvwxyz and more) of the same. " * 20)[:900]
    counting = Counting(FarSighted().decode)
    ids = [*map(ord, written)]
    text, starts, ends = token_spans(ids, counting.decode, {})
    assert text == FarSighted().decode(ids)
    assert [*zip(starts, ends, strict=True)] == spans_of_prefixes(ids, FarSighted().decode)
    assert counting.tokens <= 200 * len(ids)


# What is decoded


@pytest.mark.parametrize("make", [byte_bpe, unigram])
def test_each_distinct_token_is_decoded_once_and_not_each_prefix(make):
    tokenizer = Counting(lambda ids: make().decode(ids, skip_special_tokens=False), strips=make is byte_bpe)
    known = {}
    ids = make().encode("<perception>" + "the cat 🧭 sees 猫" * 40 + "</perception>").ids
    for _ in range(2):
        token_spans(ids, tokenizer.decode, known)
    # Two calls a distinct token, a handful for each of two split characters, two for each response.
    assert tokenizer.calls <= 2 * len(set(ids)) + 2 * 8 + 2 * 2
    assert tokenizer.calls < len(ids) / 2


def adversarial(tokenizer, pattern, count):
    tokens = awkward_tokens(tokenizer)
    return [tokens[pattern[at % len(pattern)] % len(tokens)] for at in range(count)]


@FAMILIES
@settings(max_examples=60, deadline=None)
@given(pattern=st.lists(st.integers(0, 40), min_size=1, max_size=80), count=st.sampled_from([1_000, 2_000, 4_000]))
@example(pattern=[2, 3, 7], count=64_000)
@example(pattern=[4], count=64_000)
@example(pattern=[0, 1, 2, 3, 4, 5], count=64_000)
@example(pattern=[2, 3, 4, 5] * 19 + [6], count=64_000)
def test_the_tokens_decoded_are_linear_in_the_tokens_whatever_they_are(tokenizer, pattern, count):
    counting = Counting(tokenizer.decode)
    ids = adversarial(tokenizer, pattern, count)
    token_spans(ids, counting.decode, {})
    assert counting.tokens <= 64 * len(ids)


@pytest.mark.parametrize("tail", [[6], [2, 3], [7]])
@FAMILIES
def test_one_awkward_token_at_either_end_costs_no_more(tokenizer, tail):
    for pattern in ([0, 1], [2, 3, 4, 5], [-1, -2]):
        ids = adversarial(tokenizer, pattern, 16_000)
        for awkward in (ids + adversarial(tokenizer, tail, 2), adversarial(tokenizer, tail, 2) + ids):
            counting = Counting(tokenizer.decode)
            token_spans(awkward, counting.decode, {})
            assert counting.tokens <= 64 * len(ids)


# Decoders


def test_text_decoder_keeps_spaces_and_special_tokens():
    class Tidy:
        def decode(self, ids, clean_up_tokenization_spaces=True):
            text = Characters().decode(ids)
            return text.replace(" ", "") if clean_up_tokenization_spaces else text

    class Anything:
        def decode(self, ids, **options):
            return sorted(options.items())

    ids = [*map(ord, "< /p>")]
    assert Tidy().decode(ids) == "</p>"
    assert text_decoder(Tidy())(ids) == "< /p>"
    assert text_decoder(Anything())(ids) == [
        ("clean_up_tokenization_spaces", False),
        ("skip_special_tokens", False),
        ("spaces_between_special_tokens", False),
    ]
    assert text_decoder(Characters())(ids) == "< /p>"
    # `tokenizers` skips special tokens unless told not to.
    tokenizer = with_tags(byte_bpe(), ("<think>",), special=True)
    ids = tokenizer.encode(f"<think>3{EOS}").ids
    assert tokenizer.decode(ids) == "3"
    assert text_decoder(tokenizer)(ids) == f"<think>3{EOS}"


def test_text_decoder_takes_a_decode_without_a_signature():
    class Compiled:
        decode = staticmethod(max)  # a builtin that inspect knows no signature of

    assert text_decoder(Compiled())([1, 3]) == 3
    assert isinstance(Compiled(), TokenizerLike)
    assert not isinstance("gpt2", TokenizerLike)


def test_text_decoder_leaves_out_options_that_are_refused():
    """MistralCommonBackend of transformers takes any keyword, and raises."""

    class Strict:
        def decode(self, ids, skip_special_tokens=True, **options):
            if options:
                raise ValueError(f"Kwargs {list(options)} are not supported")
            return "" if skip_special_tokens else Characters().decode(ids)

    class Broken:
        def decode(self, ids, **options):
            raise TypeError("no such token")

    decode = text_decoder(Strict())
    assert [decode([65]), decode([66])] == ["A", "B"]
    with pytest.raises(TypeError, match="no such token"):
        text_decoder(Broken())([65])


def test_text_decoder_tells_mistral_common_to_keep_special_tokens():
    class Policy(Enum):
        IGNORE = 0
        KEEP = 1

    class Mistral:
        def decode(self, tokens, special_token_policy=Policy.IGNORE):
            return Characters().decode([token for token in tokens if token > 9 or special_token_policy is Policy.KEEP])

    assert text_decoder(Mistral())([9, 65]) == "\tA"


@EACH_MAKER
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("prepends", [False, True])
def test_what_a_python_tokenizer_prints_around_added_tokens_is_not_text(make, special, prepends):
    """The text is what the tokens spell one after another, and so is each token's part of it."""
    fast = with_tags(make(), TAGS, special=special)
    tokenizer = PythonTokenizer(fast, prepends=prepends)
    written = "<think>the cat . sees</think><perception>3 the cat</perception><answer>3</answer><réponse>"
    ids = fast.encode(written, add_special_tokens=False).ids
    spelled = [token_bytes(fast, token).decode() for token in ids]
    assert " </think>" in tokenizer.decode(ids)
    for decoding in (tokenizer, fast):  # `tokenizers` itself writes an added "é" as a broken byte
        text, starts, ends = token_spans(ids, text_decoder(decoding), {})
        assert text == "".join(spelled)
        assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == spelled


@EACH_MAKER
def test_roles_do_not_depend_on_how_a_tokenizer_prints(make):
    fast = with_tags(make(), TAGS)
    written = "<perception>a cat</perception><think>the cat sees</think><answer>3</answer>"
    ids = torch.tensor([fast.encode(written, add_special_tokens=False).ids])
    kinds, at = [], 0
    for token in ids[0].tolist():  # by hand: what stands between which tags
        tag = fast.id_to_token(token)
        at = {"<perception>": 1, "<think>": 2, "<answer>": 2}.get(tag, 0 if tag in TAGS else at)
        kinds.append(0 if tag in TAGS else at)
    read = [bool(token_bytes(fast, token).strip()) for token in ids[0].tolist()]
    for tokenizer in (fast, PythonTokenizer(fast), PythonTokenizer(fast, prepends=True)):
        found = segment_responses(ids, ids >= 0, tokenizer, eos_token_id=())
        assert found.broken.tolist() == [0]
        assert found.roles[0, read].tolist() == [kind for kind, is_read in zip(kinds, read, strict=True) if is_read]


def test_decoding_a_python_tokenizer_takes_no_slow_path():
    fast = with_tags(unigram(), TAGS)
    counting = Counting(PythonTokenizer(fast).decode)
    counting.get_added_vocab = PythonTokenizer(fast).get_added_vocab
    ids = fast.encode("<perception>the cat sees</perception>" * 400, add_special_tokens=False).ids
    token_spans(ids, text_decoder(counting), {})
    assert counting.tokens <= 3 * len(ids)


def test_added_tokens_that_spell_spaces_or_bytes_are_decoded():
    """Gemma's "▁▁", and bytes that a tokenizer lists among its added tokens."""
    tokenizer = with_tags(unigram(), ("▁▁", "<0x0A>", "<think>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ids = [tokenizer.token_to_id(token) for token in ("<think>", "▁▁", "a", "<0x0A>", "<think>")]
    assert text_decoder(tokenizer)(ids) == "<think>  a\n<think>"


def test_text_between_added_tokens_without_a_word_in_it_is_decoded_alone():
    fast = with_tags(unigram(), TAGS)
    for written in ("<think>><</think>", "<think></think>"):
        ids = fast.encode(written, add_special_tokens=False).ids
        assert text_decoder(fast)(ids).replace(" ", "") == written


def test_added_tokens_of_every_kind_of_tokenizer():
    fast = with_tags(byte_bpe(), ("<think>",))
    expected = {token: fast.token_to_id(token) for token in (EOS, "<|pad|>", "<think>")}

    class Encoder:
        added_tokens_encoder = expected

    class Processor:
        tokenizer = Encoder()

    class Stub:
        def get_added_vocab(self):
            raise NotImplementedError

    for tokenizer in (fast, PythonTokenizer(fast), Encoder(), Processor()):
        assert added_tokens(tokenizer) == expected
    assert added_tokens(Stub()) == added_tokens(Characters()) == {}
