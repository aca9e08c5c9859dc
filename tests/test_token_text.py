"""Tokens to text: decoders that are told to leave it alone, and which characters of it each token holds."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_tokenizers import EOS, byte_bpe, token_bytes, unigram, with_tags

from srpo_core.token_text import TokenizerLike, text_decoder, token_spans

FAMILIES = pytest.mark.parametrize("tokenizer", [byte_bpe(), unigram()], ids=["byte-level BPE", "Unigram"])


class Characters:
    """Every character is a token."""

    def decode(self, ids):
        return "".join(map(chr, ids))


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


@pytest.mark.parametrize("make", [byte_bpe, unigram])
def test_each_distinct_token_is_decoded_once_and_not_each_prefix(make):
    class Counting:
        """Strips the first space of a text, as SentencePiece does, also where the tokenizer does not."""

        calls = 0

        def decode(self, ids):
            self.calls += 1
            text = make().decode(ids, skip_special_tokens=False)
            return text if make is unigram else text.removeprefix(" ")

    tokenizer, known = Counting(), {}
    ids = make().encode("<perception>" + "the cat 🧭 sees 猫" * 40 + "</perception>").ids
    for _ in range(2):
        token_spans(ids, tokenizer.decode, known)
    # Two calls a distinct token, a handful for each of two split characters, two for each response.
    assert tokenizer.calls <= 2 * len(set(ids)) + 2 * 8 + 2 * 2
    assert tokenizer.calls < len(ids) / 2


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
    assert text_decoder(Anything())(ids) == [("clean_up_tokenization_spaces", False), ("skip_special_tokens", False)]
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
