"""Prompts and responses whose keys and values are computed once and attended by every sequence that begins with them.

Exact, because with causal attention keys and values depend on nothing that follows. The attention, the masks and the
cache are transformers' own; only where a cache layer takes the shared part from is said here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer

from srpo_core.pixel_values import image_token_id_of
from srpo_hf.policy import Policy, Task
from srpo_hf.prompts import EncodedPrompt

__all__ = [
    "Prefix", "Store", "continued", "encoded", "longest_common_prefix", "merged", "problem_of_model",
    "problem_of_prompt",
]  # fmt: skip

KeysValues = tuple[Tensor, Tensor]

#: Kinds of layer whose keys and values are all that later tokens depend on, whatever the length.
_EXACT = ("full_attention", "sliding_attention")


class Prefix(NamedTuple):
    """A prompt but for its last token, which every response reads first, so that it predicts the response's first.

    Attributes:
        layers: Of each layer the keys and values, [1, heads, length, head_dim].
        length: Tokens.
        position: Of the next token.
        axes: Of the positions: 3 for M-RoPE, 1 otherwise.
        last: The last token of the prompt, [1].
    """

    layers: list[KeysValues]
    length: int
    position: int
    axes: int
    last: Tensor


class Store(NamedTuple):
    """What was computed of responses in one context.

    Attributes:
        layers: Of each layer the keys and values after the prefix, [rows, heads, time, head_dim].
        token_ids: What was read, the prompt's last token included, [rows, time].
        lengths: Of each row, without padding.
    """

    layers: list[KeysValues]
    token_ids: Tensor
    lengths: Tensor


class _Layer(DynamicLayer):
    """A cache layer whose first part is shared by rows and stored once; what is added is not kept but handed out."""

    def __init__(self, prefix: KeysValues, store: KeysValues | None, rows: Tensor, reused: int, keeps: bool):
        super().__init__()
        self.is_initialized = True
        self.dtype, self.device = prefix[0].dtype, prefix[0].device
        self.keys, self.values = prefix
        self._store, self._rows, self._reused, self._keeps = store, rows, reused, keeps
        self.added: KeysValues | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        if self._keeps:
            self.added = (key_states, value_states)
        return self._joined(0, key_states), self._joined(1, value_states)

    def _joined(self, which: int, new: Tensor) -> Tensor:
        parts = [(self.keys, self.values)[which].expand(len(new), -1, -1, -1)]
        if self._store is not None and self._reused:
            own = self._store[which]
            parts.append(own[self._rows.to(own.device), :, : self._reused])
        return torch.cat([*parts, new], dim=-2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.keys.shape[-2] + self._reused


def problem_of_model(policy: Policy) -> str | None:
    """Why shared prefixes would not be exact with a model, or None."""
    kinds = set(getattr(policy.text_config, "layer_types", None) or []) - set(_EXACT)
    if kinds:
        return f"it has layers of {', '.join(sorted(map(str, kinds)))}, which keep a state instead of keys and values"
    if getattr(policy.inner, "_is_stateful", False):
        return "it keeps a state instead of keys and values"
    if getattr(policy.config, "is_encoder_decoder", False):
        return "it has an encoder beside the decoder"
    if _cache_name(policy) is None:
        return "its forward takes no cache"
    if _is_sharded(policy.model):
        return "its weights are sharded over processes, which then have to make equally many passes"
    return None


def problem_of_prompt(policy: Policy, prompt: EncodedPrompt) -> str | None:
    """Why the last token of a prompt cannot be read apart from the others, or None."""
    if len(prompt.token_ids) < 2:
        return "a prompt of one token has no prefix"
    if prompt.token_ids[-1] == image_token_id_of(policy.config):
        return "a prompt ends in an image, whose tokens may attend to each other"
    return None


def encoded(policy: Policy, prompt: EncodedPrompt) -> Prefix | None:
    """The keys and values of a prompt, alone and without padding; None if the model keeps something else."""
    cache, offsets = DynamicCache(), _offsets(policy)
    for module in offsets:
        module.rope_deltas = None
    inputs: dict[str, Any] = {"input_ids": prompt.token_ids[None, :-1].to(policy.device)}
    inputs |= {name: types[None, :-1].to(policy.device) for name, types in prompt.token_types.items()}
    inputs |= policy.vision([prompt]) | {str(_cache_name(policy)): cache, "use_cache": True}
    length = len(prompt.token_ids) - 1
    policy.hidden(inputs, torch.zeros(1, length, dtype=torch.bool))
    kept = [type(layer) is DynamicLayer and layer.get_seq_length() == length for layer in cache.layers]
    if not kept or not all(kept):
        return None
    deltas = [module.rope_deltas for module in offsets if module.rope_deltas is not None]
    delta = int(deltas[0].flatten()[0]) if deltas else 0
    layers: list[KeysValues] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc]
    return Prefix(layers, length, length + delta, 3 if offsets else 1, prompt.token_ids[-1:])


def continued(
    policy: Policy,
    prefix: Prefix,
    tasks: Sequence[Task],
    *,
    store: Store | None = None,
    keeps: bool = False,
    own_positions: bool = False,
) -> tuple[list[Tensor], Store | None, int]:
    """The log-probs of the needed tokens of responses to one prompt, in one pass over what was not computed before.

    Args:
        policy: The model.
        prefix: Of the prompt, in the view that the tasks are scored in.
        tasks: Each with at least one needed token.
        store: What was computed of other responses in the same context: each response begins where it departs from the
            stored one that it follows longest, or where its first needed token is predicted.
        keeps: Whether to return what was computed, to be such a store.
        own_positions: Let the model count positions itself: to find out whether it counts as is done here.

    Returns:
        Of each task its log-probs, [needed], then the store, and how many tokens the model read.
    """
    read = [torch.cat([prefix.last.cpu(), task.token_ids[: task.inputs]]) for task in tasks]
    sources, reused = torch.zeros(len(tasks), dtype=torch.long), torch.zeros(len(tasks), dtype=torch.long)
    if store is not None:
        for place, (task, tokens) in enumerate(zip(tasks, read, strict=True)):
            common = longest_common_prefix(tokens, store.token_ids, store.lengths)
            sources[place] = common.argmax()
            reused[place] = torch.minimum(common.max(), task.needed.nonzero().min())
    if _has_window(policy):  # a gap would take up room in the window
        reused[:] = reused.min()
    new = [tokens[start:] for tokens, start in zip(read, reused.tolist(), strict=True)]
    token_ids = pad_sequence(new, batch_first=True, padding_value=policy.pad_token_id)
    lengths = torch.tensor([len(each) for each in new])
    time, most = torch.arange(token_ids.shape[1]), int(reused.max())

    cache = DynamicCache()
    layers = [
        _Layer(own, None if store is None else store.layers[layer], sources, most, keeps)
        for layer, own in enumerate(prefix.layers)
    ]
    cache.layers = list(layers)
    inputs: dict[str, Any] = {"input_ids": token_ids.to(policy.device), str(_cache_name(policy)): cache}
    inputs["use_cache"] = True
    if not own_positions:
        positions = (prefix.position + reused[:, None] + time).to(policy.device)
        inputs["position_ids"] = positions.expand(3, -1, -1) if prefix.axes == 3 else positions
    if bool((reused < most).any()):
        # Between what a row reuses and what it adds there is a gap. Where there is none causality does it all:
        # padding comes last, and nothing real attends to it.
        seen = [torch.ones(len(tasks), prefix.length), torch.arange(most) < reused[:, None], time < lengths[:, None]]
        inputs["attention_mask"] = torch.cat([part.long() for part in seen], dim=1).to(policy.device)

    where = torch.zeros(token_ids.shape, dtype=torch.bool)
    for place, (task, start) in enumerate(zip(tasks, reused.tolist(), strict=True)):
        needed = task.needed[start : task.inputs + 1]
        where[place, : len(needed)] = needed
    targets = torch.cat([task.token_ids[task.needed] for task in tasks]).to(policy.device)
    log_probs = policy.log_probs(inputs, where, targets)
    made = None
    if keeps:
        made = Store([layer.added for layer in layers if layer.added is not None], token_ids, lengths)
    counts = [int(task.needed.sum()) for task in tasks]
    return list(log_probs.split(counts)), made, int(lengths.sum())


def merged(stores: Sequence[Store]) -> Store | None:
    """Several stores of one prefix as one; None of none."""
    if len(stores) < 2:
        return stores[0] if stores else None
    width = max(store.token_ids.shape[1] for store in stores)

    def together(layer: int, which: int) -> Tensor:
        parts = [store.layers[layer][which] for store in stores]
        return torch.cat([nn.functional.pad(part, (0, 0, 0, width - part.shape[-2])) for part in parts])

    return Store(
        [(together(layer, 0), together(layer, 1)) for layer in range(len(stores[0].layers))],
        torch.cat([nn.functional.pad(store.token_ids, (0, width - store.token_ids.shape[1])) for store in stores]),
        torch.cat([store.lengths for store in stores]),
    )


def longest_common_prefix(tokens: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    """With how many tokens of each row a sequence begins, [rows].

    Args:
        tokens: [time].
        rows: [rows, time], padded at the end.
        lengths: Of each row without padding, [rows].

    Example:
        >>> from srpo_hf.prefixes import longest_common_prefix
        >>> rows = torch.tensor([[5, 6, 7], [5, 8, 0]])
        >>> longest_common_prefix(torch.tensor([5, 6, 9]), rows, torch.tensor([3, 2]))
        tensor([2, 1])
    """
    width = min(len(tokens), rows.shape[1])
    equal = (rows[:, :width] == tokens[:width]) & (torch.arange(width) < lengths[:, None])
    return equal.long().cumprod(1).sum(1)


def _cache_name(policy: Policy) -> str | None:
    """Under which name a forward takes its cache, or None: transformers renamed the argument after 5.19."""
    return next((name for name in ("cache", "past_key_values") if name in policy.takes), None)


def _has_window(policy: Policy) -> bool:
    return isinstance(getattr(policy.text_config, "sliding_window", None), int)


def _offsets(policy: Policy) -> list[Any]:
    """Where M-RoPE keeps how far positions lag behind the number of tokens, because an image takes fewer of them."""
    return [module for module in policy.inner.modules() if hasattr(module, "rope_deltas")]


def _is_sharded(model: nn.Module) -> bool:
    """Whether a pass of one process waits for the others: FSDP, FSDP2 and tensor parallelism, DeepSpeed ZeRO-3."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
