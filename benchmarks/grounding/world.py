"""The prior-clash world: images to count in, questions whose wording suggests an answer, and exact metrics.

An image is a 4x4 grid of colored shapes under pixel noise. The question "count red and blue in park ?" asks for a sum
of two counts, and its place suggests one: to the teacher of the warm start park stands for 0, kitchen for 1, and that
number is often right. An answer can come from the image or from this shortcut; because everything is generated, which
of the two it was is known without a judge.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from srpo_core.tags import RoleTagIds

TAGS = ("<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>")
DIGITS = tuple("0123456789")
COLORS = ("red", "green", "blue", "yellow")
PLACES = ("park", "kitchen", "garage", "beach", "forest", "office", "school", "market", "museum")  # place k suggests k
NEUTRAL_PLACE = "picture"  # suggests nothing
FILLER = (
    "so",
    "now",
    "well",
    "look",
    "here",
    "see",
    "then",
    "hmm",
    "okay",
    "right",
    "clearly",
    "next",
    "also",
    "maybe",
)
GRAMMAR = ("count", "and", "in", "?", "plus", "is")
VOCABULARY = ("<pad>", "<eos>", *TAGS, *DIGITS, *COLORS, *PLACES, NEUTRAL_PLACE, *GRAMMAR, *FILLER)
ID = {word: index for index, word in enumerate(VOCABULARY)}
PAD, EOS = ID["<pad>"], ID["<eos>"]
TAG_IDS = RoleTagIds(*(ID[tag] for tag in TAGS))
P_OPEN, P_CLOSE, T_OPEN, T_CLOSE, A_OPEN, A_CLOSE = TAG_IDS
ZERO, FIRST_COLOR, FIRST_PLACE, FIRST_FILLER = ID["0"], ID["red"], ID["park"], ID["so"]

GRID, PATCH = 4, 8  # cells along a side, pixels along a side of a cell; a cell is one patch of the model
CELLS = GRID * GRID
MAX_COUNT = 4  # of each color asked for, so that every sum is the number of a place
BACKGROUND = 0.5  # gray, so that a patch masked with black does not look like a cell with nothing in it
RGB = torch.tensor([[0.90, 0.15, 0.15], [0.15, 0.80, 0.20], [0.20, 0.30, 0.95], [0.90, 0.85, 0.15]])

# "train" is the mixture that is trained on; the others are for evaluation.
Split = Literal["train", "aligned", "neutral", "conflict", "blind", "swapped", "low_contrast", "shifted"]
SPLITS: dict[Split, str] = {
    "aligned": "the shortcut is right",
    "neutral": "the question suggests nothing",
    "conflict": "the shortcut is wrong",
    "blind": "conflict, image emptied: nobody can know",
    "swapped": "aligned, then another image: true to what is shown?",
    "low_contrast": "conflict at 60 % of the contrast",
    "shifted": "conflict, shapes and tints never seen (out of distribution)",
}


@dataclass(frozen=True)
class Problems:
    """Questions about images, and the truth."""

    images: Float[Tensor, "batch 3 height width"]  # in [0, 1]
    questions: Int[Tensor, "batch words"]
    colors: Int[Tensor, "batch 2"]  # the two colors asked for
    counts: Int[Tensor, "batch 2"]  # of these colors in the image
    shortcut: Int[Tensor, " batch"]  # the answer the question suggests; -1: none
    readings: Int[Tensor, "batch all"]  # everything there is to perceive, in the order of the labels
    hints: Int[Tensor, "batch all"]  # what the question suggests for each; -1: nothing

    @property
    def answers(self) -> Int[Tensor, " batch"]:
        return self.counts.sum(1)

    def __len__(self) -> int:
        return len(self.questions)

    def rows(self, index: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def repeat(self, times: int) -> Self:
        """Each problem ``times`` times in a row."""
        return self.rows(torch.arange(len(self), device=self.questions.device).repeat_interleave(times))

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


class Reading(NamedTuple):
    """What a response says. A number it does not state is -1."""

    well_formed: Bool[Tensor, " batch"]
    counts: Int[Tensor, "batch 2"]  # as written in the perception
    answer: Int[Tensor, " batch"]


@dataclass(frozen=True)
class World:
    """Draws problems and demonstrations of them; its tags, digits and labels have the token ids of this module.

    Attributes:
        shortcut_right: Share of training questions, or of their parts, whose shortcut is right.
    """

    shortcut_right: float

    patch: ClassVar[int]  # pixels along a side of a patch
    vocabulary: ClassVar[tuple[str, ...]]
    first_filler: ClassVar[int]  # token id from which on words mean nothing
    splits: ClassVar[tuple[Split, ...]]

    @property
    def cells(self) -> int:
        """Patches of an image."""
        raise NotImplementedError

    @property
    def response_length(self) -> int:
        """Tokens of a demonstration, end-of-sequence included."""
        raise NotImplementedError

    def sample(self, n: int, split: Split, generator: Generator) -> Problems:
        """``n`` problems of a split (:data:`SPLITS`), or of the training mixture for ``"train"``."""
        raise NotImplementedError

    def demonstrate(
        self, problems: Problems, generator: Generator, *, misread: float, shortcut: float
    ) -> Int[Tensor, "batch time"]:
        """One response per problem, as an imperfect teacher writes it.

        Args:
            problems: What is asked.
            generator: Source of the errors and the filler.
            misread: Share of counts that are written one too high or too low.
            shortcut: How often the shortcut is followed instead of the image.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class PriorClash(World):
    """Counting, where the question's place suggests an answer.

    Attributes:
        filler: Filler words in each of the four places of a response that hold some. They dilute the credit.
        pixel_noise: Standard deviation of the noise on each pixel.
        shortcut_right: Share of training questions whose shortcut is right.
    """

    filler: int = 3
    pixel_noise: float = 0.25
    shortcut_right: float = 0.25

    patch = PATCH
    vocabulary = VOCABULARY
    first_filler = FIRST_FILLER
    splits = tuple(SPLITS)

    @property
    def cells(self) -> int:
        return CELLS

    @property
    def response_length(self) -> int:
        """Tokens of a demonstration, end-of-sequence included."""
        return 17 + 4 * self.filler

    def sample(self, n: int, split: Split, generator: Generator) -> Problems:
        """``n`` problems of a split (:data:`SPLITS`), or of the training mixture for ``"train"``."""
        colors = torch.rand(n, len(COLORS), generator=generator).argsort(1)
        counts = torch.randint(0, MAX_COUNT + 1, (n, 2), generator=generator)
        answers = counts.sum(1)
        wrong = (answers + torch.randint(1, len(PLACES), (n,), generator=generator)) % len(PLACES)
        right_share = {"train": self.shortcut_right, "aligned": 1.0, "swapped": 1.0}.get(split, 0.0)
        shortcut = torch.where(torch.rand(n, generator=generator) < right_share, answers, wrong)
        place = FIRST_PLACE + shortcut
        if split == "neutral":
            place, shortcut = torch.full_like(place, ID[NEUTRAL_PLACE]), torch.full_like(place, -1)
        if split == "swapped":
            counts = torch.randint(0, MAX_COUNT + 1, (n, 2), generator=generator)
        cells = torch.full((n, CELLS), -1) if split == "blind" else _lay_out(colors, counts, generator)
        contrast = 0.6 if split == "low_contrast" else 1.0
        images = render(cells, generator, noise=self.pixel_noise, contrast=contrast, shifted=split == "shifted")
        counted = torch.stack([(cells == color).sum(1) for color in range(len(COLORS))], 1)
        hints = torch.full_like(counted, -1)
        return Problems(images, _question(colors[:, :2], place), colors[:, :2], counts, shortcut, counted, hints)

    def demonstrate(
        self, problems: Problems, generator: Generator, *, misread: float, shortcut: float
    ) -> Int[Tensor, "batch time"]:
        """One response per problem, as an imperfect teacher writes it.

        Args:
            problems: What is asked.
            generator: Source of the errors and the filler.
            misread: Share of counts that are written one too high or too low.
            shortcut: Share of responses that answer with the place's number instead of the sum of the counts written.
        """
        n, counts = len(problems), problems.counts
        slip = torch.where(torch.rand(n, 2, generator=generator) < 0.5, 1, -1)
        slipped = torch.rand(n, 2, generator=generator) < misread
        counts = torch.where(slipped, (counts + slip).clamp(0, MAX_COUNT), counts)
        lazy = (torch.rand(n, generator=generator) < shortcut) & (problems.shortcut >= 0)
        answer = torch.where(lazy, problems.shortcut, counts.sum(1))
        return self.write(problems.colors, counts, answer, generator)

    def write(
        self,
        colors: Int[Tensor, "batch 2"],
        counts: Int[Tensor, "batch 2"],
        answer: Int[Tensor, " batch"],
        generator: Generator,
    ) -> Int[Tensor, "batch time"]:
        """The response that states these counts and this answer, with random filler."""
        n = len(counts)

        def fill() -> Tensor:
            return FIRST_FILLER + torch.randint(0, len(FILLER), (n, self.filler), generator=generator)

        def word(token: int) -> Tensor:
            return torch.full((n, 1), token)

        (first, second), (one, two) = (FIRST_COLOR + colors).split(1, 1), (ZERO + counts).split(1, 1)
        result = ZERO + answer[:, None]
        perception = [word(P_OPEN), fill(), first, one, fill(), second, two, word(P_CLOSE)]
        reasoning = [word(T_OPEN), fill(), one, word(ID["plus"]), two, fill(), word(ID["is"]), result, word(T_CLOSE)]
        return torch.cat([*perception, *reasoning, word(A_OPEN), result, word(A_CLOSE), word(EOS)], 1)


