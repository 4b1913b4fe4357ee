"""The microbatches of a dry run: full sequences, the same for every lane.

They are drawn by the product's own loader, for the run's own settings of sequences, packing and
items, from mock samples. Of images only the sizes count; their pixels take no memory.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Inputs, ItemInput, hosts
from megatron_mimo.data.loader.batch import StepData, StepLoader
from megatron_mimo.data.loader.stream_loader import StreamLoader
from megatron_mimo.data.reading.stream import LaneStream
from megatron_mimo.data.role import data_role
from megatron_mimo.data.samples.mock import Split, check_mock_items, mock_sample
from megatron_mimo.data.samples.sample import Drawn, EncodedSample, RejectedSample, try_encode
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.media.images import EncodedImage, ImageConfig, ImageInput, PackedImages
from megatron_mimo.media.images.packing import pack_patches
from megatron_mimo.media.video.clip import EncodedVideo
from megatron_mimo.topology import Layout

# Of an image, where nothing sets its size: 512 x 512 pixels at 16 pixels to the side of a patch and
# four patches to a row.
_TYPICAL_ROWS = 256
# Samples that are tried until one has items of every module.
_TRIES = 100


class OneStep(StepLoader):
    """A loader that gives the same step again and again.

    Attributes:
        documents: Documents of each sequence.
    """

    def __init__(self, step: StepData, documents: tuple[EncodedSample, ...]) -> None:
        self._step = step
        self.documents = documents

    def next_step(self) -> StepData:
        """The step."""
        return self._step

    def describe(self) -> str:
        """One line on what a sequence holds."""
        parts = [_counted(len(self.documents), "document")]
        for module in self.documents[0].items:
            rows = [item.rows for document in self.documents for item in document.items[module]]
            items, of_items = _counted(len(rows), "item"), _counted(sum(rows), "row")
            parts.append(f"{items} of {module} with {of_items}")
        positions = sum(document.num_positions for document in self.documents)
        return f"{', '.join(parts)}; {positions:,} positions are used"


def full_step(config: DataConfig, layout: Layout, rank: int, tokenizer: Tokenizer) -> OneStep:
    """The data of a step for one rank, which all ranks would agree on.

    Args:
        config: Settings of the run's data.
        layout: The grids of all modules.
        rank: Global rank.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: No mock sample can be made with these settings.
    """
    config = replace(config, inputs=outlined(config.inputs, config.seq_length))
    made = config if config.provider == "mock" else _as_mock(config)
    check_mock_items(made)
    role = data_role(layout, rank)
    sample = _sample(made, tokenizer, role.runs)
    packed = config.packing_buffer_size is not None
    documents = tuple(_filling(sample, config.seq_length)) if packed else (sample,)
    # Every lane, not those of this rank alone: no other rank is there to tell of its own.
    lanes = tuple(range(layout.num_lanes))
    role = replace(
        role,
        lanes=lanes,
        sources={
            name: replace(source, serving={lane: layout.serving(name, lane) for lane in lanes})
            for name, source in role.sources.items()
        },
    )
    streams: dict[int, LaneStream] = {lane: _Repeated(documents) for lane in lanes}
    return OneStep(StreamLoader(streams, config, role, tokenizer).next_step(), documents)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def outlined(inputs: Inputs, seq_length: int) -> dict[str, ItemInput]:
    """Kinds of items whose images are of a typical size and have no pixels.

    Args:
        inputs: Kind of items of each module.
        seq_length: Number of positions of a sequence, which the modules share.
    """
    room = seq_length // max(1, len(hosts(inputs)))
    return {
        module: _outline(kind, room) if isinstance(kind, ImageInput) else kind
        for module, kind in inputs.items()
    }


def _outline(kind: ImageInput, room: int) -> ImageInput:
    outline = _OutlinedImages(
        **{field.name: getattr(kind, field.name) for field in fields(ImageInput)}
    )
    config = kind.config
    if kind.mock_rows is not None or not config.dynamic_resolution:
        return outline
    most = config.max_patches // config.patches_per_row if config.max_patches else _TYPICAL_ROWS
    for side in range(math.isqrt(min(_TYPICAL_ROWS, most, room)), 0, -1):
        sized = replace(outline, mock_rows=side**2)
        try:
            sized.check_mock(room)
        except ValueError:  # Sequences, or bounds, are too small for it.
            continue
        return sized
    return outline


@dataclass(frozen=True, kw_only=True, slots=True)
class _OutlinedImages(ImageInput):
    """Images of which nothing but the sizes is read."""

    def encode(
        self, source: Any, shape: Any, *, with_content: bool
    ) -> tuple[EncodedImage, str | None]:
        return ImageInput.encode(self, source, shape, with_content=False)

    def pack(
        self, items: Sequence[EncodedImage | EncodedVideo], seeds: Sequence[int]
    ) -> PackedImages | None:
        images = [item for item in items if isinstance(item, EncodedImage)]
        if len(images) < len(items):  # Videos have their frames.
            return ImageInput.pack(self, [_blank(item, self.config) for item in items], seeds)
        if not items:
            return None
        grids = [grid for item in images for grid in item.grids]
        patches = sum(rows * columns for rows, columns in grids)
        width = 3 * self.config.patch_dim**2
        # One number that stands at every place.
        return pack_patches(torch.zeros(1, 1).expand(patches, width), grids, self.config)


def _blank(item: EncodedImage | EncodedVideo, config: ImageConfig) -> EncodedImage | EncodedVideo:
    if isinstance(item, EncodedVideo):
        return item
    patches = sum(rows * columns for rows, columns in item.grids)
    return replace(item, patches=np.zeros((patches, 3 * config.patch_dim**2), np.uint8))


def _as_mock(config: DataConfig) -> DataConfig:
    """The same settings for mock samples, which are not packed by a reader."""
    return replace(config, provider="mock", path=None, packing_buffer_size=None)


def _sample(config: DataConfig, tokenizer: Tokenizer, content: tuple[str, ...]) -> EncodedSample:
    """A mock sample with items of as many modules as any has."""
    config = replace(config, text_only_fraction=0.0)
    best: EncodedSample | None = None
    reason = ""
    for index in range(_TRIES):
        outcome = try_encode(
            mock_sample(index, Split.TRAIN, config), config, tokenizer, content=content
        )
        if not isinstance(outcome, EncodedSample):
            reason = outcome.message if isinstance(outcome, RejectedSample) else outcome.reason
        elif best is None or len(outcome.items) > len(best.items):
            best = outcome
        if best is not None and len(best.items) == len(config.hosts):
            break
    if best is None:
        raise ValueError(f"no sample of a dry run can be made: {reason}")
    return best


def _filling(sample: EncodedSample, seq_length: int) -> Iterator[EncodedSample]:
    """As many copies of a sample as a sequence holds, one at least."""
    for number in range(max(1, seq_length // sample.num_positions)):
        yield replace(sample, key=f"{sample.key}-{number}")


class _Repeated(LaneStream):
    """A stream of one sequence."""

    def __init__(self, documents: tuple[EncodedSample, ...]) -> None:
        self._drawn = Drawn(documents=documents)

    def __next__(self) -> Drawn:
        return self._drawn

    def state(self) -> Mapping[str, int]:
        """Nothing to continue from."""
        return {}

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Nothing to continue from."""
