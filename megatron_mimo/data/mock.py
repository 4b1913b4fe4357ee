"""Made-up samples: sample i of a seed is always the same, whatever drew the others."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.prompt import image_tags
from megatron_mimo.data.sample import RawSample

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


class Split(IntEnum):
    """Independent streams of samples."""

    TRAIN = 0
    VAL = 1


def mock_sample(index: int, split: Split, config: DataConfig) -> RawSample:
    """Sample `index` of a split, a function of (seed, split, index) and the settings alone.

    One or two noisy pictures of one colour each and of any size, and the question which colours
    they are; or, for `text_only_fraction` of the samples, a word to repeat. Both are quick to
    learn, and the first only by looking.

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
    count = int(rng.integers(1, 3))
    names = [_NAMES[rng.integers(len(_NAMES))] for _ in range(count)]
    largest = _largest_image(config)
    images = tuple(_picture(name, largest, config.image.unit, rng) for name in names)
    noun = "Colour?" if count == 1 else "Colours?"
    return RawSample.asking(
        key=key,
        question=config.image_token * count + noun,
        answer=" ".join(names),
        images=images,
        source="mock",
    )


def _largest_image(config: DataConfig) -> int:
    """Rows of an image such that two of them and the text fit a sequence; one at least."""
    tags = 2 * len("".join(image_tags(config)))
    return max(1, (config.seq_length - _TEXT_BUDGET - tags) // 2)


def _picture(name: str, max_rows: int, unit: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] in a colour, of at most `max_rows` rows, a little off whole units."""
    grid_h = int(rng.integers(1, min(_LARGEST_SIDE, max_rows) + 1))
    grid_w = int(rng.integers(1, min(_LARGEST_SIDE, max_rows // grid_h) + 1))
    slack = unit // 4
    height, width = (
        max(1, side * unit + int(rng.integers(-slack, slack + 1))) for side in (grid_h, grid_w)
    )
    noise = rng.normal(0, 20, size=(height, width, 3))
    return (np.array(_COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
