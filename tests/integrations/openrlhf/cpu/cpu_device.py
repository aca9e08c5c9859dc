"""Lets OpenRLHF's actors, which ask for CUDA, run on a CPU. Called by the stand-in for vLLM, which they all import."""

import os


class _CPU(str):
    """A device for ``tensor.to`` and, inside ``f"cuda:{device}"``, the index 0."""

    def __format__(self, spec):
        return "0"


def install():
    import torch
    import torch.distributed.device_mesh as device_mesh
    import transformers
    from tiny_models import TinyProcessor

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.cuda.current_device = lambda: _CPU("cpu")
    torch.cuda.current_stream = lambda *_: None
    for name in ("empty_cache", "synchronize", "set_device"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    if not hasattr(device_mesh, "stock_init"):
        device_mesh.stock_init = device_mesh.init_device_mesh
        device_mesh.init_device_mesh = lambda _, *args, **kwargs: device_mesh.stock_init("cpu", *args, **kwargs)

    # OpenRLHF's trainer shuffles the prompts without a seed: two runs could not be compared.
    torch.manual_seed(0)
    # The real processor asks for a video processor, and that for torchvision, which does not load beside a CPU's torch.
    transformers.AutoProcessor.from_pretrained = TinyProcessor.from_pretrained
    # OpenRLHF packs only with flash-attention. This one, too, tells packed sequences apart by their positions.
    load = transformers.AutoModelForCausalLM.from_pretrained
    transformers.AutoModelForCausalLM.from_pretrained = lambda *args, **kwargs: load(
        *args, **{**kwargs, "attn_implementation": "sdpa"}
    )
