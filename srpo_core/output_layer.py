"""One object for what turns hidden states into logits: weight, bias, temperature, caps and scales, shard."""

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["OutputLayer", "VocabReduce", "VocabShard"]

VocabReduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]


class VocabShard(NamedTuple):
    """One process's part of a vocabulary that is sharded over processes.

    Attributes:
        offset: The first token of this part.
        reduce: ``(tensor, "max" or "sum") -> tensor``, the elementwise maximum or sum over all parts. It is called in
            the same order on each, with small tensors and with the gradient of the hidden states.
    """

    offset: int
    reduce: VocabReduce


@dataclass(frozen=True, eq=False)
class OutputLayer:
    r"""The layer that turns hidden states into logits, for all fused functions.

    .. math:: z = \operatorname{cap}(\gamma (W h + b)) / T, \qquad \operatorname{cap}(x) = c \tanh(x / c)

    Attributes:
        weight: :math:`W`, [vocab, hidden_dim], in the dtype of the hidden states. It may be tied to the embedding. If
            FSDP2 has sharded it, gather it first: ``weight.full_tensor()``.
        bias: :math:`b`, [vocab], or None.
        temperature: :math:`T`, the temperature with which the rollout was sampled, above 0.
        logit_softcap: :math:`c`, above 0 (Gemma's ``final_logit_softcapping``), or None.
        logit_scale: :math:`\gamma`, above 0 (Cohere's ``logit_scale``, or 1 over Granite's ``logits_scaling``).
        shard: This process's part of a vocabulary that is sharded over processes; None: `weight` is whole.

    Raises:
        ValueError: If a number is out of range, or the bias does not fit the weight.

    Example:
        >>> OutputLayer(torch.zeros(5, 2), logit_softcap=-1.0)
        Traceback (most recent call last):
            ...
        ValueError: logit_softcap must be above 0, got -1.0
    """

    weight: Tensor
    _: KW_ONLY
    bias: Tensor | None = None
    temperature: float = 1.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight must have 2 axes, vocab and hidden_dim, got shape {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias must have shape {tuple(self.weight.shape[:1])} like the weight's vocabulary, got "
                f"{tuple(self.bias.shape)}"
            )
        for name, value in (("temperature", self.temperature), ("logit_scale", self.logit_scale)):
            if not value > 0.0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.logit_softcap is not None and not self.logit_softcap > 0.0:
            raise ValueError(f"logit_softcap must be above 0, got {self.logit_softcap}")

    @staticmethod
    def of(model: nn.Module, *, temperature: float = 1.0) -> "OutputLayer":
        """The output layer of a model of transformers, or of a similar one, with what its config says about logits.

        It is found by ``get_output_embeddings()``, else as ``lm_head``. The scale and the soft-cap of the logits are
        read from the config, or the text config, of the module that holds the layer. Make a new object after the model
        was wrapped, moved or loaded, because the object holds the parameters themselves.

        Args:
            model: The model; it may be wrapped in DDP, or compiled.
            temperature: The temperature with which the rollout was sampled.

        Raises:
            ValueError: If the model has no output layer, or one that is not a plain linear layer with a whole weight:
                one that is wrapped by LoRA, quantized, sharded or offloaded. A wrapped layer is refused because its
                base weight alone gives other logits. Also if the config has a scale or a soft-cap that the model's code
                does not mention, because some vision-language models ignore what the config of their language model
                says.

        Example:
            >>> model = torch.nn.Module()
            >>> model.lm_head = torch.nn.Linear(2, 5, bias=False)
            >>> OutputLayer.of(model, temperature=0.7).weight is model.lm_head.weight
            True
        """
        while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
            model = inner
        layer = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None  # type: ignore[operator]
        layer = getattr(model, "lm_head", None) if layer is None else layer
        if layer is None:
            raise ValueError(
                f"{type(model).__name__} has neither get_output_embeddings() nor lm_head: pass OutputLayer(weight, ...)"
            )
        weight, bias = _plain_parameters(layer)
        holders = (each for each in model.modules() if any(child is layer for child in each.children()))
        scale, softcap = _scale_and_softcap(next(holders, model))
        return OutputLayer(weight, bias=bias, temperature=temperature, logit_softcap=softcap, logit_scale=scale)


def _plain_parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if any(
        hasattr(layer, name)
        for name in ("base_layer", "lora_A", "modules_to_save", "original_module", "parametrizations")
    ):
        raise ValueError(
            f"the output layer is a {kind}, which adds to or replaces its base weight: leave the output layer out of "
            "the adapter's target modules, or merge the adapter first, or take the loss from logits"
        )
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"the output layer is a {kind} without a weight: pass OutputLayer(weight, ...)")
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "the weight of the output layer is sharded (a DTensor): pass OutputLayer(layer.weight.full_tensor(), ...), "
            "or keep the output layer out of the sharding"
        )
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"the weight of the output layer has shape {tuple(weight.shape)}: it is sharded or flattened (ZeRO-3, "
            "FSDP). Gather it first, and pass OutputLayer(weight, ...)"
        )
    if weight.is_meta:
        raise ValueError(
            "the weight of the output layer is on the meta device: it is offloaded, or not loaded yet. Keep the output "
            "layer on its device"
        )
    # A quantized weight may also be a subclass of Tensor that claims to be bfloat16.
    if weight.dtype not in _DTYPES or type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"the weight of the output layer is a {type(weight).__name__} of {weight.dtype}: it is quantized. Take the "
            "loss from logits, or leave the output layer out of the quantization"
        )
    if type(layer).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output layer is a {kind}, whose forward is its own: take the loss from logits, or, if it does what "
            "torch.nn.Linear does, pass OutputLayer(weight, ...)"
        )
    return weight, bias


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Under which names configs hold a scale of the logits: it multiplies them, or it divides them.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
#: Families in which the name of a divisor means a factor.
_INVERTED = ("hyperclovax",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def _scale_and_softcap(model: nn.Module) -> tuple[float, float | None]:
    """What a model does to its logits. What a text config says wins over what stands around it."""
    config = getattr(model, "config", None)
    scale, softcap, sources = 1.0, None, {}
    for part in (config, getattr(config, "text_config", None)):
        inverted = str(getattr(part, "model_type", "")).startswith(_INVERTED)
        for name in (*_FACTORS, *_DIVISORS, *_SOFTCAPS):
            value = getattr(part, name, None)
            if not isinstance(value, int | float):
                continue
            if name in _SOFTCAPS:
                softcap, sources["softcap"] = float(value) or None, name
            else:
                multiplies = name in _FACTORS or inverted
                scale, sources["scale"] = float(value) if multiplies else 1.0 / float(value), name
    changed = [sources[which] for which, value in (("scale", scale != 1.0), ("softcap", softcap)) if value]
    if unnamed := [name for name in changed if not _names(model, name)]:
        raise ValueError(
            f"the config has {' and '.join(unnamed)}, but {type(model).__name__}.forward does not seem to apply it: "
            "compare the model's logits with those of its output layer, and pass OutputLayer(weight, logit_scale=..., "
            "logit_softcap=...) with what you find"
        )
    return scale, softcap


def _names(model: nn.Module, name: str) -> bool:
    """Whether the code of a model's forward has a name in it: the config alone does not say what is done with it."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    words = {*code.co_names, *(word for word in code.co_consts if isinstance(word, str))} if code else set()
    if name in _SOFTCAPS:
        return any("softcap" in word or "soft_cap" in word for word in words)
    return name in words
