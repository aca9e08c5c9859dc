"""At strength 1 TRL's own loss gives the gradient of a token-weighted loss written by hand."""

import pytest
import torch
from training import make_trainer, rollout_batch, watching
from trl import GRPOTrainer

CLIP, BETA = 0.2, 0.04
VISION = ("pixel_values", "image_grid_thw", "mm_token_type_ids")


def hand_written_loss(model, batch, advantages, weights, loss_type, beta, options):
    """The published formulas: a per-token loss from the response's advantage, times the token's weight, averaged."""
    mask, response = batch["completion_mask"].float(), batch["completion_ids"]
    input_ids = torch.cat([batch["prompt_ids"], response], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    vision = {key: batch[key] for key in VISION if key in batch}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **vision).logits
    logits = logits[:, -response.shape[1] - 1 : -1].log_softmax(-1)
    log_probs = logits.gather(2, response[..., None])[..., 0]
    ratio = (log_probs - batch["old_per_token_logps"]).exp()
    advantage = advantages[:, None]
    if loss_type == "cispo":
        losses = -ratio.detach().clamp(max=options.epsilon_high) * advantage * log_probs
    elif loss_type == "sapo":
        temperature = torch.where(advantage > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        losses = -advantage * 4 / temperature * torch.sigmoid(temperature * (ratio - 1))
    else:
        losses = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    losses = weights * losses
    if beta:  # the penalty is not weighted
        log_ratio = batch["ref_per_token_logps"] - log_probs
        correction = ratio if options.use_bias_correction_kl else 1.0
        losses = losses + beta * correction * (log_ratio.exp() - log_ratio - 1)
    total, tokens, responses = (losses * mask).sum(), mask.sum(), len(mask)
    if loss_type in ("grpo", "sapo"):
        return ((losses * mask).sum(1) / mask.sum(1)).mean()
    if loss_type == "dr_grpo":
        return total / (responses * options.max_completion_length)
    return total / tokens


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(parts)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_strength_1_gradient_is_that_of_a_hand_written_weighted_loss(loss_type, beta):
    clip_high = 2.0 if loss_type == "cispo" else CLIP
    options = {"loss_type": loss_type, "beta": beta, "num_iterations": 2, "epsilon_high": clip_high}
    advantages = rollout_batch(make_trainer(GRPOTrainer, **options))["advantages"]  # the same rollouts, unweighted

    trainer = make_trainer(srpo_strength=1.0, **options)
    with watching() as made:
        batch = rollout_batch(trainer)
    weights = made[0].credit.weights
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():  # a second iteration: ratios off 1, some beyond the clip
        torch.manual_seed(1)
        for parameter in trainer.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))

    ours = gradient(trainer.model, trainer._compute_loss(trainer.model, batch))
    arguments = (loss_type, beta, trainer.args)
    expected = gradient(trainer.model, hand_written_loss(trainer.model, batch, advantages, weights, *arguments))
    unweighted = gradient(
        trainer.model, hand_written_loss(trainer.model, batch, advantages, torch.ones_like(weights), *arguments)
    )
    difference, control = ((other - expected).norm() / expected.norm() for other in (ours, unweighted))
    print(f"\n{loss_type} beta={beta}: relative difference {difference:.1e}, unweighted control {control:.0%}")
    assert difference <= 1e-5
    assert control > 0.1