def render(
    cells: Int[Tensor, "batch cells"],
    generator: Generator,
    *,
    noise: float,
    contrast: float = 1.0,
    shifted: bool = False,
) -> Float[Tensor, "batch 3 height width"]:
    """Draw a grid of color indices (-1: empty) on gray; shape, place in the cell and brightness of each are random."""
    n = len(cells)
    middle = 2.5 + torch.randint(0, PATCH - 5, (2, n, CELLS, 1, 1), generator=generator)  # shapes are 6 pixels wide
    pixel = torch.arange(float(PATCH))
    down, right = pixel[:, None] - middle[0], pixel[None] - middle[1]
    reach, radius = torch.maximum(down.abs(), right.abs()), (down**2 + right**2).sqrt()
    within = reach <= 2.5
    disc, triangle = radius <= 2.75, within & (right.abs() <= (down + 3.5) / 2)
    cross, ring = within & (torch.minimum(down.abs(), right.abs()) <= 1), (radius <= 3.1) & (radius >= 1.5)
    shapes = torch.stack([cross, ring] if shifted else [within, disc, triangle])
    kind = torch.randint(0, len(shapes), (1, n, CELLS, 1, 1), generator=generator)
    shape = shapes.gather(0, kind.expand(1, n, CELLS, PATCH, PATCH))[0]
    tint = RGB[cells.clamp(min=0)] * (0.6 + 0.4 * torch.rand(n, CELLS, 1, generator=generator))
    tint = tint + torch.tensor([-0.1, 0.1, -0.1]) if shifted else tint
    drawn = shape & (cells >= 0)[..., None, None]
    patches = contrast * drawn[:, :, None] * (tint - BACKGROUND)[..., None, None]
    images = BACKGROUND + rearrange(patches, "n (row column) c down right -> n c (row down) (column right)", row=GRID)
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _lay_out(colors: Tensor, counts: Tensor, generator: Generator) -> Int[Tensor, "batch cells"]:
    """Place the shapes asked for, and in each cell left over one of the two other colors or nothing."""
    n, order = len(counts), torch.arange(CELLS)
    other = torch.randint(1, 4, (n, CELLS), generator=generator)  # 1: nothing
    cells = torch.where(other == 1, -1, colors.gather(1, other))
    cells = torch.where(order < counts.sum(1, keepdim=True), colors[:, 1:2], cells)
    cells = torch.where(order < counts[:, :1], colors[:, :1], cells)
    return cells.gather(1, torch.rand(n, CELLS, generator=generator).argsort(1))


