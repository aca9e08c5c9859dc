"""A user's external plugin: responses that are written down, in the place of those of an untrained model; a reward.

Besides, it writes what the test compares: the parameters after training.
"""

import json
import os

import torch
from swift.rewards import ORM, orms
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

WRITTEN = (
    "<perception>red</perception><think>so 1</think><answer>1</answer>",
    "<perception>a blue one</perception><think>so 2</think><answer>2</answer>",
    "<perception>green</perception><think>hence 1</think><answer>1</answer>",
    "no format at all",
)


class Longer(ORM):
    def __call__(self, completions, **kwargs):
        return [float(len(text) % 7) for text in completions]


class Ones(ORM):
    def __call__(self, completions, **kwargs):
        return [float("<answer>1" in text) for text in completions]


orms |= {"longer": Longer, "ones": Ones}


def generate(self, samples):
    tokenizer = self.template.tokenizer
    for number, sample in enumerate(samples):
        text = WRITTEN[number % len(WRITTEN)]
        sample.messages = [message for message in sample.messages if message["role"] != "assistant"]
        sample.messages.append({"role": "assistant", "content": text})
        sample.response_token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        sample.finish_reason, sample.add_eos = "stop", False
    return samples


if os.environ.get("WRITTEN_RESPONSES") == "1":
    GRPOTrainer._generate_completions = generate

loss_and_metrics, seen = GRPOTrainer._compute_loss_and_metrics, []


def watched(self, model, model_inputs, grpo_batch):
    seen[:] = [model_inputs, grpo_batch]
    return loss_and_metrics(self, model, model_inputs, grpo_batch)


GRPOTrainer._compute_loss_and_metrics = watched


def gradients(self, place=None):
    """Of ms-swift's loss by the log-prob of each token, with the advantage at one place doubled."""
    model_inputs, batch = seen
    log_probs = batch.old_per_token_logps.clone().requires_grad_()
    self._get_per_token_logps_and_entropies = lambda *args, **kwargs: (log_probs, None)
    before = batch.advantages
    if place is not None:
        batch.advantages = before.clone()
        batch.advantages[place] *= 2
    loss_and_metrics(self, self.model, model_inputs, batch)[0].backward()
    batch.advantages = before
    del self._get_per_token_logps_and_entropies
    return log_probs.grad


train = GRPOTrainer.train


def train_and_save(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    parameters = {name: each.detach().clone() for name, each in self.model.named_parameters()}
    folder = os.environ["RESULTS"]
    if self.accelerator.is_main_process:
        place = tuple(seen[1].completion_mask.nonzero()[3].tolist())
        torch.save((place, gradients(self), gradients(self, place)), f"{folder}/gradients.pt")
        torch.save(parameters, f"{folder}/parameters.pt")
        with open(f"{folder}/log.json", "w") as file:
            json.dump(self.state.log_history, file)
    return result


GRPOTrainer.train = train_and_save
