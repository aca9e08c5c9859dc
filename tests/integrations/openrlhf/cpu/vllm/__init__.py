"""Stand-in for vLLM: an engine whose responses are random letters in well-formed tags, drawn anew for each request."""

import asyncio
import hashlib
import random
import sys
from collections import Counter
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import cpu_device

__version__ = "0.29.0"

cpu_device.install()


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = None
    min_tokens: int = 1
    skip_special_tokens: bool = False
    logprobs: int | None = None


class AsyncEngineArgs(SimpleNamespace):
    pass


class AsyncLLMEngine:
    @classmethod
    def from_engine_args(cls, engine_args):
        return cls(engine_args.model)

    def __init__(self, model):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.seen = Counter()
        self.unfinished = 0
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: self.unfinished)
        # OpenRLHF keeps deepspeed out of its rollout workers, and so must the hook.
        print(
            "ROLLOUT WORKER imported", [name for name in ("deepspeed", "srpo_core") if name in sys.modules], flush=True
        )

    async def is_sleeping(self):
        return False

    async def collective_rpc(self, method, args=()):
        return None

    async def reset_prefix_cache(self):
        return None

    async def generate(self, prompt, sampling_params, request_id):
        key = tuple(prompt["prompt_token_ids"])
        self.seen[key] += 1
        draw = random.Random(hashlib.blake2b(repr((key, self.seen[key])).encode()).digest())
        self.unfinished += 1
        # In the order of arrival, so that two runs see the same batch in the same order.
        await asyncio.sleep(0.05 * self.unfinished)
        self.unfinished -= 1
        text = response_text(draw)
        token_ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        is_cut = len(token_ids) > sampling_params.max_tokens
        output = SimpleNamespace(
            token_ids=token_ids[: sampling_params.max_tokens],
            text=text,
            finish_reason="length" if is_cut else "stop",
            logprobs=None,
        )
        yield SimpleNamespace(outputs=[output])


def response_text(draw: random.Random) -> str:
    def letters(least, most):
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(least, most)))

    text = f"<perception>{letters(4, 9)}</perception><think>{letters(6, 12)}</think><answer>{letters(1, 2)}</answer>"
    return text if draw.random() < 0.9 else text.replace("</perception>", "", 1)  # one in ten is malformed


def _module(name: str, **contents: Any) -> None:
    module = ModuleType(f"{__name__}.{name}")
    module.__dict__.update(contents)
    sys.modules[module.__name__] = module


_module("inputs", TokensPrompt=dict)
_module("utils", random_uuid=lambda: "0")
_module("distributed")
_module("distributed.utils", StatelessProcessGroup=SimpleNamespace(create=lambda **_: None))
_module("distributed.device_communicators")
_module(
    "distributed.device_communicators.pynccl",
    PyNcclCommunicator=lambda *_, **__: SimpleNamespace(broadcast=lambda *_, **__: None),
)
