"""Mock pictures of one colour each, and the question which colours they are."""

import math

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.media.images.config import ImageConfig
from megatron_mimo.media.images.grid import image_grids, rows_of

_COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 70, 200),
    "yellow": (210, 200, 50),
    "purple": (140, 50, 160),
    "white": (230, 230, 230),
    "black": (25, 25, 25),
    "orange": (230, 130, 30),
}
COLOURS = tuple(_COLOURS)
# Number of bytes of the longest texts around two images, end of sequence included.
TEXT_BUDGET = 34
_LARGEST_SIDE = 4
_MOST_IMAGES = 2


def mock_pictures(
    rng: np.random.Generator, room: int, config: ImageConfig, *, rows: int | None, tag_bytes: int
) -> tuple[tuple[NDArray[np.uint8], ...], tuple[str, ...]]:
    """One or two noisy pictures, and the name of the colour of each.

    Args:
        rng: Random generator of all choices.
        room: Number of positions that the pictures, their tags and the texts may take.
        config: Conversion of an image to rows.
        rows: Number of rows of every picture; None for pictures of any size.
        tag_bytes: Number of bytes of the tags around a picture.

    Returns:
        The pictures, each uint8 [H, W, 3], and the names of their colours.
    """
    most = _most_images(room, rows, tag_bytes)
    count = int(rng.integers(1, 1 + most))
    names = tuple(COLOURS[rng.integers(len(COLOURS))] for _ in range(count))
    largest = max(1, _room_of_one(room, _MOST_IMAGES, tag_bytes))
    pictures = tuple(
        coloured_picture(name, _size(largest, config, rows, rng), rng) for name in names
    )
    return pictures, names


def check_mock_rows(rows: int, room: int, config: ImageConfig, *, tag_bytes: int) -> None:
    """Refuse a number of rows that pictures cannot have, or sequences cannot hold.

    Args:
        rows: Number of rows of every picture.
        room: Number of positions of a sequence for pictures, their tags and the texts.
        config: Conversion of an image to rows.
        tag_bytes: Number of bytes of the tags around a picture.

    Raises:
        ValueError: The image settings give another number of rows, or the rows do not fit.
    """
    if rows > _room_of_one(room, 1, tag_bytes):
        raise ValueError(
            f"--image-seq-length {rows}: an image and its question need {TEXT_BUDGET} more "
            f"positions than that, and --seq-length leaves them {room}: raise it"
        )
    height, width = _fixed_size(rows, config.unit)
    found = rows_of(image_grids(width, height, config), config)
    if found != rows:
        raise ValueError(
            f"--image-seq-length {rows}: an image of {width} x {height} pixels has {found} rows "
            f"with the other image settings: leave dynamic resolution on, and keep {rows} within "
            f"its bounds"
        )


def _room_of_one(room: int, count: int, tag_bytes: int) -> int:
    """Largest number of rows per image with which `count` images and the text fit."""
    return (room - TEXT_BUDGET - count * tag_bytes) // count


def _most_images(room: int, rows: int | None, tag_bytes: int) -> int:
    fit = rows is None or rows <= _room_of_one(room, _MOST_IMAGES, tag_bytes)
    return _MOST_IMAGES if fit else 1


def _size(
    most: int, config: ImageConfig, rows: int | None, rng: np.random.Generator
) -> tuple[int, int]:
    """Height and width in pixels: near whole units, or exactly those of a given number of rows."""
    unit = config.unit
    if rows is not None:
        return _fixed_size(rows, unit)
    grid_h = int(rng.integers(1, min(_LARGEST_SIDE, most) + 1))
    grid_w = int(rng.integers(1, min(_LARGEST_SIDE, most // grid_h) + 1))
    slack = unit // 4
    # The other rule rounds sides up to whole units, and odd numbers of whole patches by one.
    shift = -slack - 1 if config.grid_rule == "nemotron-omni" else 0
    height, width = (
        max(1, side * unit + shift + int(rng.integers(-slack, slack + 1)))
        for side in (grid_h, grid_w)
    )
    return height, width


def _fixed_size(rows: int, unit: int) -> tuple[int, int]:
    """Height and width, in pixels, of the squarest image with this number of rows."""
    grid_h = next(side for side in range(math.isqrt(rows), 0, -1) if rows % side == 0)
    return grid_h * unit, rows // grid_h * unit


def coloured_picture(
    name: str, size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A picture in a colour, uint8 [H, W, 3]."""
    height, width = size
    noise = rng.normal(0, 20, size=(height, width, 3))
    return (np.array(_COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
