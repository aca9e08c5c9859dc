"""Chats and images -> prompts as a model takes them, each encoded once, and the same with less to see in the images."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo_core.batch import prompt_id
from srpo_core.options import ContextOptions
from srpo_core.pixel_values import corrupt_rows, image_facts, image_token_id_of, vision_patch_size

__all__ = [
    "Chat",
    "EncodedPrompt",
    "Prompts",
    "corrupt_prompts",
    "encode_prompts",
]

Chat = Sequence[Mapping[str, Any]]

#: Inputs that have one entry per token of the sequence. Over the tokens of a response all are 0: it is text.
TYPE_NAMES = ("mm_token_type_ids", "token_type_ids")


class EncodedPrompt(NamedTuple):
    """A prompt as the model takes it: alone, without padding, with the placeholders of its images in place.

    Attributes:
        token_ids: [time].
        token_types: Of each input that says what kind of token each one is, [time], such as ``mm_token_type_ids``.
        vision: What the processor made of its images, by the names of the model's arguments; empty without images.
        images: How many images it has.
    """

    token_ids: Tensor
    token_types: dict[str, Tensor]
    vision: dict[str, Any]
    images: int


class Prompts(NamedTuple):
    """The prompts of a batch without repetition.

    Attributes:
        distinct: Each prompt once.
        of_row: Of each response the place of its prompt in `distinct`.
    """

    distinct: list[EncodedPrompt]
    of_row: list[int]


def encode_prompts(
    prompts: Sequence[Chat | str | EncodedPrompt],
    images: Sequence[Sequence[Any] | None] | None,
    *,
    processor: Any,
    config: Any,
    takes: frozenset[str],
) -> Prompts:
    """The prompts of a batch, each distinct pair of text and images processed once and alone, hence without padding.

    Args:
        prompts: One per response: a chat, a text that a chat template made, or a prompt that is encoded already.
        images: One list of images per response, in the order of their placeholders; None: no response has any.
        processor: Of the model.
        config: Of the model: it knows the image placeholder.
        takes: The names of the arguments of the model's forward.

    Raises:
        ValueError: If images and placeholders do not belong together, or the model takes what cannot be made.
    """
    rows = list(images) if images is not None else [None] * len(prompts)
    if len(rows) != len(prompts):
        raise ValueError(f"images must have one list per response, {len(prompts)}, got {len(rows)}")
    distinct: list[EncodedPrompt] = []
    places: dict[Any, int] = {}  # by what was given
    same: dict[int, list[int]] = {}  # by what became of it: a chat and its text are one prompt
    of_row = []
    for row, (prompt, own) in enumerate(zip(prompts, rows, strict=True)):
        own = _as_list(own, row)
        text = "" if isinstance(prompt, EncodedPrompt) else _text(prompt, processor, row)
        key = id(prompt) if isinstance(prompt, EncodedPrompt) else (text, *map(_fingerprint, own))
        if key not in places:
            made = prompt
            if not isinstance(made, EncodedPrompt):
                made = _encode(text, own, row, processor=processor, config=config, takes=takes)
            known = same.setdefault(prompt_id(made.token_ids, made.vision), [])
            place = next((each for each in known if _equal(distinct[each], made)), None)
            if place is None:
                place = len(distinct)
                known.append(place)
                distinct.append(made)
            places[key] = place
        of_row.append(places[key])
    return Prompts(distinct, of_row)


def corrupt_prompts(
    prompts: Sequence[EncodedPrompt], options: ContextOptions, *, processor: Any, config: Any, step: int
) -> tuple[list[EncodedPrompt], Tensor]:
    """The same prompts with their images corrupted, or for ``corruption="none"`` without them.

    Args:
        prompts: From :func:`encode_prompts`.
        options: Which corruption.
        processor: Its image processor knows how pixels were normalized.
        config: Of the model: it knows the size of a patch, and the image placeholder.
        step: Of the optimizer; a new one, a new draw.

    Returns:
        The new prompts, and of each its images and how many of them the corruption left as they were, [prompts, 2].
    """
    if options.corruption == "none":
        counts = torch.tensor([[prompt.images, 0] for prompt in prompts], dtype=torch.int64).reshape(-1, 2)
        return [_without_images(prompt, config) for prompt in prompts], counts
    vision, counts = corrupt_rows(
        [prompt.vision for prompt in prompts],
        [prompt_id(prompt.token_ids, prompt.vision) for prompt in prompts],
        options,
        image_facts(processor),
        step=step,
        patch_size=vision_patch_size(config),
    )
    return [prompt._replace(vision=new) for prompt, new in zip(prompts, vision, strict=True)], counts


def _as_list(images: Any, row: int) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(images)
    raise ValueError(
        f"images[{row}] must be a list of images, one for each placeholder of the prompt, or None, got "
        f"{type(images).__name__}: pass [image]"
    )


def _text(chat: Chat | str, processor: Any, row: int) -> str:
    if isinstance(chat, str):
        return chat
    if not all(isinstance(message, Mapping) for message in chat):
        raise ValueError(
            f"prompts[{row}] must be a text or a list of messages such as {{'role': 'user', 'content': ...}}, got "
            f"{type(chat).__name__}"
        )
    return processor.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)


def _fingerprint(image: Any) -> Any:
    """Equal where images are: rollouts of one prompt often hold copies of its image."""
    if hasattr(image, "tobytes") and hasattr(image, "size"):
        shape = (getattr(image, "mode", None), getattr(image, "shape", image.size))
        return repr(shape), hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    return id(image)


def _encode(
    text: str, images: list[Any], row: int, *, processor: Any, config: Any, takes: frozenset[str]
) -> EncodedPrompt:
    tokenizer = getattr(processor, "tokenizer", processor)
    given: dict[str, Any] = {"images": [images]} if images else {}
    # A template that writes the beginning of the text itself must not get a second one.
    if (begin := getattr(tokenizer, "bos_token", None)) is not None and text.startswith(begin):
        given["add_special_tokens"] = False
    try:
        made = dict(processor(text=[text], return_tensors="pt", **given))
    except ValueError as error:
        raise ValueError(f"prompts[{row}] and its {len(images)} images do not go together: {error}") from error
    token_ids = made.pop("input_ids")[0]
    made.pop("attention_mask", None)
    placeholder = image_token_id_of(config)
    is_image = token_ids == (-1 if placeholder is None else placeholder)
    types = {name: made.pop(name)[0] for name in TYPE_NAMES if name in made}
    types = {name: value for name, value in types.items() if name in takes}
    # Without it M-RoPE counts positions as if the image were text.
    if "mm_token_type_ids" in takes and "mm_token_type_ids" not in types and placeholder is not None:
        types["mm_token_type_ids"] = is_image.long()
    vision = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    _refuse(token_ids, vision, images, row, is_image=is_image, config=config)
    return EncodedPrompt(token_ids, types, vision, len(images))


def _refuse(
    token_ids: Tensor, vision: Mapping[str, Tensor], images: list[Any], row: int, *, is_image: Tensor, config: Any
) -> None:
    placeholders = int(is_image.sum())
    if placeholders and not images:
        raise ValueError(f"prompts[{row}] has an image placeholder, but images[{row}] is empty: pass its images")
    if images and image_token_id_of(config) is not None and not placeholders:
        raise ValueError(
            f"prompts[{row}] has no image placeholder, but images[{row}] holds {len(images)}: write the content of the "
            "message as parts, {'type': 'image'} where an image goes and {'type': 'text', 'text': ...}"
        )
    video = getattr(config, "video_token_id", None)
    if isinstance(video, int) and bool((token_ids == video).any()):
        raise ValueError(f"prompts[{row}] has a video, and Scorer scores images and text: pass its frames as images")
    family = getattr(config, "model_type", "this model")
    if images and not any("pixel" in name and value.is_floating_point() for name, value in vision.items()):
        raise ValueError(f"the processor made no tensor of pixels of images[{row}]: {family} is not supported")
    if "cross_attention_mask" in vision:
        raise ValueError(
            "cross_attention_mask has one entry per token, which Scorer cannot make for the tokens of a response: "
            f"{family} is not supported"
        )


def _equal(one: EncodedPrompt, two: EncodedPrompt) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or bool(a == b)

    return torch.equal(one.token_ids, two.token_ids) and all(
        a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
        for a, b in ((one.token_types, two.token_types), (one.vision, two.vision))
    )


def _without_images(prompt: EncodedPrompt, config: Any) -> EncodedPrompt:
    """The prompt without its placeholders; what marks their place (``<|vision_start|>``) stays."""
    if not prompt.images:
        return prompt
    placeholder = image_token_id_of(config, needed_by="corruption='none'")
    keep = prompt.token_ids != placeholder
    types = {name: torch.zeros_like(value[keep]) for name, value in prompt.token_types.items()}
    return EncodedPrompt(prompt.token_ids[keep], types, {}, 0)