def _question(colors: Tensor, place: Tensor) -> Int[Tensor, "batch words"]:
    """The words of "count COLOR and COLOR in PLACE ?"."""
    count, conjunction, preposition, mark = (torch.full_like(place, ID[word]) for word in ("count", "and", "in", "?"))
    first, second = (FIRST_COLOR + colors).unbind(1)
    return torch.stack([count, first, conjunction, second, preposition, place, mark], 1)


def read(responses: Int[Tensor, "batch time"], colors: Int[Tensor, "batch 2"]) -> Reading:
    """Parse responses: the number after each color word asked for in the perception, and the number in the answer."""
    length = responses.shape[1]
    place = torch.arange(length, device=responses.device)

    def first(token: int) -> Tensor:
        found = responses == token
        return torch.where(found.any(1), found.int().argmax(1), length + 99)

    def digit(token: Tensor) -> Tensor:
        return torch.where((token >= ZERO) & (token < ZERO + 10), token - ZERO, -1)

    p_close, answer_at, end = first(P_CLOSE), first(A_OPEN), first(EOS)
    ordered = (p_close < first(T_OPEN)) & (first(T_OPEN) < first(T_CLOSE)) & (first(T_CLOSE) < answer_at)
    answer = digit(responses.gather(1, (answer_at + 1).clamp(max=length - 1)[:, None])[:, 0])
    well_formed = (
        (responses[:, 0] == P_OPEN) & ordered & (first(A_CLOSE) == answer_at + 2) & (end < length) & (answer >= 0)
    )
    following = torch.nn.functional.pad(digit(responses[:, 1:]), (0, 1), value=-1)
    counts = []
    for color in colors.unbind(1):
        stated = (responses == FIRST_COLOR + color[:, None]) & (place < p_close[:, None]) & (following >= 0)
        value = following.gather(1, stated.int().argmax(1, keepdim=True))[:, 0]
        counts.append(torch.where(stated.any(1), value, -1))
    return Reading(well_formed, torch.stack(counts, 1), torch.where(well_formed, answer, -1))


