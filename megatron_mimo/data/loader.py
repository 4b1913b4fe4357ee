"""From streams of encoded samples, one per lane, to the data of a step."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.batch import Microbatch, StepData, StepLoader, TextBatch
from megatron_mimo.data.collate import (
    Documents,
    collate_packed,
    collate_text,
    placed,
    require_known_fields,
    runs_of,
)
from megatron_mimo.data.config import DataConfig, DataRole
from megatron_mimo.data.mock import Split, mock_sample
from megatron_mimo.data.sample import (
    EncodedSample,
    Outcome,
    RawSample,
    RejectedSample,
    try_encode,
)
from megatron_mimo.data.skips import SkipReport
from megatron_mimo.data.stream import IndexedStream, LaneStream
from megatron_mimo.data.tokenizer import Tokenizer
from megatron_mimo.images import EncodedImage, pack_images
from megatron_mimo.topology import assign_images


def build_train_loader(
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
) -> "StreamLoader":
    """Endless steps of training samples.

    Args:
        config: Where samples come from.
        role: What this rank needs of a step.
        tokenizer: Of the texts.

    Raises:
        ValueError: The dataset is missing or not prepared, or the batch sizes do not divide.
    """
    return _build(config, role, tokenizer, Split.TRAIN)


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
    return _build(config, role, tokenizer, Split.VAL)


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
    config = replace(_without_augmentation(config), packing_buffer_size=None)
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
        from megatron_mimo.data.readers import eval_streams, train_streams

        build = train_streams if split is Split.TRAIN else eval_streams
        streams = build(config, role, tokenizer)
    return StreamLoader(streams, config, role, tokenizer)


def _without_augmentation(config: DataConfig) -> DataConfig:
    return replace(config, image=replace(config.image, position_crop=False))


class StreamLoader(StepLoader):
    """Collates the streams of the lanes that a rank reads.

    Args:
        streams: Lane -> outcomes of its samples, endless.
        config: Batch sizes and sequence length.
        role: What this rank needs.
        tokenizer: Padding.

    Attributes:
        skips: What was left out so far, over the lanes read here.
    """

    def __init__(
        self,
        streams: Mapping[int, LaneStream],
        config: DataConfig,
        role: DataRole,
        tokenizer: Tokenizer,
    ) -> None:
        assert sorted(streams) == sorted(role.lanes), (sorted(streams), role.lanes)
        self._streams = streams
        self._config = config
        self._role = role
        self._pad_id = tokenizer.pad_id
        self._image_token_id = tokenizer.image_token_id
        self._num_microbatches = config.num_microbatches(role.num_lanes)
        self._step = 0
        self.skips = SkipReport(config.max_bad_sample_fraction)

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
        targets = dict.fromkeys(self._role.lanes, 0)
        packed = self._config.packing_buffer_size is not None
        positions = dict.fromkeys(self._role.lanes if packed else (), 0)
        microbatches = []
        for index in range(self._num_microbatches):
            sequences = {
                lane: [self._draw(lane) for _ in range(self._config.micro_batch_size)]
                for lane in sorted(self._role.lanes)
            }
            microbatch = self._collate(index, sequences)
            for lane, drawn in sequences.items():
                targets[lane] += sum(d.target_tokens for documents in drawn for d in documents)
                if packed:
                    positions[lane] += sum(d.num_positions for seq in drawn for d in seq)
                digests[lane].update(_identity(microbatch, lane))
            microbatches.append(microbatch)
        self._step += 1
        return StepData(
            microbatches=tuple(microbatches),
            lane_digest={
                lane: int.from_bytes(digest.digest(), "little") >> 1
                for lane, digest in digests.items()
            },
            lane_target_tokens=targets,
            lane_positions=positions,
        )

    def _draw(self, lane: int) -> tuple[EncodedSample, ...]:
        """The documents of the lane's next sequence."""
        drawn = next(self._streams[lane], None)
        if drawn is None:
            raise ValueError(
                f"lane {lane} of {self._role.num_lanes} ran out of samples: the dataset is "
                f"too small for this many lanes and --num-workers {self._config.num_workers}; "
                f"lower one of them, or add samples"
            )
        if isinstance(drawn, RejectedSample):
            raise ValueError(drawn.message)
        for document in drawn.documents:
            require_known_fields(document, f"lane {lane}")
        self.skips.add(lane, drawn)
        return drawn.documents

    def _image_seed(self, key: str, number: int) -> int:
        """Of an image's augmentation: another in each step, the same on whichever rank runs it."""
        name = f"{self._config.seed}/{self._step}/{key}/{number}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def _collate(self, index: int, sequences: Mapping[int, Sequence[Documents]]) -> Microbatch:
        """One microbatch from the sequences of each lane, lanes ascending."""
        role = self._role
        manifest: list[ManifestEntry] = []
        mine: list[EncodedImage] = []
        seeds: list[int] = []
        for lane, drawn in sequences.items():
            serving = role.serving.get(lane, ())
            if not serving:
                # The language model alone: image tokens are tokens like others.
                continue
            number_of = sum(len(document.images) for documents in drawn for document in documents)
            ranks = iter(assign_images(number_of, serving, index))
            for (sequence, start), sample in placed(drawn):
                positions = start + np.flatnonzero(sample.tokens == self._image_token_id)
                rows = [image.rows for image in sample.images]
                ends = np.cumsum(rows)[:-1]
                pieces = zip(sample.images, np.split(positions, ends), strict=False)
                for number, (image, at) in enumerate(pieces):
                    rank = next(ranks)
                    manifest += [
                        ManifestEntry(lane, rank, count, sequence, first)
                        for first, count in runs_of(at)
                    ]
                    if rank == role.encoder_rank:
                        mine.append(image)
                        seeds.append(self._image_seed(sample.key, number))
        return Microbatch(
            index=index,
            manifest=tuple(manifest),
            keys={
                lane: tuple(sample.key for _, sample in placed(drawn))
                for lane, drawn in sequences.items()
            },
            text=self._collate_text(sequences),
            images=pack_images(mine, self._config.image, seeds),
            starts={
                lane: tuple(place for place, _ in placed(drawn))
                for lane, drawn in sequences.items()
            },
        )

    def _collate_text(self, sequences: Mapping[int, Sequence[Documents]]) -> TextBatch | None:
        lane, seq_length = self._role.text_lane, self._config.seq_length
        if lane is None:
            return None
        if self._config.packing_buffer_size is None:
            samples = [sample for _, sample in placed(sequences[lane])]
            return collate_text(samples, seq_length, self._pad_id)
        (documents,) = sequences[lane]
        return collate_packed(documents, seq_length, self._pad_id)


def _identity(microbatch: Microbatch, lane: int) -> bytes:
    """What the readers of a lane must agree on: its samples, and where they and their rows go."""
    entries = tuple(entry for entry in microbatch.manifest if entry.lane == lane)
    return repr((microbatch.keys[lane], microbatch.starts[lane], entries)).encode()
