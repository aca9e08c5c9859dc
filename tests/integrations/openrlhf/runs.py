"""Whole runs of OpenRLHF on a CPU, with Ray, DeepSpeed and a stand-in for vLLM: the stock command and SRPO's.

``python runs.py FOLDER`` writes tiny models and data into FOLDER, runs everything in RUNS, prints a table and fails
unless what the adapter promises holds. One run takes one to three minutes, the first several more: DeepSpeed compiles.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
STOCK, SRPO = "openrlhf.cli.train_ppo_ray", "srpo_openrlhf"
PROMPTS = 4

#: name -> module and flags besides those of `flags`.
RUNS = {
    "stock": (STOCK, []),
    "strength 0": (SRPO, ["--srpo.strength", "0"]),
    "strength 1": (SRPO, ["--srpo.strength", "1", "--srpo.corruption", "patch_mask"]),
    "strength 1, ZeRO-2": (SRPO, ["--srpo.strength", "1", "--ds.zero_stage", "2"]),
    "strength 1, ZeRO-2, dp 2": (
        SRPO,
        ["--srpo.strength", "1", "--ds.zero_stage", "2", "--actor.num_gpus_per_node", "2"],
    ),
    "strength 1, async": (SRPO, ["--srpo.strength", "1", "--train.async_enable"]),
    "text, packed": (
        SRPO,
        ["--srpo.counterfactual", "drop", "--ds.packing_samples", "--ds.attn_implementation", "cpu_flash_attention"],
    ),
}


def flags(folder: Path, name: str, extra: list[str]) -> list[str]:
    """The command line of one run: two steps of two prompts with four responses each."""
    is_text = name.startswith("text")
    checkpoint = folder / "checkpoints" / re.sub(r"\W+", "_", name)
    values = {
        "actor.model_name_or_path": folder / ("text" if is_text else "vision"),
        "data.prompt_dataset": folder / ("text.json" if is_text else "vision.json"),
        "data.input_key": "input",
        "data.label_key": "label",
        "data.max_images_per_prompt": 0 if is_text else 1,
        "data.max_len": 384,
        "rollout.max_new_tokens": 120,
        "rollout.batch_size": 2,
        "rollout.n_samples_per_prompt": 4,
        "rollout.micro_batch_size": 4,
        "train.batch_size": 8,
        "train.micro_batch_size": 4,
        "train.num_episodes": 1,
        "reward.remote_url": folder / "reward.py",
        "algo.advantage.estimator": "group_norm",
        "algo.kl.init_coef": 0,
        "actor.num_gpus_per_node": 1,
        "actor.adam.lr": 1e-3,
        "actor.loss_agg_mode": "token-mean",
        "ds.zero_stage": 0,
        "ds.attn_implementation": "sdpa",
        "vllm.num_engines": 1,
        "vllm.sync_backend": "gloo",
        "ckpt.output_dir": checkpoint,
        "ckpt.path": checkpoint,
    }
    line = [part for flag, value in values.items() for part in (f"--{flag}", str(value))]
    return [*line, "--data.apply_chat_template", *extra]


def write_inputs(folder: Path) -> None:
    import numpy as np
    from PIL import Image
    from tiny_models import write_text_model, write_vision_model

    folder.mkdir(parents=True, exist_ok=True)
    write_vision_model(folder / "vision")
    write_text_model(folder / "text")
    draw = random.Random(0)
    for kind in ("vision", "text"):
        rows = []
        for index in range(PROMPTS):
            row = {"input": f"What is number {index}?", "label": str(draw.randint(0, 1))}
            if kind == "vision":
                row = {"input": "<image>" + row["input"], "label": row["label"], "images": [f"{folder}/{index}.png"]}
                pixels = np.random.default_rng(index).integers(0, 256, (56, 84, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
            rows.append(row)
        (folder / f"{kind}.json").write_text(json.dumps(rows))
    (folder / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n"
        "    reward = float(sum(map(ord, queries[0])) % 2)\n"
        "    return {'rewards': reward, 'scores': reward}\n"
    )


def run(folder: Path, name: str) -> tuple[list[dict[str, float]], str]:
    """The metrics of each step of one run, and its log."""
    module, extra = RUNS[name]
    environment = os.environ | {
        "PYTHONPATH": str(HERE / "cpu"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "RAY_DEDUP_LOGS": "0",
        "RAY_TMPDIR": str(folder / "ray"),
        # Nothing has a GPU here: Ray only counts them.
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 8, "GPU": 4}',
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    (folder / "ray").mkdir(exist_ok=True)
    command = [sys.executable, "-m", module, *flags(folder, name, extra)]
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    log = done.stdout + done.stderr
    (folder / f"{re.sub(r'[^a-z0-9]+', '_', name)}.log").write_text(log)
    steps = [ast.literal_eval(step) for step in re.findall(r"Global step \d+: (\{.*\})", log)]
    print(f"{name}: {len(steps)} steps in {time.monotonic() - begin:.0f} s", flush=True)
    if done.returncode or len(steps) != 2:
        sys.exit(f"{name}: exit code {done.returncode}, {len(steps)} of 2 steps\n{log[-4000:]}")
    return steps, log


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(HERE / "cpu"))
    write_inputs(folder)
    for name in sys.argv[2:] or RUNS:
        steps, log = run(folder, name)
        for step in steps:
            print(json.dumps(step, indent=1))
