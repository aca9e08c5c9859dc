"""A whole GRPO trainer with SRPO's token credit for a vision-language model of Hugging Face, to be read and changed.

    python docs/examples/own_trainer_hf.py --model Qwen/Qwen2.5-VL-3B-Instruct --data problems.jsonl

Each line of the data is a problem, such as {"image": "1.png", "question": "How many?", "answer": "3"}; the path of the
image starts from the folder of the data. With `--strength 0` training is plain GRPO, bit for bit.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from srpo_hf import Scorer
from transformers import AutoModelForImageTextToText, AutoProcessor

import srpo_core
from srpo_core.batch import ending_ids, record
from srpo_core.rollouts import RolloutWriter
from srpo_core.watch import RunWatch, batch_in_words


def read_problems(path: Path) -> list[dict[str, Any]]:
    """The problems of a file, each with the path of its image, a question and an answer."""
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [problem | {"image": path.parent / problem["image"]} for problem in problems]


def prompt_of(question: str, processor: Any, options: srpo_core.SRPOConfig) -> str:
    """A prompt as text: it asks for the format, shows the image and asks the question."""
    system = {"type": "text", "text": srpo_core.system_prompt(options.tags)}
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "system", "content": [system]}, {"role": "user", "content": asked}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def generate(
    model: Any, processor: Any, prompts: list[str], images: list[Any], ending: tuple[int, ...], args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled token ids, and a mask that is True up to the token that ends the response, both [batch, time]."""
    inputs = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
    # A checkpoint's own settings would sample from another distribution than the one that is trained.
    plain = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    sampling = {"do_sample": True, "temperature": args.temperature, "max_new_tokens": args.max_tokens} | plain
    sequences = model.eval().generate(**inputs.to(model.device), **sampling)
    token_ids = sequences[:, inputs["input_ids"].shape[1] :]
    ends = torch.isin(token_ids, torch.tensor(ending, device=token_ids.device)).long()
    return token_ids, ends.cumsum(1) - ends == 0


def train(
    model: Any,
    processor: Any,
    problems: list[dict[str, Any]],
    options: srpo_core.SRPOConfig,
    args: argparse.Namespace,
) -> Iterator[float]:
    """Train the model; yields the loss of each rollout batch after its optimizer step."""
    tokenizer, draw = processor.tokenizer, random.Random(args.seed)
    ending = ending_ids(tokenizer, model.generation_config)
    scorer = Scorer(model, processor, options, temperature=args.temperature, batch_size=args.micro_batch)
    watch = RunWatch(options, tokenizer)
    writer = RolloutWriter(args.rollouts, tokenizer=tokenizer, tags=options.tags, eos_token_id=ending)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)

    for step in range(args.steps):
        # A group of responses to each problem, their rewards, and the advantage of each response.
        asked = [problem for problem in draw.sample(problems, args.prompts) for _ in range(args.group)]
        prompts = [prompt_of(problem["question"], processor, options) for problem in asked]
        images = [[Image.open(problem["image"]).convert("RGB")] for problem in asked]
        group_ids = torch.arange(args.prompts, device=model.device).repeat_interleave(args.group)
        token_ids, mask = generate(model, processor, prompts, images, ending, args)
        texts = [tokenizer.decode(row[real]) for row, real in zip(token_ids, mask, strict=True)]
        found = [srpo_core.extract_answer(text.removesuffix(tokenizer.eos_token), options.tags) for text in texts]
        right = [answer == str(problem["answer"]) for answer, problem in zip(found, asked, strict=True)]
        correct = torch.tensor(right, device=model.device)
        advantages = srpo_core.group_advantages(
            correct.float(), group_ids, normalization=options.normalization, lengths=mask.sum(1)
        )

        # The log-probs of the responses in every view, and the credit of each token.
        batch = srpo_core.RolloutBatch.of(
            token_ids, mask, tokenizer, options, group_ids=group_ids, prompt_ends=prompts, ending=ending
        )
        planned = srpo_core.plan(batch, options, has_images=True, pad_token_id=tokenizer.pad_token_id)
        scored = scorer.score(prompts, images, batch, planned, step=step)
        watch.look(batch, prompts=prompts, image_counts=scored.image_counts)
        old, counts = scored.log_probs["original"], scored.image_counts
        known = {"old_log_probs": old, "advantages": advantages, "image_counts": counts, "correct": correct}
        credited = srpo_core.credit(batch, planned, scored.log_probs, options, step=step, **known)

        # One optimizer step. The sum of the losses is divided by the tokens of all micro-batches together.
        model.train()
        total, tokens = 0.0, mask.sum().float()
        for rows in torch.arange(len(asked)).split(args.micro_batch):
            seen = [prompts[row] for row in rows], [images[row] for row in rows]
            hidden, output = scorer.hidden(*seen, token_ids[rows], mask[rows])
            of_rows = token_ids[rows], credited.advantages[rows], mask[rows]
            loss, _ = srpo_core.fused_linear_grpo_loss(
                hidden, output, *of_rows, options, old_log_probs=old[rows], normalizer=tokens
            )
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()

        words = batch_in_words(batch, credited, advantages=advantages, step=step)
        print(f"{words}; loss {total:.4f}, gradient norm {norm:.2f}", flush=True)
        about = {"rewards": correct.float(), "prompts": prompts, "images": [each["image"].resolve() for each in asked]}
        writer.write(**record(batch, credited, advantages=advantages, correct=correct), **about, step=step)
        yield total


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder, or a name on the model hub")
    parser.add_argument("--data", type=Path, required=True, help="a JSON Lines file of problems")
    parser.add_argument("--rollouts", type=Path, default=Path("rollouts.jsonl"), help="the file for `srpo report`")
    for name, default in {"steps": 100, "prompts": 8, "group": 8, "micro-batch": 4, "max-tokens": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    for name, default in {"lr": 1e-6, "clip": 1.0, "temperature": 1.0, "strength": 1.0}.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"default {default}")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    # In bfloat16 steps of this size would be rounded away.
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = srpo_core.SRPOConfig(strength=args.strength)
    processor, problems = AutoProcessor.from_pretrained(args.model), read_problems(args.data)
    for _ in train(model, processor, problems, options, args):
        pass


if __name__ == "__main__":
    main()
