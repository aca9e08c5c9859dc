"""What tokens are beyond their text: which of them end a response, and which are nothing but whitespace."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from srpo_core.token_text import added_tokens, text_decoder

__all__ = ["ENDS_OF_TURN", "blank_tokens", "ending_ids"]

#: Tokens that end a turn of a conversation, where a tokenizer has them among its added tokens.
ENDS_OF_TURN = (
    *("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<|return|>", "<|endoftext|>"),
    *("<|end_of_text|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|endofturn|>", "[|endofturn|]"),
    *("<end_of_utterance>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eos|>"),
)


def ending_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Token ids that end a response, in ascending order.

    These are the tokenizer's end of sequence, the ids of the generation config, which inference engines obey, and the
    tokens that end a turn of a conversation in the chat templates of known models, if the tokenizer has them as added
    tokens, such as Gemma's ``<end_of_turn>`` beside its ``<eos>``.

    Args:
        tokenizer: A tokenizer of ``transformers`` or ``tokenizers``, or a processor that has one.
        generation_config: An object or a mapping with an ``eos_token_id``, which is one id or several. None: not known.

    Raises:
        ValueError: If there is no such id at all.

    Example:
        >>> class Known:
        ...     def __init__(self, ids): self.eos_token_id = ids
        >>> ending_ids(Known(7), Known([9, 7, 3]))
        (3, 7, 9)
    """
    added = added_tokens(tokenizer)
    found = {added[name] for name in ENDS_OF_TURN if name in added}
    for source in (tokenizer, getattr(tokenizer, "tokenizer", None), generation_config):
        for name in ("eos_token_id", "eot_token_id"):
            ids: Any = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            ids = ids.tolist() if isinstance(ids, Tensor) else ids
            found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    if isinstance(end_of_turn := getattr(tokenizer, "eot_token", None), str) and end_of_turn in added:
        found.add(added[end_of_turn])
    if not found:
        raise ValueError("neither the tokenizer nor the generation config has an eos_token_id: pass the ids yourself")
    return tuple(sorted(found))


def blank_tokens(tokenizer: Any) -> Bool[Tensor, " vocabulary"]:
    r"""Whether each token of a tokenizer is nothing but whitespace, for :func:`segment_roles`.

    Every token is decoded once. A whitespace character outside of ASCII that takes several tokens is not found.

    Args:
        tokenizer: A tokenizer of ``transformers`` or ``tokenizers``, with ``decode`` and with ``len`` or
            ``get_vocab_size``.

    Example:
        >>> class Letters:
        ...     def __len__(self): return 4
        ...     def decode(self, ids): return "".join("a b "[token] for token in ids)
        >>> blank_tokens(Letters())
        tensor([False,  True, False,  True])
    """
    size = tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else len(tokenizer)
    decode = text_decoder(tokenizer)
    return torch.tensor([not decode([token]).strip() for token in range(size)], dtype=torch.bool)
