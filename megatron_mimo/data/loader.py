"""From streams of encoded samples, one per lane, to the data of a step."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.batch import Microbatch, StepData, StepLoader, TextBatch
from megatron_mimo.data.config import DataConfig, DataRole
from megatron_mimo.data.mock import Split, mock_sample
from megatron_mimo.data.sample import (
    EncodedSample,
    Outcome,
    RawSample,
    RejectedSample,
    SkippedSample,
    try_encode,
)
from megatron_mimo.data.stream import IndexedStream, LaneStream
from megatron_mimo.data.tokenizer import Tokenizer
from megatron_mimo.data.trace import SampleTrace
from megatron_mimo.images import EncodedImage, pack_images
from megatron_mimo.topology import assign_images

_logger = logging.getLogger(__name__)
# Skips beyond the first few are reported once in a while only.
_SKIPS_LOGGED_EACH = 10
_SKIPS_LOGGED_EVERY = 100


def build_train_loader(
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
    *,
    trace: SampleTrace | None = None,
) -> "StreamLoader":
    """Endless steps of training samples.

    Args:
        config: Where samples come from.
        role: What this rank needs of a step.
        tokenizer: Of the texts.
        trace: Records the sample keys of every step.

    Raises:
        ValueError: The dataset is missing or not prepared, or the batch sizes do not divide.
    """
    return _build(config, role, tokenizer, Split.TRAIN, trace)


def build_eval_loader(config: DataConfig, role: DataRole, tokenizer: Tokenizer) -> "StreamLoader":
    """Steps of the val split, in the same order from its start at each call; endless.

    Args:
        config: Where samples come from.
        role: What this rank needs of a step.
        tokenizer: Of the texts.

    Raises:
        ValueError: The dataset is missing, not prepared or without a val split, or the batch sizes
            do not divide.
    """
    return _build(config, role, tokenizer, Split.VAL, None)


def build_list_loader(
    samples: Sequence[RawSample],
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
) -> "StreamLoader":
    """Steps over given samples, in their order; after the last the first follows again.

    Sample `s * GBS + m * (L * B) + l * B + j` is the j-th of lane l in microbatch m of step s, as
    with mock data.

    Args:
        samples: At least one.
        config: Batch sizes, sequence length and image sizes.
        role: What this rank needs of a step.
        tokenizer: Of the texts.
    """
    if not samples:
        raise ValueError("no samples to evaluate: expected at least one")
    config = _without_augmentation(config)
    with_patches = role.encoder_rank is not None

    def make(index: int) -> Outcome:
        raw = samples[index % len(samples)]
        return try_encode(raw, config, tokenizer, with_patches=with_patches)

    streams = {lane: IndexedStream(make, lane, role.num_lanes, config) for lane in role.lanes}
    return StreamLoader(streams, config, role, tokenizer)


def _build(
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
    split: Split,
    trace: SampleTrace | None,
) -> "StreamLoader":
    if split is not Split.TRAIN:
        config = _without_augmentation(config)
    with_patches = role.encoder_rank is not None
    streams: dict[int, LaneStream]
    if config.provider == "mock":

        def make(index: int) -> Outcome:
            raw = mock_sample(index, split, config)
            return try_encode(raw, config, tokenizer, with_patches=with_patches)

        streams = {lane: IndexedStream(make, lane, role.num_lanes, config) for lane in role.lanes}
    else:
        # energon takes a second to import; only runs that use it pay.
        from megatron_mimo.data.energon import eval_stream, train_stream

        stream = train_stream if split is Split.TRAIN else eval_stream
        streams = {
            lane: stream(config, lane, role.num_lanes, tokenizer, with_patches=with_patches)
            for lane in role.lanes
        }
    return StreamLoader(streams, config, role, tokenizer, trace=trace)


def _without_augmentation(config: DataConfig) -> DataConfig:
    return replace(config, image=replace(config.image, position_crop=False))


class StreamLoader(StepLoader):
    """Collates the streams of the lanes that a rank reads.

    Args:
        streams: Lane -> outcomes of its samples, endless.
        config: Batch sizes and sequence length.
        role: What this rank needs.
        tokenizer: Padding.
        trace: Records the sample keys of every step.

    Attributes:
        num_skipped: Unreadable samples left out so far, over the lanes read here.
    """

    def __init__(
        self,
        streams: Mapping[int, LaneStream],
        config: DataConfig,
        role: DataRole,
        tokenizer: Tokenizer,
        *,
        trace: SampleTrace | None = None,
    ) -> None:
        assert sorted(streams) == sorted(role.lanes), (sorted(streams), role.lanes)
        self._streams = streams
        self._config = config
        self._role = role
        self._pad_id = tokenizer.pad_id
        self._image_token_id = tokenizer.image_token_id
        self._num_microbatches = config.num_microbatches(role.num_lanes)
        self._trace = trace
        self._step = 0
        self.num_skipped = 0

    def state(self) -> dict[int, Any]:
        """What `restore` needs, by lane; of every lane that this rank reads."""
        return {
            lane: {"step": self._step, "stream": stream.state()}
            for lane, stream in self._streams.items()
        }

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """Go on where `state` was taken; before the first step.

        Args:
            lanes: The states of all lanes of the run that was stopped.

        Raises:
            ValueError: They do not fit this run's readers; says what to keep.
        """
        states = [lanes[lane] for lane in sorted(lanes)]
        self._step = states[0]["step"]
        for lane, stream in self._streams.items():
            stream.restore(lane, [state["stream"] for state in states])

    def next_step(self) -> StepData:
        """Draw the next global batch's share of this rank.

        Raises:
            ValueError: A sample contradicts itself or the settings, a lane ran dry, or too many
                samples in a row are unreadable; names the sample, the dataset and the shard.
        """
        digests = {lane: hashlib.blake2b(digest_size=8) for lane in self._role.lanes}
        keys: dict[int, list[str]] = {lane: [] for lane in self._role.lanes}
        targets = dict.fromkeys(self._role.lanes, 0)
        microbatches = []
        for index in range(self._num_microbatches):
            samples = {
                lane: [self._draw(lane) for _ in range(self._config.micro_batch_size)]
                for lane in sorted(self._role.lanes)
            }
            microbatch = self._collate(index, samples)
            for lane, drawn in samples.items():
                keys[lane] += microbatch.keys[lane]
                targets[lane] += sum(sample.target_tokens for sample in drawn)
                digests[lane].update(_identity(microbatch, lane))
            microbatches.append(microbatch)
        if self._trace is not None:
            self._trace.write(keys)
        self._step += 1
        return StepData(
            microbatches=tuple(microbatches),
            lane_digest={
                lane: int.from_bytes(digest.digest(), "little") >> 1
                for lane, digest in digests.items()
            },
            lane_target_tokens=targets,
        )

    def _draw(self, lane: int) -> EncodedSample:
        """The lane's next sequence."""
        drawn = next(self._streams[lane], None)
        if drawn is None:
            raise ValueError(
                f"lane {lane} of {self._role.num_lanes} ran out of samples: the dataset is "
                f"too small for this many lanes and --num-workers {self._config.num_workers}; "
                f"lower one of them, or add samples"
            )
        if isinstance(drawn, RejectedSample):
            raise ValueError(drawn.message)
        for skipped in drawn.skipped:
            self._report_skip(lane, skipped)
        (document,) = drawn.documents
        return document

    def _report_skip(self, lane: int, skipped: SkippedSample) -> None:
        self.num_skipped += 1
        if self.num_skipped > _SKIPS_LOGGED_EACH and self.num_skipped % _SKIPS_LOGGED_EVERY:
            return
        _logger.warning(
            "lane %d skips sample %r of %s: %s (%d skipped so far)",
            lane,
            skipped.key,
            skipped.source,
            skipped.reason,
            self.num_skipped,
        )

    def _image_seed(self, key: str, number: int) -> int:
        """Of an image's augmentation: another in each step, the same on whichever rank runs it."""
        name = f"{self._config.seed}/{self._step}/{key}/{number}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def _collate(self, index: int, samples: Mapping[int, Sequence[EncodedSample]]) -> Microbatch:
        """One microbatch from the samples of each lane, lanes ascending."""
        role = self._role
        manifest: list[ManifestEntry] = []
        mine: list[EncodedImage] = []
        seeds: list[int] = []
        for lane, drawn in samples.items():
            serving = role.serving.get(lane, ())
            if not serving:
                # The language model alone: image tokens are tokens like others.
                continue
            ranks = iter(assign_images(sum(len(s.images) for s in drawn), serving, index))
            for sequence, sample in enumerate(drawn):
                positions = np.flatnonzero(sample.tokens == self._image_token_id)
                rows = [image.rows for image in sample.images]
                ends = np.cumsum(rows)[:-1]
                pieces = zip(sample.images, np.split(positions, ends), strict=False)
                for number, (image, at) in enumerate(pieces):
                    rank = next(ranks)
                    manifest += [
                        ManifestEntry(lane, rank, count, sequence, start)
                        for start, count in _runs(at)
                    ]
                    if rank == role.encoder_rank:
                        mine.append(image)
                        seeds.append(self._image_seed(sample.key, number))
        return Microbatch(
            index=index,
            manifest=tuple(manifest),
            keys={lane: tuple(sample.key for sample in drawn) for lane, drawn in samples.items()},
            text=None
            if role.text_lane is None
            else collate_text(samples[role.text_lane], self._config.seq_length, self._pad_id),
            images=pack_images(mine, self._config.image, seeds),
        )


def _runs(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut ascending positions into runs of consecutive ones: (first, length)."""
    if not len(positions):
        return []
    pieces = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces]


def _identity(microbatch: Microbatch, lane: int) -> bytes:
    """What the readers of a lane must agree on: its samples, and where their rows go."""
    entries = tuple(entry for entry in microbatch.manifest if entry.lane == lane)
    return repr((microbatch.keys[lane], entries)).encode()


def collate_text(samples: Sequence[EncodedSample], seq_length: int, pad_id: int) -> TextBatch:
    """Stack token sequences, padded to S, with labels shifted by one."""
    batch = len(samples)
    input_ids = np.full((batch, seq_length), pad_id, dtype=np.int64)
    labels = np.full((batch, seq_length), pad_id, dtype=np.int64)
    loss_mask = np.zeros((batch, seq_length), dtype=np.float32)
    for i, sample in enumerate(samples):
        length = len(sample.tokens) - 1
        input_ids[i, :length] = sample.tokens[:-1]
        labels[i, :length] = sample.tokens[1:]
        loss_mask[i, :length] = sample.targets[1:]
    return TextBatch(
        sample_keys=tuple(sample.key for sample in samples),
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.arange(seq_length).expand(batch, -1).contiguous(),
    )