def reward(responses: Int[Tensor, "batch time"], problems: Problems) -> Float[Tensor, " batch"]:
    """1 for a well-formed response with the right final answer, else 0. The perception earns nothing."""
    return (read(responses, problems.colors).answer == problems.answers).float()


def measure(responses: Int[Tensor, "batch time"], problems: Problems) -> dict[str, float]:
    """Exact rates in [0, 1]; ``grounded + lucky + bad_thinking + both_wrong == 1``."""
    reading = read(responses, problems.colors)
    right = reading.answer == problems.answers
    seen = (reading.counts == problems.counts).all(1)
    rates = {
        "answer": right,
        "perception": seen,
        "count": reading.counts == problems.counts,
        "grounded": right & seen,
        "lucky": right & ~seen,
        "bad_thinking": ~right & seen,
        "both_wrong": ~right & ~seen,
        # Does the answer follow from what was written, true or not?
        "consistent": (reading.answer == reading.counts.sum(1)) & (reading.counts >= 0).all(1),
        "bias": (reading.answer == problems.shortcut) & (problems.shortcut >= 0),
        "well_formed": reading.well_formed,
    }
    return {name: rate.double().mean().item() for name, rate in rates.items()}


def evidence(responses: Int[Tensor, "batch time"], problems: Problems) -> Bool[Tensor, "batch time"]:
    """Which tokens carry the answer: the numbers perceived of what was asked for, and all numbers after them."""
    numbers = (responses >= ZERO) & (responses < ZERO + 10)
    asked = (responses[:, None] == FIRST_COLOR + problems.colors[:, :, None]).any(1)
    after = (responses == P_CLOSE).int().cumsum(1) > 0
    return numbers & (after | torch.nn.functional.pad(asked[:, :-1], (1, 0)))


def to_words(token_ids: Tensor, vocabulary: tuple[str, ...] = VOCABULARY) -> list[str]:
    return [vocabulary[token] for token in token_ids.tolist()]
