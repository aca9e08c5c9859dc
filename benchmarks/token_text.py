"""What it costs to find the characters of each token, whatever the tokens.

    PYTHONPATH=tests python benchmarks/token_text.py

A policy early in training, or at a high temperature, samples parts of characters. The rows are 1k to 64k tokens of
them, and of plain text; the columns are seconds, microseconds a token, tokens decoded for each token, and the time as a
multiple of what ``tokenizers`` takes to encode the decoded text again with offsets. Encoding again is no way out: it
finds other tokens than those sampled, so that its offsets are of the wrong tokens ("same tokens" says where).
"""

import argparse
import time

from tiny_tokenizers import byte_bpe, token_bytes, unigram  # pyright: ignore[reportMissingImports]

from srpo_core.token_text import text_decoder, token_spans

SIZES = tuple(2**power * 1000 for power in range(7))
PATTERNS = {
    "half emojis": (b"\xf0", b"\x9f"),
    "lone continuation bytes": (b"\x9f",),
    "emojis in bytes": (b"\xf0", b"\x9f", b"\x98", b"\x80"),
    "half emoji, byte of its own": (b"\xf0", b"\x9f", b"\n"),
    "half emoji, word": (b"\xf0", b"\x9f", b"a"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="tokens")
    options = parser.parse_args()
    print(f"{'':46}{'tokens':>8}{'seconds':>10}{'us/token':>10}{'decoded':>9}{'/encode':>9}  same tokens")
    for name, tokenizer in (("byte-level BPE", byte_bpe()), ("byte fallback", unigram())):
        spelled = {token_bytes(tokenizer, token): token for token in reversed(range(tokenizer.get_vocab_size()))}
        cases = {case: [spelled[piece] for piece in pieces] for case, pieces in PATTERNS.items()}
        newline = tokenizer.token_to_id("<0x0A>")
        if newline is not None:
            cases["half emoji, byte of its own"][-1] = newline
        cases["text"] = tokenizer.encode("the cat sees 3 cats so the mat", add_special_tokens=False).ids
        decode, decoded = text_decoder(tokenizer), 0

        def counted(ids: list[int], decode=decode) -> str:
            nonlocal decoded
            decoded += len(ids)
            return decode(ids)

        for case, pattern in cases.items():
            for size in options.sizes:
                ids = [pattern[at % len(pattern)] for at in range(size)]
                decoded = 0
                text, _, _ = token_spans(ids, counted, {})
                seconds = min(measured(lambda ids=ids, decode=decode: token_spans(ids, decode, {})) for _ in range(3))
                again = min(measured(lambda text=text, of=tokenizer: of.encode(text).offsets) for _ in range(3))
                same = tokenizer.encode(text, add_special_tokens=False).ids == ids
                print(
                    f"{name + ', ' + case:46}{size:>8}{seconds:>10.3f}{seconds / size * 1e6:>10.2f}"
                    f"{decoded / size:>9.1f}{seconds / again:>9.2f}  {'yes' if same else 'no'}"
                )


def measured(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
