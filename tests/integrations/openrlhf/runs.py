"""Whole runs of OpenRLHF on a CPU, with Ray, DeepSpeed and a stand-in for vLLM: the stock command and SRPO's.

``python runs.py FOLDER`` writes tiny models and data into FOLDER, runs everything in RUNS and fails unless what the
adapter promises holds; with names of runs it runs only these and prints their metrics. A run takes one to three
minutes on two cores, the first several more: DeepSpeed compiles.
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
    "strength 0": (SRPO, ["--srpo.strength", "0", "--srpo.reliance_spans", "2"]),
    "strength 1": (SRPO, ["--srpo.strength", "1", "--srpo.corruption", "patch_mask"]),
    "reliance, ZeRO-2": (SRPO, ["--srpo.reliance_spans", "2", "--ds.zero_stage", "2"]),
    "reliance, ZeRO-2, dp 2": (
        SRPO,
        ["--srpo.reliance_spans", "2", "--ds.zero_stage", "2", "--actor.num_gpus_per_node", "2"],
    ),
    "strength 1, async": (SRPO, ["--srpo.strength", "1", "--train.async_enable"]),
    "text, packed": (SRPO, ["--srpo.counterfactual", "drop", "--ds.packing_samples"]),
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
    if name == "strength 1":
        extra = [*extra, "--srpo.rollouts", str(folder / "rollouts.jsonl")]
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
    """The metrics of both steps of one run, and its log."""
    begin = time.monotonic()
    code, log = start(folder, name, *RUNS[name])
    steps = [ast.literal_eval(step) for step in re.findall(r"Global step \d+: (\{.*\})", log)]
    print(f"{name}: {len(steps)} steps in {time.monotonic() - begin:.0f} s", flush=True)
    if code or len(steps) != 2:
        sys.exit(f"{name}: exit code {code}, {len(steps)} of 2 steps\n{log[-4000:]}")
    return steps, log


def start(folder: Path, name: str, module: str, extra: list[str]) -> tuple[int, str]:
    """Exit code and log of one command, in a Ray cluster of its own."""
    (folder / "ray").mkdir(exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(HERE / "cpu"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "RAY_DEDUP_LOGS": "0",
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Nothing has a GPU here: Ray only counts them.
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 8, "GPU": 4}',
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", module, *flags(folder, name, extra)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    log = done.stdout + done.stderr
    (folder / f"{re.sub(r'[^a-z0-9]+', '_', name)}.log").write_text(log)
    return done.returncode, log


def check(folder: Path) -> None:
    """Do all runs and compare them."""
    results = {name: run(folder, name) for name in RUNS}
    steps = {name: result[0] for name, result in results.items()}

    identical = ("policy_loss", "actor_grad_norm", "reward")
    for stock, ours in zip(steps["stock"], steps["strength 0"], strict=True):
        for metric in identical:
            held(f"strength 0: {metric}", ours[metric] == stock[metric], ours[metric], stock[metric])
    for stock, ours in zip(steps["stock"], steps["strength 1"], strict=True):
        held("strength 1 changes the gradient", ours["actor_grad_norm"] != stock["actor_grad_norm"])
    written = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    held("strength 1 writes both rollout batches", [line["step"] for line in written] == [0] * 8 + [1] * 8)
    held("and which responses were given another perception", all("swapped" in line for line in written))
    for number, step in enumerate(steps["strength 1"]):
        share = sum(line["advantage"] == 0 for line in written if line["step"] == number) / 8
        held("a logged metric is that of the batch", abs(step["srpo/advantage/zero"] - share) < 1e-6, share)
    one, two = (steps[name][0]["actor_grad_norm"] for name in ("reliance, ZeRO-2", "reliance, ZeRO-2, dp 2"))
    plain = steps["strength 1"][0]["actor_grad_norm"]
    held("reliance changes the gradient by more than 1e-3", abs(one - plain) > 1e-3 * plain, one, plain)
    held("dp 2 with ZeRO-2: grad norm within 1e-3", abs(two - one) < 1e-3 * one, two, one)

    for name, (module, _) in RUNS.items():
        for step in steps[name]:
            held(
                f"{name}: srpo metrics are logged if SRPO runs, and only then",
                ("srpo/weight/perception/mass" in step) == (module == SRPO),
            )
        imported = re.findall(r"ROLLOUT WORKER imported (\[.*\])", results[name][1])
        held(f"{name}: rollout workers import neither deepspeed nor srpo_core", imported == ["[]"], imported)
    for step in steps["text, packed"]:
        held("text: perceptions score 0", step["srpo/score/perception/mean"] == 0)
        held("text: reasoning scores do not", step["srpo/score/reasoning/mean"] != 0)

    code, log = start(folder, "refused", SRPO, ["--actor.policy_loss_type", "gspo"])
    sentence = "--actor.policy_loss_type gspo: with one ratio for the whole response"
    held("gspo is refused before any model is made", code != 0 and sentence in log and "PolicyModelActor" not in log)


def held(claim: str, holds: bool, *values: object) -> None:
    print(f"  {'held' if holds else 'BROKEN'}: {claim} {' '.join(map(str, values))}", flush=True)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(HERE / "cpu"))
    write_inputs(folder)
    for name in sys.argv[2:]:
        for step in run(folder, name)[0]:
            print(json.dumps(step, indent=1))
    if not sys.argv[2:]:
        check(folder)
