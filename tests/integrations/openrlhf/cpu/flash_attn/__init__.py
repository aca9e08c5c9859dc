"""Stand-in for flash-attn, which needs CUDA to install: OpenRLHF imports functions that pack and unpack batches."""

import sys
from types import ModuleType

import torch
from einops import rearrange

__version__ = "2.8.3"


def unpad_input(values, mask):
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return rearrange(values, "b s ... -> (b s) ...")[indices], indices, ends, int(lengths.max()), lengths


def pad_input(values, indices, batch, length):
    padded = values.new_zeros((batch * length, *values.shape[1:]))
    padded[indices] = values
    return rearrange(padded, "(b s) ... -> b s ...", b=batch)


def index_first_axis(values, indices):
    return values[indices]


def _module(name, **contents):
    module = ModuleType(f"{__name__}.{name}")
    module.__dict__.update(contents)
    sys.modules[module.__name__] = module


_module(
    "bert_padding",
    rearrange=rearrange,
    index_first_axis=index_first_axis,
    pad_input=pad_input,
    unpad_input=unpad_input,
)
_module("utils")
_module("utils.distributed", all_gather=None)
