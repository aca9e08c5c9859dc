"""What is found in a model is what makes its logits; a layer whose weight is not all there is is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import close
from torch import nn

from srpo_core import OutputLayer, fused_linear_log_probs, token_log_probs

VOCAB, HIDDEN = 11, 4


class Causal(nn.Module):
    """Like a language model of transformers, from its last hidden states on."""

    def __init__(self, *, bias=False, **config):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=bias)
        self.config = SimpleNamespace(**config)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, hidden):
        return self.lm_head(hidden)


class Cohere(Causal):
    def forward(self, hidden):
        return self.lm_head(hidden) * self.config.logit_scale


class Granite(Causal):
    def forward(self, hidden):
        return self.lm_head(hidden) / self.config.logits_scaling


class HyperClovaX(Causal):
    def forward(self, hidden):
        return self.lm_head(hidden) * self.config.logits_scaling


class FalconH1(Causal):
    def forward(self, hidden):
        return self.lm_head(hidden) * self.config.lm_head_multiplier


class Gemma(Causal):
    def forward(self, hidden):
        logits = self.lm_head(hidden)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits


class RecurrentGemma(Causal):
    def forward(self, hidden):
        cap = self.config.logits_soft_cap
        return cap * torch.tanh(self.lm_head(hidden) / cap)


class PaliGemma(Causal):
    def forward(self, hidden):
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return cap * torch.tanh(self.lm_head(hidden) / cap)


class Muse(Causal):
    def forward(self, hidden):
        text = self.config.text_config
        logits = self.lm_head(hidden) * text.output_multiplier
        return text.final_logit_softcapping * torch.tanh(logits / text.final_logit_softcapping)


class InternVL(nn.Module):
    """The layer, and what its config says, are inside the language model."""

    def __init__(self):
        super().__init__()
        self.language_model = Cohere(logit_scale=0.25)
        self.config = SimpleNamespace(logit_scale=3.0)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def forward(self, hidden):
        return self.language_model(hidden)


MODELS = {
    "plain": lambda: Causal(),
    "bias": lambda: Causal(bias=True),
    "Cohere": lambda: Cohere(logit_scale=0.0625),
    "Granite": lambda: Granite(logits_scaling=8.0, bias=True),
    "HyperCLOVA X": lambda: HyperClovaX(logits_scaling=8.0, model_type="hyperclovax"),
    "Falcon-H1": lambda: FalconH1(lm_head_multiplier=0.5),
    "Gemma": lambda: Gemma(final_logit_softcapping=2.0),
    "Gemma without": lambda: Gemma(final_logit_softcapping=None),
    "RecurrentGemma": lambda: RecurrentGemma(logits_soft_cap=2),
    "PaliGemma": lambda: PaliGemma(text_config=SimpleNamespace(final_logit_softcapping=2.0)),
    "text config wins": lambda: PaliGemma(
        final_logit_softcapping=5.0, text_config=SimpleNamespace(final_logit_softcapping=2.0)
    ),
    "Muse": lambda: Muse(text_config=SimpleNamespace(final_logit_softcapping=2.0, output_multiplier=0.5)),
    "InternVL": InternVL,
}


def of_logits(output, hidden, ids):
    return fused_linear_log_probs(hidden, output, ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("name", MODELS)
def test_of_a_model_makes_the_log_probs_of_its_logits(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    hidden, ids = torch.randn(2, 5, HIDDEN, dtype=torch.float64), torch.randint(VOCAB, (2, 5))
    expected = token_log_probs(model(hidden), ids, temperature=0.7)
    close(of_logits(OutputLayer.of(model, temperature=0.7), hidden, ids), expected)


def test_of_a_model_holds_the_very_parameters():
    model = Gemma(final_logit_softcapping=2.0, bias=True)
    output = OutputLayer.of(model)
    assert output.weight is model.lm_head.weight
    assert output.bias is model.lm_head.bias
    assert output.temperature == 1.0
    of_logits(output, torch.randn(1, 3, HIDDEN), torch.tensor([[1, 2, 3]])).sum().backward()
    assert (model.lm_head.weight.grad != 0).any()
    assert (model.lm_head.bias.grad != 0).any()


def test_of_a_model_with_tied_embeddings():
    model = Causal()
    model.lm_head.weight = model.embed_tokens.weight
    assert OutputLayer.of(model).weight is model.embed_tokens.weight


def test_of_a_model_that_only_has_an_lm_head():
    model = nn.Module()
    model.lm_head = nn.Linear(HIDDEN, VOCAB)
    assert OutputLayer.of(model).weight is model.lm_head.weight
    model = Causal()
    model.get_output_embeddings = lambda: None
    assert OutputLayer.of(model).weight is model.lm_head.weight


def test_of_a_wrapped_model_looks_inside():
    model = Cohere(logit_scale=0.5)
    distributed = nn.Module()
    distributed.module = model
    compiled = torch.compile(distributed)
    assert compiled._orig_mod is distributed
    for wrapped in (distributed, torch.compile(model), compiled):
        output = OutputLayer.of(wrapped, temperature=0.7)
        assert output.weight is model.lm_head.weight
        assert (output.logit_scale, output.temperature) == (0.5, 0.7)


# What is refused


def with_layer(layer):
    model = Causal()
    model.lm_head = layer
    return model


def with_weight(weight):
    layer = nn.Linear(HIDDEN, VOCAB, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return with_layer(layer)


def lora():
    """As peft wraps a layer."""
    layer = nn.Module()
    layer.base_layer = nn.Linear(HIDDEN, VOCAB)
    layer.weight = layer.base_layer.weight
    layer.lora_A, layer.lora_B = nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, VOCAB, bias=False)
    return with_layer(layer)


def lora_inside():
    """As loralib does, by inheritance."""
    layer = nn.Linear(HIDDEN, VOCAB)
    layer.lora_A = nn.Parameter(torch.randn(2, HIDDEN))
    return with_layer(layer)


def modules_to_save():
    layer = nn.Module()
    layer.original_module = nn.Linear(HIDDEN, VOCAB)
    layer.modules_to_save = nn.ModuleDict({"default": nn.Linear(HIDDEN, VOCAB)})
    layer.weight = layer.modules_to_save["default"].weight
    return with_layer(layer)


def parametrized():
    return with_layer(nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, VOCAB)))


def distributed_tensor():
    model = Causal()
    model.lm_head.weight.full_tensor = lambda: model.lm_head.weight
    return model


class Quantized(torch.Tensor):
    """As torchao does: a subclass that says it is bfloat16."""


class NormHead(nn.Linear):
    """As Baichuan 2 does: a linear layer of another weight than the one it holds."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


