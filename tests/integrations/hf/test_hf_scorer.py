"""The scorer around the views: gradients, output layers, what wraps a model, and what scoring leaves behind."""

import copy
import random

import pytest
import torch
from srpo_hf import Scorer
from test_hf_views import TOLERANCE, as_promised, assert_close, case, model_of, one_or_two_or_none, plainly
from tiny_models import make_model, make_rollouts, one_by_one

from srpo_core import fused_linear_grpo_loss, grpo_loss


def arguments(rollouts):
    return rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned


def by_hand(model, processor, rollouts):
    """Log-probs of all responses with their gradient, one forward each."""
    made = torch.zeros(rollouts.batch.token_ids.shape, dtype=torch.float64)
    rows = []
    for row, (chat, images) in enumerate(zip(rollouts.prompts, rollouts.images, strict=True)):
        response = rollouts.batch.token_ids[row][rollouts.batch.mask[row]].tolist()
        found = one_by_one(model, processor, chat, images, response)
        rows.append(torch.nn.functional.pad(found, (0, made.shape[1] - len(found))))
    return torch.stack(rows)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm", "internvl"])
def test_log_probs_have_the_gradient_of_a_hand_written_forward(family):
    model, processor = make_model(family)
    rollouts = make_rollouts(processor, groups=3, size=2, images=one_or_two_or_none)
    scale = torch.randn(rollouts.batch.token_ids.shape, generator=torch.Generator().manual_seed(0))
    scorer = Scorer(model, processor, rollouts.options)
    found = scorer.log_probs(rollouts.prompts, rollouts.images, rollouts.batch.token_ids, rollouts.batch.mask)
    expected = by_hand(model, processor, rollouts)
    assert (found - expected).abs().max() <= TOLERANCE
    assert not found[~rollouts.batch.mask].any()
    ours, theirs = gradients(model, (scale * found).sum()), gradients(model, (scale * expected).sum())
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6), name


def test_hidden_states_and_output_layer_give_the_loss_and_gradient_of_logits():
    model, processor = make_model("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=3, size=2, images=one_or_two_or_none)
    batch = rollouts.batch
    advantages = torch.randn(batch.token_ids.shape, generator=torch.Generator().manual_seed(0))
    old = by_hand(model, processor, rollouts).detach().float() + 0.1 * advantages
    scorer = Scorer(model, processor, rollouts.options)
    hidden, output = scorer.hidden(rollouts.prompts, rollouts.images, batch.token_ids, batch.mask)
    assert hidden.shape == (*batch.token_ids.shape, 32)
    assert output.weight is model.lm_head.weight
    fused = fused_linear_grpo_loss(hidden, output, batch.token_ids, advantages, batch.mask, old_log_probs=old).loss
    by_logits = grpo_loss(by_hand(model, processor, rollouts).float(), advantages, batch.mask, old_log_probs=old).loss
    assert abs(fused - by_logits) < 1e-6
    ours, theirs = gradients(model, fused), gradients(model, by_logits)
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-6), name


def test_the_temperature_divides_the_logits():
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    warm = copy.deepcopy(model)
    warm.lm_head.weight.data /= 0.5
    for share in (True, False):
        found = Scorer(model, processor, rollouts.options, temperature=0.5, share_prefixes=share).score(
            *arguments(rollouts)
        )
        expected = Scorer(warm, processor, rollouts.options, share_prefixes=False).score(*arguments(rollouts))
        assert_close(found.log_probs, expected.log_probs)


# Output layers that are more than one product


def with_lora(model, *targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.3))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "lm_head")], ids=["layers", "head"])
def test_lora_is_scored_and_trained_on_the_output_layer_too(targets):
    bare, processor = make_model("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=2, size=2)
    without = plainly(bare, processor, rollouts)
    model = with_lora(bare, *targets)
    expected = as_promised(plainly(model, processor, rollouts), rollouts)
    assert (expected["original"] - without["original"]).abs().max() > 0.1
    model.train()  # as a trainer has it: dropout of the adapter is then off while scoring
    for share in (True, False):
        scorer = Scorer(model, processor, rollouts.options, share_prefixes=share)
        assert_close(scorer.score(*arguments(rollouts)).log_probs, expected)
    model.eval()
    inputs = (rollouts.prompts, rollouts.images, rollouts.batch.token_ids, rollouts.batch.mask)
    found = scorer.log_probs(*inputs)
    ours = gradients(model, found.sum())
    theirs = gradients(model, by_hand(model, processor, rollouts).sum())
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6), name
    if "lm_head" in targets:
        with pytest.raises(ValueError, match=r"leave the output layer out of .* Scorer.log_probs works with any"):
            scorer.hidden(*inputs)
    else:
        assert scorer.hidden(*inputs)[1].weight is bare.lm_head.weight


