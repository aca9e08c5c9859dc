"""Runs under torchrun, or alone as one process, and saves what the ranks must agree on. See test_trl_distributed.py."""

import sys
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from training import make_dataset, make_trainer, watching

ROWS = 8
SCENARIOS = {
    "groups_on_one_rank": {"num_generations": 4},
    "groups_over_both_ranks": {"num_generations": 8, "srpo_scale": "batch_rms"},
    "two_micro_batches": {"num_generations": 4, "gradient_accumulation_steps": 2, "srpo_scale": "ema_rms"},
    "reliance": {"num_generations": 8, "srpo_reliance_spans": 3},
}


def main(folder: str, processes: int) -> None:
    torch.set_num_threads(1)
    for name, options in SCENARIOS.items():
        accumulation = options.get("gradient_accumulation_steps", 1)
        trainer = make_trainer(
            per_device_train_batch_size=ROWS // processes // accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=1e9,
            shuffle_dataset=False,
            **options,
        )
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        with watching() as made:
            trainer.train()
        if trainer.accelerator.is_main_process:
            result = {
                "weights": made[0].credit.weights,
                "advantages": made[0].credit.advantages,
                "gradient": [b - after for b, after in zip(before, trainer.model.parameters(), strict=True)],
                "metrics": {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("srpo/")},
            }
            torch.save(result, f"{folder}/{name}.{processes}.pt")
    if processes > 1:  # one rank has images, the other none
        rows = make_dataset(2).to_list()
        rows[1]["images"] = []
        message = {"role": Value("string"), "content": Value("string")}
        mixed = Dataset.from_list(rows, features=Features({"prompt": List(message), "images": List(Image())}))
        trainer = make_trainer(dataset=mixed, per_device_train_batch_size=4, max_steps=1, shuffle_dataset=False)
        try:
            trainer.train()
        except ValueError as error:
            Path(folder, f"mixed.{trainer.accelerator.process_index}.txt").write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
