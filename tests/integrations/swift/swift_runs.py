"""A tiny model, data and the command line ``swift rlhf --rlhf_type grpo``, offline and on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_vlm import FAMILIES, make_image, make_tokenizer

from srpo_core import system_prompt

HERE = Path(__file__).parent


def write_inputs(folder):
    """A LLaVA of 10^5 parameters, and two questions about two pictures."""
    tokenizer = make_tokenizer("<image>", ("<image>", "<s>", "</s>"))
    torch.manual_seed(0)
    model, processor = FAMILIES["llava"](tokenizer)
    processor.image_token = tokenizer.image_token = "<image>"
    processor.image_token_id = model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.config.image_token_index = model.config.image_token_id
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for number in range(2):
        make_image(number).save(folder / f"{number}.png")
        question = "Which?" if number else "Which of all of them?"  # prompts of different lengths
        messages = [{"role": "user", "content": f"<image>{system_prompt()}\n{question}"}]
        rows.append({"messages": messages, "images": [str(folder / f"{number}.png")]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(folder, output):
    values = {
        "rlhf_type": "grpo",
        "model": folder / "model",
        "model_type": "llava1_5_hf",
        "dataset": folder / "data.jsonl",
        "tuner_type": "full",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "torch_dtype": "float32",
        "attn_impl": "eager",
        "reward_funcs": "longer",
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 24,
        "max_length": 4096,
        "max_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "beta": 0.04,
        "num_iterations": 2,
        "use_vllm": "false",
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "split_dataset_ratio": 0,
        "gradient_checkpointing": "false",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "output_dir": output,
        "external_plugins": HERE / "own_plugin.py",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def run(folder, name, *more, module="srpo_swift", written=True, processes=1):
    """One command: its exit code, its log, the parameters after training and what the trainer logged."""
    results = folder / name
    results.mkdir()
    environment = os.environ | {
        "RESULTS": str(results),
        "WRITTEN_RESPONSES": str(int(written)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folder / "cache"),
        "MODELSCOPE_CACHE": str(folder / "cache"),
    }
    if processes > 1:
        environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": "29611"}
    command = [sys.executable, "-m", module, "rlhf", *flags(folder, results / "out"), *map(str, more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=results)
    log = done.stdout + done.stderr
    (results / "log.txt").write_text(log)
    if not (results / "parameters.pt").exists():
        return done.returncode, log, None, None
    logged = json.loads((results / "log.json").read_text())
    return done.returncode, log, torch.load(results / "parameters.pt"), logged
