"""A vision-language model of 127 thousand parameters: image patches and words in one causal transformer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from benchmarks.grounding.world import CELLS, EOS, PAD, PATCH, VOCABULARY

KeyValue = tuple[Tensor, Tensor]  # each [batch, heads, time, size]


class Rollouts(NamedTuple):
    """Sampled responses. ``mask`` is True up to the end-of-sequence token and at it."""

    token_ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    log_probs: Float[Tensor, "batch time"]


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: KeyValue | None = None, attend: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        """The new [batch, time, width] and the keys and values so far, ``past`` included."""
        heads = "batch time (three heads size) -> three batch heads time size"
        query, key, value = rearrange(self.query_key_value(self.attention_norm(x)), heads, three=3, heads=self.heads)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        # A single new token may attend to everything before it: only a longer input needs the causal triangle.
        causal = attend is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attend, is_causal=causal)
        x = x + self.attention_out(rearrange(mixed, "batch heads time size -> batch time (heads size)"))
        return x + self.feedforward(self.feedforward_norm(x)), (key, value)


class TinyVLM(nn.Module):
    def __init__(
        self,
        *,
        width: int = 64,
        blocks: int = 2,
        heads: int = 4,
        max_words: int = 96,
        patch: int = PATCH,
        cells: int = CELLS,
        vocabulary: int = len(VOCABULARY),
    ):
        super().__init__()
        self.patch = patch
        self.patch_embedding = nn.Linear(3 * patch * patch, width)
        self.patch_position = nn.Parameter(0.02 * torch.randn(cells, width))
        self.word_embedding = nn.Embedding(vocabulary, width)
        self.word_position = nn.Parameter(0.02 * torch.randn(max_words, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        nn.init.normal_(self.word_embedding.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def embed_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch cells width"]:
        patches = rearrange(
            images - 0.5,
            "b c (rows down) (columns right) -> b (rows columns) (c down right)",
            down=self.patch,
            right=self.patch,
        )
        return self.patch_embedding(patches) + self.patch_position

    def embed_words(self, words: Int[Tensor, "batch time"], start: int = 0) -> Float[Tensor, "batch time width"]:
        return self.word_embedding(words) + self.word_position[start : start + words.shape[1]]

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        questions: Int[Tensor, "batch words"],
        responses: Int[Tensor, "batch time"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """The logits that predict each response token; a False in ``attention_mask`` hides it from all."""
        return self.head(
            self.hidden(images, questions, self.embed_words(responses, questions.shape[1]), attention_mask)
        )

    def hidden(
        self,
        images: Float[Tensor, "batch 3 height width"],
        questions: Int[Tensor, "batch words"],
        embeddings: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """What the output layer reads to predict each response token, given the tokens' embeddings."""
        x = torch.cat([self.embed_images(images), self.embed_words(questions), embeddings], 1)
        attend = None
        if attention_mask is not None:
            visible = F.pad(attention_mask, (x.shape[1] - attention_mask.shape[1], 0), value=True)
            attend = visible[:, None, None] & visible.new_ones(x.shape[1], x.shape[1]).tril()
        for block in self.blocks:
            x, _ = block(x, attend=attend)
        return self.norm(x[:, -embeddings.shape[1] - 1 : -1])

    @torch.no_grad()
    def continued(
        self,
        images: Float[Tensor, "prompts 3 height width"],
        questions: Int[Tensor, "prompts words"],
        responses: Int[Tensor, "batch time"],
        of_prompt: Int[Tensor, " batch"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """The logits of :meth:`forward`, up to rounding, with each prompt read once for all responses to it."""
        x = torch.cat([self.embed_images(images), self.embed_words(questions)], 1)
        prefix, time = x.shape[1], responses.shape[1]
        y = self.embed_words(responses[:, :-1], questions.shape[1])  # nothing is predicted after the last token
        attend = torch.ones(time - 1, prefix + time - 1, dtype=torch.bool, device=x.device).tril(prefix)
        if attention_mask is not None:
            attend = F.pad(attention_mask[:, :-1], (prefix, 0), value=True)[:, None, None] & attend
        for block in self.blocks:
            x, (key, value) = block(x)
            y, _ = block(y, past=(key[of_prompt], value[of_prompt]), attend=attend)
        return self.head(self.norm(torch.cat([x[of_prompt, -1:], y], 1)))

    @torch.no_grad()
    def generate(
        self,
        images: Float[Tensor, "prompts 3 height width"],
        questions: Int[Tensor, "prompts words"],
        *,
        max_tokens: int,
        group_size: int = 1,
        generator: Generator | None = None,
    ) -> Rollouts:
        """``group_size`` responses to each prompt, side by side in the batch.

        Without a generator every token is the likeliest one; with one it is drawn at temperature 1.
        """
        x = torch.cat([self.embed_images(images), self.embed_words(questions)], 1)
        caches: list[KeyValue] = []
        for block in self.blocks:
            x, (key, value) = block(x)
            caches.append((key.repeat_interleave(group_size, 0), value.repeat_interleave(group_size, 0)))
        x = x[:, -1:].repeat_interleave(group_size, 0)
        running = torch.ones(len(x), dtype=torch.bool, device=x.device)
        steps = []
        for step in range(max_tokens):
            log_probs = self.head(self.norm(x[:, 0])).log_softmax(-1)
            sampled = log_probs.argmax(-1) if generator is None else _sample(log_probs, generator)
            token = torch.where(running, sampled, PAD)
            steps.append((token, running, log_probs.gather(1, sampled[:, None])[:, 0]))
            running = running & (token != EOS)
            if not running.any():
                break
            x = self.embed_words(token[:, None], questions.shape[1] + step)
            for index, block in enumerate(self.blocks):
                x, caches[index] = block(x, past=caches[index])
        return Rollouts(*(torch.stack(column, 1) for column in zip(*steps, strict=True)))


def _sample(log_probs: Tensor, generator: Generator) -> Tensor:
    # The draw is made where the generator lives, so that a seed gives the same responses on every device.
    return torch.multinomial(log_probs.exp().to(generator.device), 1, generator=generator)[:, 0].to(log_probs.device)
