"""The one color scale of every heat map: blue below 1, orange above, the page's own color at 1.

Every kind of color vision tells blue from orange. Both ends are equally far from the middle, and text stays readable
on the whole scale, on light and on dark pages.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["SCALES", "TEXT", "Theme", "score_shade", "weight_shade"]

Theme = Literal["light", "dark"]
Color = tuple[int, int, int]

#: Shades to each side of the middle, and so ``2 * REACH + 1`` in a scale.
REACH = 20
_WEIGHT_END = 2.0  # log2 of the weight at which the color is full: 4, and 1/4
_SCORE_END = 5.0  # nats: the default clip
_EASING = 0.65  # below 1: small differences show early, as most weights are near 1


def weight_shade(weights: NDArray[np.floating]) -> NDArray[np.int64]:
    """Index of each weight's color in a scale: 0 for 1/4 and less, `REACH` for 1, twice that for 4 and more.

    Example:
        >>> weight_shade(np.array([0.25, 0.5, 1.0, 2.0, 4.0, 100.0]))
        array([ 0,  7, 20, 33, 40, 40])
    """
    with np.errstate(divide="ignore"):
        return _shade(np.log2(weights) / _WEIGHT_END)


def score_shade(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Index of each score's color in a scale: `REACH` for 0 nats, the ends for 5 nats and more to either side."""
    return _shade(scores / _SCORE_END)


def _shade(position: NDArray[np.floating]) -> NDArray[np.int64]:
    position = np.clip(position, -1.0, 1.0)
    return np.rint(REACH + REACH * np.sign(position) * np.abs(position) ** _EASING).astype(np.int64)


def _oklab(lightness: float, chroma: float, hue: float) -> NDArray[np.float64]:
    angle = math.radians(hue)
    return np.array([lightness, chroma * math.cos(angle), chroma * math.sin(angle)])


# Björn Ottosson, "A perceptual color space for image processing": OKLab to the cubes' roots of cone responses, to RGB.
_TO_ROOTS = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def _rgb(oklab: NDArray[np.float64]) -> Color:
    linear = np.clip(_TO_RGB @ (_TO_ROOTS @ oklab) ** 3, 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = np.rint(255 * encoded).astype(int).tolist()
    return red, green, blue


def _scale(middle: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> list[Color]:
    shares = [abs(step) / REACH for step in range(-REACH, REACH + 1)]
    ends = [low] * REACH + [high] * (REACH + 1)
    return [_rgb(middle + share * (end - middle)) for share, end in zip(shares, ends, strict=True)]


#: Colors from the least weight to the greatest.
SCALES: dict[Theme, list[Color]] = {
    "light": _scale(_oklab(1.0, 0.0, 0.0), _oklab(0.70, 0.125, 245.0), _oklab(0.74, 0.155, 58.0)),
    "dark": _scale(_oklab(0.225, 0.008, 260.0), _oklab(0.50, 0.125, 252.0), _oklab(0.52, 0.120, 52.0)),
}

#: Text on them.
TEXT: dict[Theme, Color] = {"light": (27, 31, 36), "dark": (240, 242, 245)}
