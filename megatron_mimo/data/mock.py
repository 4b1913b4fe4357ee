"""Made-up samples: sample i of a seed is always the same, whatever drew the others."""

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.prompt import image_tags
from megatron_mimo.data.sample import RawSample
from megatron_mimo.images import image_grids, rows_of

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
_NAMES = tuple(_COLOURS)
# Bytes of the longest texts around two images, end of sequence included.
_TEXT_BUDGET = 34
_LARGEST_SIDE = 4
_MOST_IMAGES = 2


class Split(IntEnum):
    """Independent streams of samples."""

    TRAIN = 0
    VAL = 1


def mock_sample(index: int, split: Split, config: DataConfig) -> RawSample:
    """Sample `index` of a split, a function of (seed, split, index) and the settings alone.

    One or two noisy pictures of one colour each, of any size or `mock_image_rows` large, and the
    question which colours they are; or, for `text_only_fraction` of the samples, a word to repeat.
    Both are quick to learn, and the first only by looking.

    Args:
        index: Wraps at the dataset's size.
        split: Stream.
        config: Seed, fraction of texts, size of the dataset, and what fits a sequence.
    """
    index %= config.mock_dataset_size
    rng = np.random.Generator(np.random.Philox(key=[config.seed, split], counter=[0, 0, index, 0]))
    key = f"mock-{split.name.lower()}-{index}"
    if rng.random() < config.text_only_fraction:
        word = _NAMES[rng.integers(len(_NAMES))]
        return RawSample.asking(key=key, question=f"Say {word}.", answer=word, source="mock")
    count = int(rng.integers(1, 1 + _most_images(config)))
    names = [_NAMES[rng.integers(len(_NAMES))] for _ in range(count)]
    images = tuple(_picture(name, _size(config, rng), rng) for name in names)
    noun = "Colour?" if count == 1 else "Colours?"
    return RawSample.asking(
        key=key,
        question=config.image_token * count + noun,
        answer=" ".join(names),
        images=images,
        source="mock",
    )


def check_image_rows(config: DataConfig) -> None:
    """Refuse a number of rows that images cannot have, or sequences cannot hold.

    Raises:
        ValueError: The image settings make another number of rows, or they do not fit.
    """
    rows = config.mock_image_rows
    if rows is None:
        return
    if rows > _room(config, 1):
        raise ValueError(
            f"--image-seq-length {rows}: an image and its question need {_TEXT_BUDGET} more "
            f"positions than that, and --seq-length is {config.seq_length}: raise it"
        )
    height, width = _fixed_size(rows, config.image.unit)
    found = rows_of(image_grids(width, height, config.image), config.image)
    if found != rows:
        raise ValueError(
            f"--image-seq-length {rows}: an image of {width} x {height} pixels has {found} rows "
            f"with the other image settings: leave dynamic resolution on, and keep {rows} within "
            f"its bounds"
        )


def _room(config: DataConfig, count: int) -> int:
    """Rows of an image such that so many of them and the text fit a sequence."""
    tags = count * len("".join(image_tags(config)))
    return (config.seq_length - _TEXT_BUDGET - tags) // count


def _most_images(config: DataConfig) -> int:
    rows = config.mock_image_rows
    return _MOST_IMAGES if rows is None or rows <= _room(config, _MOST_IMAGES) else 1


def _size(config: DataConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: a little off whole units, or those of the rows that are asked for."""
    unit = config.image.unit
    if config.mock_image_rows is not None:
        return _fixed_size(config.mock_image_rows, unit)
    max_rows = max(1, _room(config, _MOST_IMAGES))
    grid_h = int(rng.integers(1, min(_LARGEST_SIDE, max_rows) + 1))
    grid_w = int(rng.integers(1, min(_LARGEST_SIDE, max_rows // grid_h) + 1))
    slack = unit // 4
    height, width = (
        max(1, side * unit + int(rng.integers(-slack, slack + 1))) for side in (grid_h, grid_w)
    )
    return height, width


def _fixed_size(rows: int, unit: int) -> tuple[int, int]:
    """Height and width of the squarest image of so many rows."""
    grid_h = next(side for side in range(math.isqrt(rows), 0, -1) if rows % side == 0)
    return grid_h * unit, rows // grid_h * unit


def _picture(name: str, size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] in a colour."""
    height, width = size
    noise = rng.normal(0, 20, size=(height, width, 3))
    return (np.array(_COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
