"""The reference blend: packs of samples of which few have images, of very different sizes.

One pack in ten is of samples with images, and is filled with them. Numbers of rows are lognormal,
within what a sequence and dynamic resolution allow. The parameters are chosen so that, dealt out by
lanes, the busiest rank has about as many times the mean as in the blend that balanced dispatch was
asked for: 2.4 at 8 ranks and 16 lanes, 4.2 at 32 and 8, 3.5 at 32 and 12.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

PRESET = "nemotron-moe-vlm-54l"
"""Preset whose vision encoder sets the cost of an image."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Sizes of a blend.

    Attributes:
        seq_length: Number of positions of a pack.
        with_images: Fraction of the packs that have images, which then fill them.
        mean_rows: Mean number of rows of an image.
        sigma: Deviation of the logarithm of that number.
        most_rows: Largest number of rows of an image.
        microbatches: Number of packs of a lane in a step.
    """

    seq_length: int = 8192
    with_images: float = 0.1
    mean_rows: int = 256
    sigma: float = 0.8
    most_rows: int = 3072
    microbatches: int = 8


class Image(NamedTuple):
    """An image of a step.

    Attributes:
        microbatch: Number of its microbatch.
        lane: Number of its lane.
        rows: Number of its rows.
        cost: Number of operations, forward and backward.
        nbytes: Number of bytes of its pixels.
    """

    microbatch: int
    lane: int
    rows: int
    cost: int
    nbytes: int


def drawn(blend: Blend, lanes: int, seed: int) -> tuple[Image, ...]:
    """The images of a step, by microbatch, lane and position."""
    cost, bytes_of_row = _sizes()
    random = np.random.default_rng(seed)
    return tuple(
        Image(microbatch, lane, rows, cost(rows), rows * bytes_of_row)
        for microbatch in range(blend.microbatches)
        for lane in range(lanes)
        if random.random() < blend.with_images
        for rows in _pack(blend, random)
    )


def _pack(blend: Blend, random: Any) -> Iterable[int]:
    """Rows of the images of one pack, until the next one does not fit."""
    # Mean of a lognormal: exp(mu + sigma^2 / 2).
    mu, left = np.log(blend.mean_rows) - blend.sigma**2 / 2, blend.seq_length
    while True:
        rows = min(blend.most_rows, max(1, int(random.lognormal(mu, blend.sigma))))
        if rows > left:
            return
        yield rows
        left -= rows


@cache
def _sizes() -> tuple[Callable[[int], int], int]:
    """Operations of an image of so many rows, and the bytes of the pixels of a row."""
    from megatron_mimo.config.presets import model_config
    from megatron_mimo.model.config import Frozen
    from megatron_mimo.model.flops import item_costs

    config = model_config(PRESET)
    vision = config.part("vision")
    cost = item_costs(config, Frozen(), vocab_size=2**17, seq_length=8192)["encoder"]
    return (
        lambda rows: cost((4 * rows + vision.class_token_len,), rows),
        4 * 3 * vision.patch_dim**2,
    )


def layout_of(encoder_dp: int, lanes: int) -> Any:
    """An encoder and a language model on grids of their own."""
    from megatron_mimo.topology import Layout, ModuleGridSpec

    encoder = ModuleGridSpec(name="encoder", dp=encoder_dp)
    llm = ModuleGridSpec(name="llm", dp=lanes, offset=encoder_dp)
    return Layout.of(encoder, llm, world_size=encoder_dp + lanes)


def by_lane(images: Sequence[Image], layout: Any) -> list[int]:
    """Which dp rank runs each image where its lane decides."""
    from megatron_mimo.topology import assign_items

    found: list[int] = []
    start = 0
    while start < len(images):
        place = images[start][:2]
        stop = start
        while stop < len(images) and images[stop][:2] == place:
            stop += 1
        microbatch, lane = place
        found += assign_items(stop - start, layout.serving("encoder", lane), microbatch)
        start = stop
    return found


def balanced(images: Sequence[Image], layout: Any, window: int) -> list[int]:
    """Which dp rank runs each image where so many microbatches are shared out together."""
    from megatron_mimo.topology import assign_balanced

    homes = [layout.serving("encoder", lane) for lane in range(layout.num_lanes)]
    ranks = range(layout.modules["encoder"].dp)
    found: list[int] = []
    last = max((image.microbatch for image in images), default=0)
    earlier = [0] * len(ranks)
    for start in range(0, last + 1, window):
        part = [image for image in images if start <= image.microbatch < start + window]
        assigned = assign_balanced(
            [image.cost for image in part],
            [image.nbytes for image in part],
            [homes[image.lane] for image in part],
            ranks,
            earlier,
        )
        found += assigned
        earlier = [a + b for a, b in zip(earlier, loads(part, assigned, len(ranks)), strict=True)]
    return found


def loads(images: Sequence[Image], assigned: Sequence[int], ranks: int) -> list[int]:
    """Operations of each rank."""
    found = [0] * ranks
    for image, rank in zip(images, assigned, strict=True):
        found[rank] += image.cost
    return found


def moved(images: Sequence[Image], assigned: Sequence[int], layout: Any) -> int:
    """Bytes of the images that run on ranks that do not serve their lanes."""
    homes = [layout.serving("encoder", lane) for lane in range(layout.num_lanes)]
    pairs = zip(images, assigned, strict=True)
    return sum(image.nbytes for image, rank in pairs if rank not in homes[image.lane])


def least_moved(images: Sequence[Image], layout: Any) -> float:
    """Bytes that every assignment moves whose ranks stay within the capacity, at least.

    Of the ranks that serve a lane, what is above their capacities has to go; images count in
    fractions, those with the fewest bytes for each operation first.
    """
    from megatron_mimo.topology.dispatch import capacity

    limit = capacity([image.cost for image in images], layout.modules["encoder"].dp)
    total = 0.0
    for ranks, lanes in layout.neighbourhoods("encoder"):
        here = [image for image in images if image.lane in lanes]
        excess: float = sum(image.cost for image in here) - len(ranks) * limit
        for image in sorted(here, key=lambda image: image.nbytes / image.cost):
            if excess <= 0:
                break
            part = min(1.0, excess / image.cost)
            total += part * image.nbytes
            excess -= part * image.cost
    return total
