"""Tiny vision-language models of ten families, made offline, and rollouts for them. Seven are those of TRL's tests."""

import random
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "trl"))
import tiny_vlm
from tiny_vlm import make_image, make_tokenizer

from srpo_core import RolloutBatch, SRPOConfig, plan
from srpo_core.batch import Plan

TYPES = ("token_type_ids", "mm_token_type_ids")
FAMILIES = (*tiny_vlm.FAMILIES, "internvl", "llava_next", "gemma3_sliding")
WORDS = ["red", "a car", "7 dots", "left of it", "so", "it is", "wide", "no", "three"]


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class ImageOnly(InternVLProcessor):
        """Without the video processor, which wants torchvision."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None):
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            self.image_seq_length = 4
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.start_image_token, self.end_image_token = "<|vision_start|>", "<|vision_end|>"
            self.image_token_id, self.start_image_token_id, self.end_image_token_id = tokenizer.convert_tokens_to_ids(
                [self.image_token, self.start_image_token, self.end_image_token]
            )
            self.multimodal_pattern = re.compile(r"(?P<image><\|image_pad\|>)|(?P<video><\|video_pad\|>)")

    ImageOnly.__name__ = "InternVLProcessor"
    images = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2"} | tiny_vlm._TEXT | tiny_vlm._WIDTH | tiny_vlm._ids(tokenizer),
        vision_config={**tiny_vlm._WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), ImageOnly(images, tokenizer, tokenizer.chat_template)


def _llava_next(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tiles = [[56, 112], [112, 56], [112, 112]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=tiles
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=tokenizer.chat_template,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tiny_vlm._VISION_TOWER),
        text_config=LlamaConfig(**tiny_vlm._TEXT, **tiny_vlm._WIDTH, **tiny_vlm._ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=tiles,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return LlavaNextForConditionalGeneration(config), processor


def _random_weights(model: Any, tokenizer: Any) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def make_model(family: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A random model of a family in eval mode, and its processor."""
    torch.manual_seed(seed)
    if family in ("internvl", "llava_next"):
        tokenizer = make_tokenizer()
        model, processor = {"internvl": _internvl, "llava_next": _llava_next}[family](tokenizer)
        _random_weights(model, tokenizer)
        return model.eval(), processor
    model, processor = tiny_vlm.make_model(family.removesuffix("_sliding"), seed=seed)
    if family == "gemma3_sliding":  # the same with a window shorter than any prompt, in one of its two layers
        config = type(model.config)(**model.config.to_dict())
        config.text_config.sliding_window = 12
        config.text_config.layer_types = ["sliding_attention", "full_attention"]
        model = type(model)(config)
        _random_weights(model, processor.tokenizer)
    return model.eval(), processor


def make_other_model(name: str, vocabulary: int) -> Any:
    """The language part of other families, for prompts without images."""
    import transformers

    text = tiny_vlm._TEXT | tiny_vlm._WIDTH | {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": None}
    siglip = {"model_type": "siglip_vision_model"} | tiny_vlm._VISION_TOWER
    towers = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    linear = {f"linear_{which}": 8 if "dim" in which else 2 for which in (
        "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")}  # fmt: skip
    parts = {
        "PaliGemma": ({"model_type": "gemma2", "head_dim": 8}, siglip | {"projection_dim": 32}),
        "Mistral3": ({"model_type": "mistral", "head_dim": 8}, {"model_type": "pixtral"} | tiny_vlm._VISION_TOWER),
        "Cohere2Vision": ({"model_type": "cohere2", "logit_scale": 0.25, "sliding_window": 8}, siglip),
        "Glm4v": ({"rope_parameters": rope}, towers),
        "Lfm2Vl": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, {
            **tiny_vlm._VISION_TOWER, "model_type": "siglip2_vision_model"}),
        "Qwen3_5": ({"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": rope,
                     **linear}, towers),
    }  # fmt: skip
    more, vision = parts[name]
    config = getattr(transformers, f"{name}Config")(text_config=text | more, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.float().eval()


class Rollouts(NamedTuple):
    """Everything that a trainer has at hand after generation."""

    prompts: list[Any]
    images: list[list[Any]]
    batch: RolloutBatch
    planned: Plan
    options: SRPOConfig


def make_rollouts(
    processor: Any,
    *,
    seed: int = 0,
    groups: int = 2,
    size: int = 3,
    images: Any = lambda group: 1,
    malformed: bool = True,
    **options: Any,
) -> Rollouts:
    """Groups of responses of different lengths, some malformed, to prompts of other lengths and numbers of images."""
    draw = random.Random(seed)
    tokenizer, config = processor.tokenizer, SRPOConfig(**options)
    prompts, pictures, rows, group_ids = [], [], [], []
    for group in range(groups):
        count = images(group)
        shapes = [(56, 56), (84, 56), (56, 112)]
        own = [make_image(100 * seed + 10 * group + k, draw.choice(shapes)) for k in range(count)]
        question = "What is it? " + " ".join(draw.choice(WORDS) for _ in range(1 + 3 * group))
        chat = [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": question}]}]
        for _ in range(size):
            see, think = (" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most))) for most in (4, 5))
            text = f"<perception>{see}</perception>\n<think>{think}</think><answer>{draw.randint(1, 9)}</answer>"
            if malformed and draw.random() < 0.15:
                text = think
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(ids + [tokenizer.eos_token_id] * (draw.random() < 0.8))
            prompts.append(chat)
            pictures.append(list(own))
            group_ids.append(group)
    width = max(map(len, rows))
    token_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    batch = RolloutBatch.of(token_ids, mask, tokenizer, config, group_ids=torch.tensor(group_ids))
    planned = plan(batch, config, has_images=any(pictures), pad_token_id=tokenizer.pad_token_id)
    return Rollouts(prompts, pictures, batch, planned, config)


def one_by_one(
    model: Any, processor: Any, chat: Any, images: list[Any], response: list[int], *, change: Any = None
) -> torch.Tensor:
    """Log-probs of one response by a hand-written forward: alone, no padding, no cache, no code of the package.

    `change` gets the processor's inputs and returns others: another image, or none.
    """
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = dict(processor(text=[text], return_tensors="pt", **({"images": [images]} if images else {})))
    if change is not None:
        inputs = change(inputs)
    tail = torch.tensor([response], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for key in TYPES:
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros_like(tail)], 1)
    logits = model(**inputs, use_cache=False).logits[0, -len(response) - 1 : -1].double().log_softmax(-1)
    return logits.gather(1, tail[0][:, None])[:, 0]
