"""The readings world: a perception that also states what the question does not ask about.

An image is a row of colored gauges. The question names two of them, asks for their sum, and hints at a value for
every gauge; hints are mostly wrong. A response reads the gauges one after the other, then adds the two that were asked
for. The reward of the answer falls on every reading alike, so a right answer also teaches whatever was misread
elsewhere: here the tokens that do not matter share the circuit of those that do.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Generator, Tensor

from benchmarks.grounding.world import (
    A_CLOSE,
    A_OPEN,
    DIGITS,
    EOS,
    FILLER,
    FIRST_COLOR,
    P_CLOSE,
    P_OPEN,
    T_CLOSE,
    T_OPEN,
    TAGS,
    ZERO,
    Problems,
    Split,
    World,
)

VALUES = 5  # a gauge shows 0 to 4
NAMES = ("lamp", "clock", "valve", "meter", "dial", "tank", "pump", "motor",
         "fan", "fuse", "gear", "lens", "relay", "rotor", "sensor", "switch")  # fmt: skip
HINTS = ("none", "low", "half", "high", "full")  # hint k suggests k
GRAMMAR = ("add", "and", "?", "plus", "is")
VOCABULARY = ("<pad>", "<eos>", *TAGS, *DIGITS, *NAMES, *HINTS, *GRAMMAR, *FILLER)
ID = {word: index for index, word in enumerate(VOCABULARY)}
FIRST_HINT, FIRST_FILLER = ID["none"], ID["so"]
SIDE = 2  # pixels along a side of a gauge
# What a gauge shows at each value: an arbitrary pattern of twelve numbers around gray.
PATTERNS = 0.2 * torch.randn(VALUES, 3, SIDE, SIDE, generator=Generator().manual_seed(3))

Others = Literal["read", "recited", "words"]


@dataclass(frozen=True)
class Readings(World):
    """Gauges to read, two of which count.

    Attributes:
        others: What a demonstration says of the gauges that were not asked for: it reads them (``read``); repeats
            their hints, half of them one off, whatever the image shows (``recited``); or puts a stray word (``words``,
            the null control: such words interfere with nothing).
        gauges: How many there are, 7 to 16.
        relevance: Which two gauges are asked for: any, named in the question (``asked``), or always the third and the
            seventh (``fixed``).
        filler: Filler words in each of two places of the reasoning.
        pixel_noise: Standard deviation of the noise on each pixel.
        shortcut_right: Share of hints that are right.
    """

    others: Others = "read"
    gauges: int = 8
    relevance: Literal["asked", "fixed"] = "asked"
    filler: int = 2
    pixel_noise: float = 0.15
    shortcut_right: float = 0.2

    patch = SIDE
    vocabulary = VOCABULARY
    first_filler = FIRST_FILLER
    splits: ClassVar[tuple[Split, ...]] = ("aligned", "conflict", "blind", "swapped", "low_contrast")

    @property
    def cells(self) -> int:
        return self.gauges

    @property
    def response_length(self) -> int:
        """Tokens of a demonstration, end-of-sequence included."""
        return 13 + 2 * self.gauges + 2 * self.filler

    def sample(self, n: int, split: Split, generator: Generator) -> Problems:
        """``n`` problems of a split, or of the training mixture for ``"train"``."""
        values = torch.randint(0, VALUES, (n, self.gauges), generator=generator)
        wrong = (values + torch.randint(1, VALUES, (n, self.gauges), generator=generator)) % VALUES
        right_share = {"train": self.shortcut_right, "aligned": 1.0, "swapped": 1.0}.get(split, 0.0)
        hints = torch.where(torch.rand(n, self.gauges, generator=generator) < right_share, values, wrong)
        if split == "swapped":
            values = torch.randint(0, VALUES, (n, self.gauges), generator=generator)
        asked = torch.rand(n, self.gauges, generator=generator).argsort(1)[:, :2].sort(1).values
        if self.relevance == "fixed":
            asked = torch.tensor([2, 6]).expand(n, 2)
        contrast = {"blind": 0.0, "low_contrast": 0.6}.get(split, 1.0)
        question = torch.cat([_words(n, "add"), FIRST_COLOR + asked[:, :1], _words(n, "and"),
                              FIRST_COLOR + asked[:, 1:], FIRST_HINT + hints, _words(n, "?")], 1)  # fmt: skip
        return Problems(
            self._render(values, contrast, generator),
            question,
            asked,
            values.gather(1, asked),
            hints.gather(1, asked).sum(1),
            values,
            hints,
        )

    def _render(
        self, values: Int[Tensor, "batch gauges"], contrast: float, generator: Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        gauges = 0.5 + contrast * PATTERNS[values]
        gauges = gauges + self.pixel_noise * torch.randn(gauges.shape, generator=generator)
        return rearrange(gauges, "n gauge c down right -> n c down (gauge right)").clamp(0, 1)

    def demonstrate(
        self, problems: Problems, generator: Generator, *, misread: float, shortcut: float
    ) -> Int[Tensor, "batch time"]:
        """One response per problem, as an imperfect teacher writes it.

        Args:
            problems: What is asked.
            generator: Source of the errors and the filler.
            misread: Share of readings that are one too high or too low.
            shortcut: Share of readings that repeat the hint instead.
        """
        shape = problems.readings.shape

        def chance(share: float) -> Tensor:
            return torch.rand(shape, generator=generator) < share

        step = torch.where(chance(0.5), 1, -1)
        stated = torch.where(chance(misread), (problems.readings + step).clamp(0, VALUES - 1), problems.readings)
        stated = torch.where(chance(shortcut), problems.hints, stated)
        asked = torch.zeros(shape, dtype=torch.bool).scatter(1, problems.colors, value=True)
        if self.others == "recited":
            # Half of them garbled: a token that is certain has no gradient to interfere with.
            garbled = (problems.hints + step).clamp(0, VALUES - 1)
            stated = torch.where(asked, stated, torch.where(chance(0.5), garbled, problems.hints))
        said = ZERO + stated
        if self.others == "words":
            stray = FIRST_FILLER + torch.randint(0, len(FILLER), shape, generator=generator)
            said = torch.where(asked, said, stray)

        n = len(stated)
        labels = FIRST_COLOR + torch.arange(self.gauges).expand(n, self.gauges)
        counts = stated.gather(1, problems.colors)
        one, two = (ZERO + counts).split(1, 1)
        result = ZERO + counts.sum(1, keepdim=True)

        def fill() -> Tensor:
            return FIRST_FILLER + torch.randint(0, len(FILLER), (n, self.filler), generator=generator)

        def token(number: int) -> Tensor:
            return torch.full((n, 1), number)

        perception = [token(P_OPEN), torch.stack([labels, said], 2).flatten(1), token(P_CLOSE)]
        reasoning = [
            token(T_OPEN),
            fill(),
            one,
            token(ID["plus"]),
            two,
            fill(),
            token(ID["is"]),
            result,
            token(T_CLOSE),
        ]
        return torch.cat([*perception, *reasoning, token(A_OPEN), result, token(A_CLOSE), token(EOS)], 1)


def _words(n: int, word: str) -> Tensor:
    return torch.full((n, 1), ID[word])
