"""Vision-language models of seven families, tokenizer and processor included, made offline: about 10^5 parameters each.

No hub, no torchvision: transformers' PIL image processors, a byte-level tokenizer without merges, random weights.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TAGS = ["<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>"]
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_GEMMA = ["<start_of_image>", "<end_of_image>"]
_IDEFICS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
_WIDTH = {"hidden_size": 32, "intermediate_size": 64}
_VISION_TOWER = _WIDTH | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def make_tokenizer(image: str = _QWEN_IMAGE, special: tuple[str, ...] = (), *, tags_as_tokens: bool = True) -> Any:
    """256 bytes without merges. Tags are added tokens, not special ones: completions are decoded without specials."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [*_SPECIAL, *_VISION, *special]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if tags_as_tokens:
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    if "<start_of_image>" in special:
        extra |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    if "<image>" in special:
        extra = {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        truncation_side="left",
        chat_template=_TEMPLATE.replace("IMAGE", image),
        extra_special_tokens=extra,
    )


def make_image(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _qwen_processor(cls: type, tokenizer: Any, patch_size: int) -> Any:
    """Qwen's processors want a video processor, which wants torchvision: this one's signature names none."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class ImageOnly(cls):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    ImageOnly.__name__ = cls.__name__
    token = 2 * patch_size
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, merge_size=2, temporal_patch_size=2, min_pixels=token**2, max_pixels=16 * token**2
    )
    return ImageOnly(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return dict(zip(names, map(tokenizer.convert_tokens_to_ids, tokens), strict=True))


def _rope(sections: list[int], **more: Any) -> dict[str, Any]:
    # The sections sum to half of a head's width.
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, **more}}


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    config = Qwen2_5_VLConfig(
        text_config=_TEXT | _WIDTH | _ids(tokenizer) | _rope([1, 1, 2]),
        vision_config={
            "depth": 2, **_WIDTH, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(Qwen2_5_VLProcessor, tokenizer, 14)


def _qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    config = Qwen2VLConfig(
        text_config=_TEXT | _WIDTH | _ids(tokenizer) | _rope([1, 1, 2]),
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config), _qwen_processor(Qwen2VLProcessor, tokenizer, 14)


def _qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    config = Qwen3VLConfig(
        text_config=_TEXT | _WIDTH | _ids(tokenizer) | _rope([2, 1, 1], mrope_interleaved=True) | {"head_dim": 8},
        vision_config={
            "depth": 2, **_WIDTH, "num_heads": 2, "out_hidden_size": 32, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), _qwen_processor(Qwen3VLProcessor, tokenizer, 16)


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=tokenizer.chat_template,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION_TOWER),
        text_config=LlamaConfig(**_TEXT, **_WIDTH, **_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config), processor


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    to_id = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=_TEXT | _WIDTH | _ids(tokenizer) | {"head_dim": 8, "sliding_window": 4096},
        vision_config=_VISION_TOWER | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_id=to_id("<|image_pad|>"),
        image_token_index=to_id("<|image_pad|>"),
        boi_token_index=to_id("<start_of_image>"),
        eoi_token_index=to_id("<end_of_image>"),
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(config), processor


def _smolvlm(tokenizer: Any) -> tuple[Any, Any]:
    return _idefics(tokenizer, "SmolVLM", "smolvlm")


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    return _idefics(tokenizer, "Idefics3", "idefics3")


def _idefics(tokenizer: Any, name: str, module: str) -> tuple[Any, Any]:
    """Pixels [batch, tiles, channel, height, width], padded to the row with most tiles."""
    import importlib

    import transformers

    pil = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    images = getattr(pil, f"{name}ImageProcessorPil")(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    from transformers import Idefics3Processor

    # SmolVLM's own processor wants a video processor; for images the two write the same prompts.
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    config = getattr(transformers, f"{name}Config")(
        text_config={"model_type": "llama"} | _TEXT | _WIDTH | _ids(tokenizer),
        vision_config=_VISION_TOWER,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


FAMILIES = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "gemma3": _gemma3,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
}
_PLACEHOLDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gemma3": ("<start_of_image>", tuple(_GEMMA)),
    "smolvlm": ("<image>", tuple(_IDEFICS)),
    "idefics3": ("<image>", tuple(_IDEFICS)),
}


def make_model(family: str = "qwen2_5_vl", *, seed: int = 0, tags_as_tokens: bool = True) -> tuple[Any, Any]:
    """A random model of a family, and its processor. Weights are large enough for contrasts of a tenth of a nat."""
    image, special = _PLACEHOLDERS.get(family, (_QWEN_IMAGE, ()))
    tokenizer = make_tokenizer(image, special, tags_as_tokens=tags_as_tokens)
    torch.manual_seed(seed)
    model, processor = FAMILIES[family](tokenizer)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor
