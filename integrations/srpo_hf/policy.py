"""A model of transformers -> the log-probs of chosen tokens, with or without gradient, and no logits of the others."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from srpo_core import OutputLayer, fused_linear_log_probs, modes, token_log_probs
from srpo_core.pixel_values import image_token_id_of
from srpo_hf.prompts import EncodedPrompt

__all__ = ["Policy", "Task", "evaluating", "same_layout"]


class Task(NamedTuple):
    """One response to be scored after one prompt.

    Attributes:
        row: Of the batch.
        prompt: What it follows, by its place in a list of prompts.
        token_ids: [time], without padding; on the CPU, as `needed`.
        needed: [time], True at the tokens whose log-prob is wanted.
        columns: Where these log-probs go in the row, [needed].
    """

    row: int
    prompt: int
    token_ids: Tensor
    needed: Tensor
    columns: Tensor

    @property
    def inputs(self) -> int:
        """How many tokens of the response the model has to read: all in front of the last one that is needed."""
        return int(self.needed.nonzero().max()) if bool(self.needed.any()) else 0


class Policy:
    """A model, its output layer, and how both are called. Made anew for each call of the scorer, because models move.

    Args:
        model: As the trainer holds it.
        temperature: Divides the logits.
        pad_token_id: Fills rows up.
        trains: Whether gradients are wanted. Without them a model is called inside its DDP, which would have every
            process make as many passes.

    Attributes:
        model: What is called. Of a compiled model, what was compiled.
        inner: The model of transformers inside.
        config: Of the inner model.
        text_config: Of its language model.
        takes: The names of the arguments of its forward.
        device: Where token ids go.
    """

    def __init__(self, model: nn.Module, *, temperature: float, pad_token_id: int, trains: bool = False):
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        if isinstance(self.model, nn.parallel.DistributedDataParallel) and not trains:
            self.model = self.model.module
        self.inner: Any = _unwrapped(self.model)
        self.config: Any = self.inner.config
        has_parts = hasattr(self.config, "get_text_config")
        self.text_config: Any = self.config.get_text_config() if has_parts else self.config
        self.takes = _arguments_of(type(self.inner))
        self.head: nn.Module = self.inner.get_output_embeddings()
        if self.head is None:
            raise ValueError(
                f"{type(self.inner).__name__} has no output layer: load it with AutoModelForImageTextToText"
            )
        self.temperature, self.pad_token_id = temperature, pad_token_id
        embeddings = self.inner.get_input_embeddings()
        self.device: torch.device = embeddings.weight.device
        if self.device.type == "meta":  # offloaded by accelerate, which brings the weights to where it computes
            self.device = torch.device(embeddings._hf_hook.execution_device)
        self.no_output: str | None = None
        self.output: OutputLayer | None = None
        try:
            self.output = OutputLayer.of(self.inner, temperature=temperature)
        except ValueError as error:  # LoRA on it, quantized, sharded, ...: the model makes its own logits
            self.no_output = str(error)

    def hidden(self, inputs: Mapping[str, Any], where: Tensor) -> Tensor:
        """The last hidden states at the chosen places, [chosen, hidden_dim].

        Args:
            inputs: Arguments of the model.
            where: [batch, time], True at the chosen places.
        """
        found: list[Tensor] = []

        def take(hidden: Tensor) -> Tensor:
            found.append(hidden[where.to(hidden.device)])
            return hidden[:, :1]  # what the model goes on to make logits of

        with self._before_head(take):
            self._call(inputs)
        return found[0]

    def log_probs(self, inputs: Mapping[str, Any], where: Tensor, targets: Tensor) -> Tensor:
        """The log-probs of tokens, nats, [chosen].

        Args:
            inputs: Arguments of the model.
            where: [batch, time], True at the places whose next token is scored.
            targets: These next tokens, [chosen].
        """
        if self.output is not None:
            return self.log_probs_of(self.hidden(inputs, where), targets)
        # The model's own output layer, with whatever wraps, scales and caps its logits, at the chosen places alone.
        with self._before_head(lambda hidden: hidden[where.to(hidden.device)][None]):
            made = self._call(inputs)
        logits = made.logits if hasattr(made, "logits") else made[0]
        return token_log_probs(logits, targets[None].to(logits.device), temperature=self.temperature)[0]

    def log_probs_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The log-probs of tokens, nats, [chosen], from the hidden states that predict them, [chosen, hidden_dim]."""
        output = self.output_for(hidden)
        hidden = hidden.to(output.weight.device)
        targets = targets[None].to(hidden.device)
        real = torch.ones_like(targets, dtype=torch.bool)
        return fused_linear_log_probs(hidden[None], output, targets, real, active_tokens=targets.numel())[0]

    def output_for(self, hidden: Tensor) -> OutputLayer:
        """The output layer, in the dtype of the hidden states: under autocast they differ."""
        if self.output is None:
            raise ValueError(self.no_output)
        if self.output.weight.dtype == hidden.dtype:
            return self.output
        bias = None if self.output.bias is None else self.output.bias.to(hidden.dtype)
        return replace(self.output, weight=self.output.weight.to(hidden.dtype), bias=bias)

    def plain(self, prompts: Sequence[EncodedPrompt], tasks: Sequence[Task]) -> tuple[list[Tensor], int]:
        """The log-probs of the needed tokens of each task, [needed], and how many tokens the model read.

        Args:
            prompts: Where tasks find theirs.
            tasks: Of one layout, see :func:`same_layout`.
        """
        inputs, where = self._plain_inputs(prompts, tasks)
        targets = torch.cat([task.token_ids[task.needed] for task in tasks]).to(self.device)
        log_probs = self.log_probs(inputs, where, targets)
        read = sum(len(prompts[task.prompt].token_ids) + task.inputs for task in tasks)
        return list(log_probs.split([int(task.needed.sum()) for task in tasks])), read

    def plain_hidden(self, prompts: Sequence[EncodedPrompt], tasks: Sequence[Task]) -> Tensor:
        """The hidden states that predict the needed tokens, [needed of all tasks, hidden_dim], as :meth:`plain`."""
        return self.hidden(*self._plain_inputs(prompts, tasks))

    def _plain_inputs(self, prompts: Sequence[EncodedPrompt], tasks: Sequence[Task]) -> tuple[dict[str, Any], Tensor]:
        own = [prompts[task.prompt] for task in tasks]
        inputs = self.sequences(own, [task.token_ids[: task.inputs] for task in tasks])
        where = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        for row, (prompt, task) in enumerate(zip(own, tasks, strict=True)):
            first = len(prompt.token_ids) - 1  # this token predicts the response's first
            where[row, first : first + task.inputs + 1] = task.needed[: task.inputs + 1]
        return inputs, where

    def sequences(self, prompts: Sequence[EncodedPrompt], responses: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of a plain pass over prompts and responses, padded at the end: no position depends on padding."""
        placeholder = image_token_id_of(self.config)
        if placeholder is not None and any(bool((tail == placeholder).any()) for tail in responses):
            raise ValueError(
                f"token_ids holds the image placeholder {placeholder} inside a response, for which there is no image: "
                "keep the policy from sampling it (bad_words_ids of generate, or logit_bias of the engine)"
            )
        token_ids = [torch.cat([each.token_ids, tail.to(each.token_ids)]) for each, tail in _pairs(prompts, responses)]
        masks = [torch.ones_like(each) for each in token_ids]
        inputs: dict[str, Any] = {
            "input_ids": self._padded(token_ids, self.pad_token_id),
            "attention_mask": self._padded(masks, 0),
            "use_cache": False,
        }
        for name in prompts[0].token_types:
            types = [
                torch.cat([each.token_types[name], torch.zeros_like(tail).to(each.token_types[name])])
                for each, tail in _pairs(prompts, responses)
            ]
            inputs[name] = self._padded(types, 0)
        return inputs | self.vision(prompts)

    def vision(self, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """What the model sees of prompts of one layout, in their order."""
        together = {name: [each.vision[name] for each in prompts] for name in prompts[0].vision}
        return {name: torch.cat(values).to(self.device) for name, values in together.items()}

    def _padded(self, rows: Sequence[Tensor], fill: int) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=fill).to(self.device)

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**inputs)

    @contextmanager
    def _before_head(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        handle = self.head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
        try:
            yield
        finally:
            handle.remove()


def same_layout(tasks: Sequence[Task], prompts: Sequence[EncodedPrompt]) -> list[list[Task]]:
    """The tasks whose prompts' images can go into one pass, together: those without images, and each shape of tiles."""
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        prompt = prompts[task.prompt]
        shapes = sorted((name, tuple(value.shape[1:]), value.dtype) for name, value in prompt.vision.items())
        groups.setdefault((*shapes, *sorted(prompt.token_types)), []).append(task)
    return list(groups.values())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradient; afterwards each is back in its mode, and M-RoPE in its state."""
    offsets = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    try:
        with modes.evaluating(model), torch.no_grad():
            yield
    finally:
        for module, value in offsets:
            module.rope_deltas = value


@cache
def _arguments_of(kind: type[nn.Module]) -> frozenset[str]:
    """The names of the arguments of a model's forward. A subclass may pass on what it does not name."""
    forwards = [each.forward for each in kind.__mro__ if "forward" in vars(each)]
    return frozenset(name for each in forwards for name in inspect.signature(each).parameters)


def _pairs(prompts: Sequence[EncodedPrompt], responses: Sequence[Tensor]) -> Iterator[tuple[EncodedPrompt, Tensor]]:
    return zip(prompts, responses, strict=True)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers in DDP, DeepSpeed, torch.compile and PEFT."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and callable(base := getattr(model, "get_base_model", None)):
            inner = base()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