@pytest.mark.parametrize("applies", [True, False])
def test_a_softcap_is_applied_where_the_model_applies_it(applies):
    """Gemma3's own class ignores ``final_logit_softcapping``; one that does not is scored with it."""
    bare, processor = make_model("gemma3")
    kind = type(bare)

    class Capped(kind):
        def forward(self, *args, **kwargs):
            made = super().forward(*args, **kwargs)
            softcap = self.config.text_config.final_logit_softcapping
            made.logits = softcap * torch.tanh(made.logits / softcap)
            return made

    bare.config.text_config.final_logit_softcapping = 2.0
    if applies:
        bare.__class__ = Capped
    rollouts = make_rollouts(processor, groups=2)
    expected = as_promised(plainly(bare, processor, rollouts), rollouts)
    for share in (True, False):
        scorer = Scorer(bare, processor, rollouts.options, share_prefixes=share)
        assert (scorer._policy().output is not None) == applies
        assert_close(scorer.score(*arguments(rollouts)).log_probs, expected)
    bare.__class__ = kind
    other = plainly(bare, processor, rollouts)["original"]
    assert ((expected["original"] - other).abs().max() > 0.1) == applies


# What scoring leaves behind


def test_modes_random_state_gradients_and_mrope_state_are_as_before():
    model, processor = make_model("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=3, images=one_or_two_or_none)
    expected = as_promised(plainly(model, processor, rollouts), rollouts)
    model.train()
    model.model.visual.eval()
    model.gradient_checkpointing_enable()
    for module in model.modules():  # dropout where there is some to be had
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.model.rope_deltas = marker = torch.tensor([[5]])
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    states = torch.get_rng_state(), random.getstate()
    for share in (True, False):
        scored = Scorer(model, processor, rollouts.options, share_prefixes=share).score(*arguments(rollouts))
        assert_close(scored.log_probs, expected)
        assert not any(values.requires_grad for values in scored.log_probs.values())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.model.rope_deltas is marker
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_are_restored_after_an_error():
    model, processor = make_model("llava")
    rollouts = make_rollouts(processor, groups=1)
    model.train()
    model.model.language_model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Scorer(model, processor, rollouts.options).score(*arguments(rollouts))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert not model.lm_head._forward_pre_hooks


def test_gradient_checkpointing_gives_the_same_gradient():
    model, processor = make_model("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=2, size=2)
    inputs = (rollouts.prompts, rollouts.images, rollouts.batch.token_ids, rollouts.batch.mask)
    scorer = Scorer(model, processor, rollouts.options)
    expected = gradients(model, scorer.log_probs(*inputs).sum())
    model.train()
    model.gradient_checkpointing_enable()
    found = gradients(model, scorer.log_probs(*inputs).sum())
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-5) for name in expected)


def test_a_compiled_model_is_scored_as_what_was_compiled():
    (model, processor), (rollouts, full) = model_of("llava"), case("llava")
    scored = Scorer(torch.compile(model), processor, rollouts.options).score(*arguments(rollouts))
    assert_close(scored.log_probs, as_promised(full, rollouts))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_in_ddp_scores_are_made_inside_and_gradients_through_it(one_process):
    """DDP broadcasts buffers in each forward, so processes that make other numbers of passes would wait forever."""
    model, processor = make_model("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=2, size=2)
    inputs = (rollouts.prompts, rollouts.images, rollouts.batch.token_ids, rollouts.batch.mask)
    bare = Scorer(model, processor, rollouts.options)
    expected, theirs = bare.score(*arguments(rollouts)), gradients(model, bare.log_probs(*inputs).sum())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    calls = []
    wrapped.register_forward_pre_hook(lambda module, args: calls.append(1))
    scorer = Scorer(wrapped, processor, rollouts.options)
    assert_close(scorer.score(*arguments(rollouts)).log_probs, expected.log_probs)
    assert not calls
    ours = gradients(model, scorer.log_probs(*inputs).sum())
    assert calls
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)


def test_a_model_that_accelerate_offloads_is_scored():
    from accelerate import cpu_offload

    model, processor = make_model("llava")
    rollouts = make_rollouts(processor, groups=2)
    expected = Scorer(model, processor, rollouts.options).score(*arguments(rollouts))
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight.is_meta
    found = Scorer(offloaded, processor, rollouts.options).score(*arguments(rollouts))
    assert_close(found.log_probs, expected.log_probs)
