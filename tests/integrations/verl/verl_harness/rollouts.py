"""Test only: rollouts by script, the same for the same (prompt, step), in every shape the adapter must take."""

import random
from typing import Any

import torch
from PIL import Image

from verl_harness.tiny_vlm import image_processor

QUESTION = "what is it? "


def image(seed: int) -> Image.Image:
    generator = random.Random(seed)
    picture = Image.new("RGB", (56 if seed % 2 else 84, 56))
    picture.putdata([tuple(generator.randrange(256) for _ in range(3)) for _ in range(picture.width * picture.height)])
    return picture


def images_of(index: int) -> list[Image.Image]:
    """Prompt 0, 4, ...: one image; 1: two; 2: none, text only; 3: one."""
    return [image(10 * index + number) for number in range((1, 2, 0, 1)[index % 4])]


def response_text(index: int, step: int, session: int) -> tuple[str, bool]:
    """A response, and whether the model ended it."""
    generator = random.Random(f"{index}/{step}/{session}")

    def word(least: int, most: int) -> str:
        return "".join(generator.choice("abcdefgh ") for _ in range(generator.randint(least, most)))

    seen, thought = f"<perception>{word(3, 9)}x</perception>", f"<think>{word(4, 12)}y</think>"
    shapes = (
        (seen + thought + f"<answer>{word(1, 2)}</answer>", True),
        (seen + "\n" + thought + seen + thought, True),  # several blocks
        (thought + f"<answer>{word(1, 2)}</answer>", True),  # broken: no perception
        (seen + thought[:-4], False),  # cut off by the length limit
        (seen + thought, True),
    )
    return shapes[(index + session) % len(shapes)] if session else shapes[0]


def rollout(index: int, step: int, session: int, tokenizer: Any, processor: Any, model: Any) -> dict[str, Any]:
    """One row as verl's agent loop would put it, without its uid."""
    pixels: dict[str, torch.Tensor] = {}
    text = QUESTION + str(index)
    pictures = images_of(index)
    if pictures:
        pixels = dict(image_processor()(images=pictures, return_tensors="pt"))
        counts = (pixels["image_grid_thw"].prod(1) // 4).tolist()
        text = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts) + text
    prompt = torch.tensor(tokenizer.encode(text))
    answer, is_finished = response_text(index, step, session)
    response = torch.tensor(tokenizer.encode(answer) + [tokenizer.eos_token_id] * is_finished)
    ids = torch.cat([prompt, response])
    positions = position_ids(ids, pixels, processor)
    mask = torch.ones_like(response)
    rewards = torch.zeros(len(response))
    rewards[-1] = float(random.Random(answer).randrange(2))
    return {
        "prompts": prompt,
        "responses": response,
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": ids,
        "position_ids": positions,
        "rm_scores": rewards,
        "rollout_log_probs": log_probs(model, ids, positions, pixels, len(response)),
        "num_turns": 2,
        "multi_modal_inputs": pixels,
    }


def position_ids(ids: torch.Tensor, pixels: dict[str, torch.Tensor], processor: Any) -> torch.Tensor:
    """[4, time]: the text position, then M-RoPE's three, from the model's own function."""
    vision, _ = processor.get_rope_index(
        input_ids=ids[None],
        image_grid_thw=pixels.get("image_grid_thw"),
        attention_mask=torch.ones_like(ids)[None],
        mm_token_type_ids=(ids == processor.image_token_id).int()[None],
    )
    return torch.cat([torch.arange(len(ids))[None], vision[:, 0]])


@torch.no_grad()
def log_probs(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, pixels: dict[str, torch.Tensor], length: int
) -> torch.Tensor:
    """Of the last ``length`` tokens of one unpadded sequence."""
    logits = model(input_ids=ids[None], position_ids=positions[:, None], **pixels).logits[0, -length - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[len(ids) - length :, None])[:, 0]
