"""What verl writes into ``trainer.rollout_data_dir``, as `srpo import` reads it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from srpo_core.rollouts import CorrectRule, import_logs, read_rollouts


@pytest.mark.parametrize("trainer", [RayPPOTrainer, PPOTrainer])
def test_generations_of_verl_are_imported_with_rewards_and_groups(tmp_path, trainer):
    for step in (1, 2, 10):
        host = SimpleNamespace(
            global_steps=step,
            _dump_executor=ThreadPoolExecutor(1),
            _dump_futures=[],
            _write_generations=trainer._write_generations,
        )
        trainer._dump_generations(
            host,
            inputs=["user\nq\nassistant\n"] * 4,
            outputs=["a", "b", "c", "猫"],
            gts=["3", "3", "4", "4"],
            scores=[1.0, 0.1, 0.1, 1.1],
            # Reward functions return NumPy's numbers, which verl writes as strings.
            reward_extra_infos_dict={
                "acc": [np.True_, np.False_, np.False_, np.True_],
                "uid": [f"p{row // 2}_{row % 2}_0" for row in range(4)],
            },
            dump_path=str(tmp_path / "rollouts"),
        )
        host._dump_executor.shutdown(wait=True)
    found = import_logs([tmp_path / "rollouts"], tmp_path / "r.jsonl", right=CorrectRule.read("acc"))
    assert set(found.tools.values()) == {"verl"}
    rollouts = list(read_rollouts(tmp_path / "r.jsonl"))
    assert [each.step for each in rollouts] == [1] * 4 + [2] * 4 + [10] * 4
    assert [each.group for each in rollouts] == [row // 2 for row in range(12)]
    assert [each.correct for each in rollouts[:4]] == [True, False, False, True]
    assert [each.reward for each in rollouts[:4]] == [1.0, 0.1, 0.1, 1.1]
    assert [each.text for each in rollouts[:4]] == ["a", "b", "c", "猫"]
    assert [each.reference for each in rollouts[:4]] == ["3", "3", "4", "4"]
