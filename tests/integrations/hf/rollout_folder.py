"""A folder with a tiny Qwen2.5-VL that the Auto classes load offline, and rollout files with images for it."""

import json
import random
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "trl"))
from tiny_vlm import make_image, make_model

from srpo_core.rollouts import RolloutWriter

QUESTIONS = ["count?", "count it?", "what is it, and how many?", "say the color"]

# Qwen's own processor wants a video processor, which wants torchvision: this one comes with the checkpoint as code.
_PROCESSOR = """
from transformers import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin


class ImageOnly(Qwen2_5_VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
"""


def save_checkpoint(folder: Path) -> tuple[Any, Any]:
    """Save a tiny model and its processor, and return both."""
    model, processor = make_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "image_only.py").write_text(textwrap.dedent(_PROCESSOR))
    config = json.loads((folder / "processor_config.json").read_text())
    config |= {"auto_map": {"AutoProcessor": "image_only.ImageOnly"}, "processor_class": "ImageOnly"}
    (folder / "processor_config.json").write_text(json.dumps(config))
    return model.eval(), processor


def words(generator: random.Random, least: int, most: int) -> str:
    """Letters and spaces, without a space at the end, which would be no part of a block's content."""
    return "".join(generator.choice("abcdefghio ") for _ in range(generator.randint(least, most))) + "a"


def response(generator: random.Random) -> str:
    return (
        f"<perception>x{words(generator, 3, 9)}</perception><think>y{words(generator, 3, 9)}</think>"
        f"<answer>{words(generator, 1, 1)}</answer><|im_end|>"
    )


def write_rollouts(path: Path, tokenizer: Any, *, groups: int = 8, size: int = 8, seed: int = 0) -> Path:
    """Rollouts of a trainer: groups of one prompt with one image each, as token ids, with rewards and two steps."""
    generator = random.Random(seed)
    images = path.parent / f"{path.stem}_pictures"
    images.mkdir(parents=True, exist_ok=True)
    with RolloutWriter(path, tokenizer=tokenizer) as writer:
        for group in range(groups):
            image = images / f"{group}.png"
            make_image(group, [(56, 56), (84, 56), (56, 84)][group % 3]).save(image)
            texts = [response(generator) for _ in range(size)]
            tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            writer.write(
                [[tokenizer.decode([token]) for token in row] for row in tokens],
                rewards=[float(generator.random() < 0.5) for _ in texts],
                group_ids=[group] * size,
                prompts=[QUESTIONS[group % len(QUESTIONS)]] * size,
                images=[image.relative_to(path.parent).as_posix()] * size,
                step=group // 4,
            )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, as JSON has them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, lines: list[dict[str, Any] | str]) -> Path:
    """Lines to a file; a text goes in as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path
