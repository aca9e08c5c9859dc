"""The digits world: handwriting to read, two digits to add, and a hint that is often wrong.

An image is a page of nine handwritten digits, scans of 8x8 pixels from scikit-learn's ``load_digits``: one in red, one
in green, one in blue, one in purple, and five in black. The question "add red and blue ? maybe 7" asks for the sum of
two of them and hints at an answer. A response states the two digits, adds them and answers. Whether it read them right
is known, because the scans are labeled.

Training draws from two thirds of the scans and evaluation from the others, so that a right reading of an evaluation
image is a reading of handwriting that the model has never seen. The two parts share their writers.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from benchmarks.grounding.world import DIGITS, FIRST_COLOR, TAGS, ZERO, Problems, Split, World

INKS = ("red", "green", "blue", "purple")
WORDS = ("add", "?", "maybe", "plus", "is", "the", "and")
VOCABULARY = ("<pad>", "<eos>", *TAGS, *DIGITS, *INKS, *WORDS)
ID = {word: index for index, word in enumerate(VOCABULARY)}

SCAN, MARGIN = 8, 1  # pixels along a side of a scan, pixels of paper on each side of it
# Cells along a side, pixels along a side of a cell; a cell is one patch of the model.
GRID, PATCH = 3, SCAN + 2 * MARGIN
CELLS = GRID * GRID
BLACK = len(INKS)
RGB = torch.tensor([[0.86, 0.08, 0.10], [0.05, 0.58, 0.20], [0.12, 0.25, 0.92], [0.68, 0.10, 0.82], [0.1, 0.1, 0.1]])
#: Every two digits whose sum is a digit, so that an answer is one token.
PAIRS = torch.tensor([(one, two) for one in range(10) for two in range(10 - one)])


class Scans(NamedTuple):
    """Handwritten digits."""

    ink: Float[Tensor, "scans 8 8"]  # in [0, 1]; 0 is paper
    digits: Int[Tensor, " scans"]
    held_out: Bool[Tensor, " scans"]  # True: for evaluation only


@cache
def scans() -> Scans:
    """All scans of ``load_digits``, a third of them held out by a hash of their index.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the handwriting of the demo comes with scikit-learn, which is not installed: pip install '.[demo]'"
        ) from None
    ink, digits = load_digits(return_X_y=True)
    index = torch.arange(len(digits))
    hashed = index * 2_654_435_761 % 2**32  # Knuth's multiplicative hash
    return Scans(torch.tensor(ink).float().view(-1, SCAN, SCAN) / 16, torch.tensor(digits), hashed < 2**32 // 3)


@dataclass(frozen=True)
class Digits(World):
    """Reading and adding two handwritten digits, where the question hints at a sum.

    Attributes:
        shortcut_right: Share of training questions whose hint is right.
    """

    shortcut_right: float = 0.2

    patch = PATCH
    vocabulary = VOCABULARY
    first_filler = ID["the"]
    splits: ClassVar[tuple[Split, ...]] = ("aligned", "conflict", "blind", "swapped")

    @property
    def cells(self) -> int:
        return CELLS

    @property
    def response_length(self) -> int:
        """Tokens of a demonstration, end-of-sequence included."""
        return 20

    def sample(self, n: int, split: Split, generator: Generator) -> Problems:
        """``n`` problems of a split: ``"train"`` draws from the training scans, every other from the held-out ones."""
        inks = torch.rand(n, len(INKS), generator=generator).argsort(1)
        digits = _digits(n, generator)
        answers = digits[:, :2].sum(1)
        wrong = (answers + torch.randint(1, 10, (n,), generator=generator)) % 10
        right_share = {"train": self.shortcut_right, "aligned": 1.0, "swapped": 1.0}.get(split, 0.0)
        hint = torch.where(torch.rand(n, generator=generator) < right_share, answers, wrong)
        if split == "swapped":
            digits = _digits(n, generator)
        drawn = _pick(digits, split != "train", generator)
        place = torch.rand(n, CELLS, generator=generator).argsort(1)
        colors = torch.cat([inks, torch.full((n, CELLS - len(INKS)), BLACK)], 1)
        ink = scans().ink[drawn] * (split != "blind")
        images = draw(ink[torch.arange(n)[:, None], place], colors.gather(1, place))
        readings = torch.zeros_like(inks).scatter(1, inks, digits[:, : len(INKS)])
        return Problems(
            images,
            _question(inks[:, :2], hint),
            inks[:, :2],
            digits[:, :2],
            hint,
            readings,
            torch.full_like(readings, -1),
        )

    def demonstrate(
        self, problems: Problems, generator: Generator, *, misread: float, shortcut: float
    ) -> Int[Tensor, "batch time"]:
        """One response per problem, as an imperfect teacher writes it.

        Args:
            problems: What is asked.
            generator: Source of the errors.
            misread: Share of digits that are written one too high or too low, where the sum is a digit nevertheless.
            shortcut: Share of responses that answer with the hint instead of the sum of the digits written.
        """
        n, digits = len(problems), problems.counts
        slip = torch.where(torch.rand(n, 2, generator=generator) < 0.5, 1, -1)
        slipped = torch.where(torch.rand(n, 2, generator=generator) < misread, digits + slip, digits)
        possible = (slipped >= 0).all(1) & (slipped.sum(1) <= 9)
        digits = torch.where(possible[:, None], slipped, digits)
        lazy = torch.rand(n, generator=generator) < shortcut
        return write(problems.colors, digits, torch.where(lazy, problems.shortcut, digits.sum(1)))


def write(
    inks: Int[Tensor, "batch 2"], digits: Int[Tensor, "batch 2"], answer: Int[Tensor, " batch"]
) -> Int[Tensor, "batch time"]:
    """The response that states these two digits and this answer."""

    def word(name: str) -> Tensor:
        return torch.full((len(digits), 1), ID[name])

    (first, second), (one, two) = (FIRST_COLOR + inks).split(1, 1), (ZERO + digits).split(1, 1)
    result = ZERO + answer[:, None]
    p_open, p_close, t_open, t_close, a_open, a_close = map(word, TAGS)
    perception = [p_open, word("the"), first, one, word("and"), word("the"), second, two, p_close]
    reasoning = [t_open, one, word("plus"), two, word("is"), result, t_close]
    return torch.cat([*perception, *reasoning, a_open, result, a_close, word("<eos>")], 1)


def draw(ink: Float[Tensor, "batch cells 8 8"], colors: Int[Tensor, "batch cells"]) -> Float[Tensor, "batch 3 30 30"]:
    """Write scans on white paper, each in its color."""
    ink = torch.nn.functional.pad(ink, (MARGIN,) * 4)
    patches = 1 - ink[:, :, None] * (1 - RGB[colors])[..., None, None]
    return rearrange(patches, "n (row column) c down right -> n c (row down) (column right)", row=GRID)


def cells_of(page: Float[Tensor, "3 30 30"], inks: Int[Tensor, " wanted"]) -> Int[Tensor, " wanted"]:
    """The cell that holds the digit in each ink, by the color of its pixels; cells are numbered row by row."""
    cells = rearrange(1 - page, "c (row down) (column right) -> (row column) c (down right)", row=GRID, column=GRID)
    alike = torch.nn.functional.cosine_similarity(cells.sum(2)[:, None], 1 - RGB, dim=2)
    return alike[:, inks].argmax(0)


def _digits(n: int, generator: Generator) -> Int[Tensor, "batch cells"]:
    """The digits of a page; the first two can be added."""
    pair = PAIRS[torch.randint(0, len(PAIRS), (n,), generator=generator)]
    return torch.cat([pair, torch.randint(0, 10, (n, CELLS - 2), generator=generator)], 1)


def _pick(digits: Int[Tensor, "batch cells"], held_out: bool, generator: Generator) -> Int[Tensor, "batch cells"]:
    """A scan of each digit, by its index."""
    drawn = torch.empty_like(digits)
    for digit in range(10):
        of_digit = ((scans().digits == digit) & (scans().held_out == held_out)).nonzero()[:, 0]
        wanted = digits == digit
        drawn[wanted] = of_digit[torch.randint(0, len(of_digit), (int(wanted.sum()),), generator=generator)]
    return drawn


def _question(inks: Int[Tensor, "batch 2"], hint: Int[Tensor, " batch"]) -> Int[Tensor, "batch words"]:
    """The words of "add INK and INK ? maybe HINT"."""
    add, conjunction, mark, maybe = (torch.full_like(hint, ID[word]) for word in ("add", "and", "?", "maybe"))
    first, second = (FIRST_COLOR + inks).unbind(1)
    return torch.stack([add, first, conjunction, second, mark, maybe, ZERO + hint], 1)
