"""Handwritten digits, which the small datasets show: where they come from, and how they are drawn.

They are scikit-learn's copy of the UCI test set "Optical Recognition of Handwritten Digits", 1,797
images of 8 x 8 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_INK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Handwriting:
    """Handwritten digits.

    Attributes:
        glyphs: Images, [N, 8, 8], 0 (paper) to 16 (ink).
        labels: The digit of each image.
    """

    glyphs: NDArray[np.float64]
    labels: tuple[int, ...]


def load_handwriting() -> Handwriting:
    """The digits of scikit-learn.

    Raises:
        ValueError: scikit-learn is missing.
    """
    # scikit-learn takes a second to import; only writing needs it.
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError(
            "the handwritten digits are scikit-learn's, which is not installed: run `pip install "
            "scikit-learn`, or install this package with its extra demo"
        ) from error
    bundled = load_digits()
    return Handwriting(glyphs=bundled.images, labels=tuple(bundled.target.tolist()))


def split_sources(num_sources: int, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the handwritten digits of the train and of the val split, each ascending."""
    num_val = min(num_sources - 1, max(1, round(num_sources * val_fraction)))
    order = np.random.default_rng([seed, 0]).permutation(num_sources)
    return sorted(order[num_val:].tolist()), sorted(order[:num_val].tolist())


def ink(glyph: NDArray[np.float64], size: tuple[int, int], brightness: float) -> Image.Image:
    """A digit, light on dark.

    Args:
        glyph: Image of the digit, [8, 8], 0 (paper) to 16 (ink).
        size: Width and height of the result in pixels.
        brightness: Brightness of full ink, 0 to 1.

    Returns:
        Image in mode L.
    """
    picture = Image.fromarray((glyph * (brightness * 255 / _INK)).astype(np.uint8), mode="L")
    return picture.resize(size, Image.Resampling.BICUBIC)


def draw(glyphs: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> Image.Image:
    """Draw handwritten digits side by side, light on dark, at a random size.

    Args:
        glyphs: Images of digits, [8, 8] each, 0 (paper) to 16 (ink).
        rng: Random generator of sizes, gaps, margins and brightness.

    Returns:
        Image in mode L, 24 to 40 pixels high (to 36 with three digits or more), with up to two more
        pixels on each side.
    """
    height = int(rng.integers(24, 41 if len(glyphs) < 3 else 37))
    brightness = rng.uniform(0.7, 1.0)
    left, top, right, bottom = (int(m) for m in rng.integers(0, 3, size=4))
    pictures = []
    for glyph in glyphs:
        width = max(8, round(height * rng.uniform(0.8, 1.2)))
        pictures.append(ink(glyph, (width, height), brightness))
    gaps = rng.integers(0, 4, size=len(pictures)).tolist()
    width = left + right + sum(p.width for p in pictures) + sum(gaps[1:])
    canvas = Image.new("L", (width, top + height + bottom))
    x = left - gaps[0]
    for picture, gap in zip(pictures, gaps, strict=True):
        x += gap
        canvas.paste(picture, (x, top))
        x += picture.width
    return canvas
