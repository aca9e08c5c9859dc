"""A checkpoint -> a model and its processor, and what the numbers of ``srpo score`` depend on."""

from pathlib import Path
from typing import Any

import torch

from srpo_hf.policy import Policy
from srpo_hf.preparing import Encode
from srpo_hf.prompts import EncodedPrompt, encode_prompts

__all__ = ["encoder", "load_model", "longest", "made_with"]


def load_model(
    path: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model in evaluation mode and its processor, by the Auto classes of transformers.

    Args:
        path: A folder, or a name on the model hub.
        device: Where it goes, such as ``cuda:0``; ``auto`` spreads it over all devices. None: a GPU if there is one.
        dtype: ``auto`` is that of the checkpoint, else the name of a dtype of torch.
        attention: An implementation that transformers knows, such as ``sdpa``; None: its default.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        ValueError: If there is no such model, or its classes lack something to be installed.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    chosen: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention is not None:
        chosen["attn_implementation"] = attention
    if device == "auto":
        chosen["device_map"] = "auto"
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=trust_remote_code, **chosen)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"--model {path!r} cannot be loaded: {str(error).strip()}") from None
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"--model {path!r} has no image processor: srpo score needs a vision-language model")
    return (model if device == "auto" else model.to(device)).eval(), processor


def encoder(model: Any, processor: Any) -> Encode:
    """What turns a templated text and its images into a prompt as this model takes it."""
    policy = Policy(model, temperature=1.0, pad_token_id=0)

    def encode(text: str, images: list[Any]) -> EncodedPrompt:
        made = encode_prompts([text], [images], processor=processor, config=policy.config, takes=policy.takes)
        return made.distinct[0]

    return encode


def longest(model: Any) -> int | None:
    """How many tokens a model has positions for, as its config says; None where it does not."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def made_with(path: str, model: Any) -> dict[str, Any]:
    """What the log-probs of a model depend on, in values that JSON has."""
    folder = Path(path)
    files = sorted(each for each in folder.iterdir() if each.is_file()) if folder.is_dir() else []
    return {
        "model": path,
        # Another checkpoint may have been saved into the same folder.
        "files": [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in files],
        "dtype_of_model": str(model.dtype),
        "device_of_model": str(model.device),
        "torch": torch.__version__,
    }