BATCHED = torch.zeros(2, VOCAB, HIDDEN)
REFUSED = {
    "no output layer": (nn.Module, "Module has neither get_output_embeddings.* nor lm_head: pass OutputLayer"),
    "no weight": (lambda: with_layer(nn.Identity()), "Identity without a weight: pass OutputLayer"),
    "LoRA": (lora, "adds to or replaces its base weight: leave the output layer out .* or merge the adapter"),
    "LoRA inside": (lora_inside, "torch.nn.modules.linear.Linear, which adds to or replaces its base weight"),
    "modules_to_save": (modules_to_save, "adds to or replaces its base weight"),
    "parametrized": (parametrized, "ParametrizedLinear, which adds to or replaces its base weight"),
    "DTensor": (distributed_tensor, r"is sharded \(a DTensor\): pass OutputLayer\(layer.weight.full_tensor\(\)"),
    "ZeRO-3": (lambda: with_weight(torch.empty(0)), r"has shape \(0,\): it is sharded .* Gather it first"),
    "FSDP": (lambda: with_weight(torch.zeros(9)), r"has shape \(9,\): it is sharded or flattened .* Gather it first"),
    "three axes": (lambda: with_weight(BATCHED), r"has shape \(2, 11, 4\)"),
    "offloaded": (lambda: Causal().to("meta"), "on the meta device: it is offloaded.* Keep the output layer on its"),
    "int8": (lambda: with_weight(BATCHED[0].to(torch.int8)), "torch.int8: it is quantized. Take the loss from logits"),
    "float8": (lambda: with_weight(BATCHED[0].to(torch.float8_e4m3fn)), "torch.float8_e4m3fn: it is quantized"),
    "subclass": (
        lambda: with_weight(BATCHED[0].bfloat16().as_subclass(Quantized)),
        "a Quantized of torch.bfloat16: it is quantized",
    ),
    "own forward": (lambda: with_layer(NormHead(HIDDEN, VOCAB)), "NormHead, whose forward is its own"),
    "scale ignored": (
        lambda: Causal(text_config=SimpleNamespace(logit_scale=0.25)),
        r"config has logit_scale, but Causal.forward does not seem to apply it: compare .* pass OutputLayer\(weight",
    ),
    "cap ignored": (
        lambda: Cohere(logit_scale=0.25, final_logit_softcapping=30.0),
        "config has final_logit_softcapping, but Cohere.forward does not seem to apply it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_of_a_model_refuses_what_it_would_read_wrong(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        OutputLayer.of(make())


@pytest.mark.parametrize("name", ["LoRA", "modules_to_save", "DTensor", "int8"])
def test_a_refusal_holds_in_wrappers_too(name):
    wrapped = nn.Module()
    wrapped.module = REFUSED[name][0]()
    with pytest.raises(ValueError, match="the output layer"):
        OutputLayer.of(torch.compile(wrapped))


def test_neutral_numbers_of_a_config_are_no_reason_to_refuse():
    output = OutputLayer.of(Causal(logit_scale=1.0, final_logit_softcapping=None, logits_scaling=1, logits_soft_cap=0))
    assert (output.logit_scale, output.logit_softcap) == (1.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3)}, r"weight must have 2 axes, vocab and hidden_dim, got shape \(3,\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(3,\) like the weight's vocabulary, got \(4,\)"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"logit_scale": -1.0}, "logit_scale must be above 0, got -1.0"),
        ({"logit_softcap": 0.0}, "logit_softcap must be above 0, got 0.0"),
    ],
)
def test_output_layer_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        OutputLayer(**({"weight": torch.zeros(3, 2)} | change))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OutputLayer(torch.zeros(3, 2)), **change)


def test_an_output_layer_is_fixed_and_is_compared_by_identity():
    """Its tensors have no truth value, so a comparison by value would be an error."""
    output = OutputLayer(torch.zeros(3, 2))
    assert output == output
    assert output != OutputLayer(output.weight)
    assert len({output, output}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.temperature = 2.0
