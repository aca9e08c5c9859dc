"""A whole run in minutes on a CPU: ``python -m srpo_trl.example``.

A model of Qwen2.5-VL's architecture with 10^5 parameters counts colored squares. First it imitates a teacher who
miscounts; then comes :class:`~srpo_trl.SRPOTrainer` with images and a reward that checks the final answer alone. With
a real checkpoint ``make_policy`` becomes ``from_pretrained`` and the warm start goes; the rest stays.
"""

import argparse
import random
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from srpo_core import RoleTags, extract_answer
from srpo_trl import SRPOConfig, SRPOTrainer

GRAY = (128, 128, 128)
COLORS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 240)}
CELL, GRID = 28, 3  # pixels along a cell, which is what one language-model token sees; cells along the image
TAGS = [tag for pair in RoleTags().pairs.values() for tag in pair]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = [*COLORS, *map(str, range(10)), "user", "assistant", "count", "and", "plus", "is"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


class Problem(NamedTuple):
    """An image, a question about it, and how many there are of each of the two colors asked for."""

    image: Image.Image
    colors: tuple[str, str]
    counts: tuple[int, int]

    @property
    def question(self) -> str:
        return f"count {self.colors[0]} and {self.colors[1]}"

    def response(self, counts: tuple[int, int]) -> str:
        (first, second), (one, two) = self.colors, counts
        return (
            f"<perception> {first} {one} {second} {two} </perception> "
            f"<think> {one} plus {two} is {one + two} </think> <answer> {one + two} </answer>"
        )


def draw_problem(generator: random.Random) -> Problem:
    """Up to four squares of each color asked for, some of the third, on gray, under pixel noise."""
    first, second, third = generator.sample([*COLORS], 3)
    one, two = generator.randint(0, 4), generator.randint(0, 4)
    cells = [first] * one + [second] * two
    cells += generator.choices([third, None], k=GRID**2 - len(cells))
    generator.shuffle(cells)
    pixels = np.array([COLORS[cell] if cell else GRAY for cell in cells], dtype=float)
    pixels = pixels.reshape(GRID, GRID, 3).repeat(CELL, axis=0).repeat(CELL, axis=1)
    pixels += np.random.default_rng(generator.getrandbits(32)).normal(0, 50, pixels.shape)
    return Problem(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), (first, second), (one, two))


def reward_answer(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """1 for the right number between the answer tags, else 0. What was perceived earns nothing."""
    pairs = zip(map(extract_answer, completions), answer, strict=True)
    return [float(found == str(truth)) for found, truth in pairs]


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without videos, for which it would want torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, ("<|image_pad|>", "<|video_pad|>")
        )
        self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_policy(seed: int) -> tuple[Any, Any]:
    """An untrained model and its processor, built offline."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, *TAGS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL + VISION])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    side = CELL * GRID
    images = Qwen2VLImageProcessorPil(patch_size=CELL // 2, merge_size=2, min_pixels=side**2, max_pixels=side**2)
    processor = ImageProcessor(images, tokenizer, chat_template=TEMPLATE)

    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    vision_ids: Any = dict(zip(names, map(tokenizer.convert_tokens_to_ids, VISION), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": CELL // 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 4 * CELL,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=False,
        **vision_ids,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def encode(processor: Any, problems: list[Problem]) -> Any:
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": problem.question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for problem in problems
    ]
    return processor(images=[[p.image] for p in problems], text=texts, padding=True, return_tensors="pt")


def warm_start(
    model: Any, processor: Any, *, steps: int, seed: int, misread: float = 0.35, batch_size: int = 48
) -> None:
    """Imitate a teacher who writes the structure and adds rightly, but miscounts a share of the colors by one."""
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        problems = [draw_problem(generator) for _ in range(batch_size)]

        def read(count: int) -> int:
            slip = generator.choice((-1, 1)) if generator.random() < misread else 0
            return min(max(count + slip, 0), 4)

        said = [p.response((read(p.counts[0]), read(p.counts[1]))) + "<|im_end|>" for p in problems]
        labels = processor.tokenizer(said, return_tensors="pt")["input_ids"]  # all of one length
        inputs = encode(processor, problems)
        prompt_time = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], labels], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(labels)], 1)
        logits = model(**inputs).logits[:, prompt_time - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: Any, processor: Any, *, problems: int = 128, seed: int = 10**6) -> float:
    """Share of right answers among the model's likeliest responses to problems that no training saw."""
    generator = random.Random(seed)
    drawn = [draw_problem(generator) for _ in range(problems)]
    inputs = encode(processor, drawn)
    model.eval()
    token_ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(token_ids, skip_special_tokens=True)
    rewards = reward_answer([[{"content": text}] for text in texts], [sum(problem.counts) for problem in drawn])
    return sum(rewards) / problems


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m srpo_trl.example", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of reinforcement learning")
    parser.add_argument("--warm-up", type=int, default=130, help="steps of imitation before")
    parser.add_argument("--strength", type=float, default=1.0, help="0 is GRPO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/trl-example"), help="folder for what is recorded")
    options = parser.parse_args()

    # Names that transformers is about to change: TRL's versions that are supported know only the old ones.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    started = time.perf_counter()
    print(f"a tiny model imitates {options.warm_up} batches of demonstrations ...", flush=True)
    model, processor = make_policy(options.seed)
    warm_start(model, processor, steps=options.warm_up, seed=options.seed)
    before = accuracy(model, processor)
    print(f"after {options.warm_up} demonstrations: {before:.0%} right ({time.perf_counter() - started:.0f} s)")

    generator = random.Random(options.seed + 1)
    rows = [
        {"prompt": [{"role": "user", "content": each.question}], "image": each.image, "answer": sum(each.counts)}
        for each in (draw_problem(generator) for _ in range(512))
    ]
    rollouts = options.output / "rollouts.jsonl"
    trainer = SRPOTrainer(
        model=model,
        reward_funcs=reward_answer,
        args=SRPOConfig(
            output_dir=str(options.output),
            srpo_strength=options.strength,
            srpo_rollouts=str(rollouts),
            srpo_correct="reward_answer",
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=24,
            max_steps=options.steps,
            learning_rate=5e-5,
            lr_scheduler_type="constant",
            logging_steps=min(5, options.steps),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
            seed=options.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)  # of each logging step only the line in words is printed
    trainer.train()

    entries = [entry for entry in trainer.state.log_history if "reward" in entry]

    def mean(name: str) -> float:
        return sum(entry[name] for entry in entries) / len(entries)

    after, seconds = accuracy(model, processor), mean("srpo/seconds")
    tokens, weight = mean("srpo/tokens/perception/fraction"), mean("srpo/weight/perception/mass")
    print(f"""
What was learned: {after:.0%} of the answers to 128 new problems are right, and {before:.0%} were before these {options.steps} steps.
The mean reward was {entries[0]["reward"]:.2f} at the beginning and {entries[-1]["reward"]:.2f} at the end.
Where the credit went: the perception has {tokens:.0%} of the tokens and {weight:.0%} of the weight.
What it cost: scoring took {seconds / mean("step_time"):.0%} of a step. The whole run took {time.perf_counter() - started:.0f} s.
One run does not say whether this is better than GRPO; with --strength 0 the same run is GRPO.

Every response is in {rollouts}, with its scores and weights. To read them as a page:
    srpo report {rollouts} -o report.html""")  # noqa: E501


if __name__ == "__main__":
    main()
