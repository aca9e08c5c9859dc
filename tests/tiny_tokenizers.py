"""Tokenizers small enough to train in a test, whose tokens cross tags and characters as those of real models do.

Not called ``tokenizers.py``: pytest puts this folder on the path, and the name would hide the library.
"""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

EOS = "<|end|>"
PADDING = "<|pad|>"

_WORDS = ["cat", " sees", " 3", " mat", "the", " the", "perception", "think", "answer", "</", ".</", "boxed", " so"]
_CORPUS = [word for word in _WORDS for _ in range(20)] + ["猫"]
# What occurs most is merged first: the edges of tags, and a space with the first half of whichever emoji follows it.
_CROSSING = [piece for piece in ("><", ">\n", ">3") for _ in range(90)]
_CROSSING += [f" {emoji}" for emoji in "😀😂🐱🚀🥨🧭🌵🎈" for _ in range(15)]


@cache
def byte_bpe() -> Tokenizer:
    """Byte-level BPE like Qwen's, whose merges cross tag boundaries: ``><``, ``>\\n``, ``>3``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS + _CROSSING, trainer)
    tokenizer.add_special_tokens([EOS, PADDING])
    return tokenizer


@cache
def unigram() -> Tokenizer:
    """Unigram with metaspaces and byte fallback, like SentencePiece: strips the first space, spells emoji in bytes."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_CORPUS, trainers.UnigramTrainer(vocab_size=60, show_progress=False))
    scores = {piece: -10.0 for piece in "<>/\n.3{}\\▁abcdehikmnoprstwxy"} | {"><": -3.0, ">3": -3.0, ">\n": -3.0}
    scores |= {piece: -5.0 for piece in trained.get_vocab() if "猫" not in piece}
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *scores.items()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([EOS, PADDING])
    return tokenizer


@cache
def wordpiece() -> Tokenizer:
    """WordPiece like BERT's, which writes a space before each word."""
    words = ["[UNK]", "the", "cat", "see", "##s", "3", ".", *map(chr, range(ord("a"), ord("z") + 1))]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens([EOS, PADDING])
    return tokenizer


class PythonTokenizer:
    """Decodes as the Python tokenizers of transformers 4 do, around the decoder of another tokenizer.

    ``PreTrainedTokenizer._decode`` in ``tokenization_utils.py`` of transformers 4.57: each run of tokens between added
    tokens is decoded alone, the parts are joined with spaces, and spaces before punctuation are removed, all of it
    unless told otherwise. A special token that the class knows by name stays in its run. ``prepends`` is what the
    slow LlamaTokenizer does: a space before an added token in spite of everything.
    """

    def __init__(self, tokenizer: Tokenizer, *, prepends: bool = False) -> None:
        self._tokenizer, self._prepends = tokenizer, prepends
        self.eos_token_id = tokenizer.token_to_id(EOS)

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items()}

    def decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs):
        return self._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)

    def _decode(self, ids, skip_special_tokens, clean_up, spaces_between_special_tokens=True, **ignored):
        parts, run = [], []
        added = self._tokenizer.get_added_tokens_decoder()
        for token in [*ids, None]:
            if token is not None and token not in added:
                run.append(token)
                continue
            if run:
                parts.append(self._tokenizer.decode(run))
            run = []
            if token is not None and not (skip_special_tokens and added[token].special):
                parts.append(" " * self._prepends + added[token].content)
        text = (" " if spaces_between_special_tokens else "").join(parts)
        if clean_up is not False:
            for mark in (" .", " ?", " !", " ,"):
                text = text.replace(mark, mark[1:])
        return text


def with_tags(tokenizer: Tokenizer, tags: tuple[str, ...], *, special: bool = False) -> Tokenizer:
    """The same with every tag a token of its own."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in tags])
    return tokenizer


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token spells, read off the vocabulary instead of decoded."""
    piece = tokenizer.id_to_token(token)
    if token in tokenizer.get_added_tokens_decoder():
        return piece.encode()
    if isinstance(tokenizer.model, models.BPE):
        return bytes(_BYTE_OF[character] for character in piece)
    if isinstance(tokenizer.model, models.WordPiece):
        return piece.removeprefix("##").encode() if piece.startswith("##") else f" {piece}".encode()
    if piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a printable byte is itself, the n-th other one is character 256 + n."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
