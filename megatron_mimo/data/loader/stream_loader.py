"""Conversion of streams of encoded samples, one per lane, to the data of a step."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import ENCODER, Item, PackedInput
from megatron_mimo.data.loader.batch import Microbatch, StepData, StepLoader, TextBatch
from megatron_mimo.data.loader.collate import (
    Documents,
    collate_facts,
    collate_packed,
    collate_text,
    placed,
    require_known_fields,
    runs_of,
)
from megatron_mimo.data.loader.wire import WireTypes, require_sendable
from megatron_mimo.data.reading.stream import IndexedStream, LaneStream
from megatron_mimo.data.role import DataRole
from megatron_mimo.data.samples.mock import Split, mock_sample
from megatron_mimo.data.samples.sample import (
    EncodedSample,
    Outcome,
    RawSample,
    RejectedSample,
    try_encode,
)
from megatron_mimo.data.samples.skips import SkipReport
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.topology import assign_items


def build_train_loader(
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
) -> "StreamLoader":
    """Endless steps of training samples.

    Args:
        config: Settings of the data.
        role: Part of a step that this rank needs.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: The dataset is missing or not prepared, or the batch sizes do not divide.
    """
    return _build(config, role, tokenizer, Split.TRAIN)


def build_eval_loader(config: DataConfig, role: DataRole, tokenizer: Tokenizer) -> "StreamLoader":
    """Steps of the val split, in the same order from its start at each call; endless.

    Args:
        config: Settings of the data.
        role: Part of a step that this rank needs.
        tokenizer: Tokenizer of the texts.

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
    """Endless steps over given samples in their order, repeated after the last one.

    Sample `s * GBS + m * (L * B) + l * B + j` is the j-th of lane l in microbatch m of step s, as
    with mock data.

    Args:
        samples: Stored samples, at least one.
        config: Batch sizes, sequence length and kinds of items.
        role: Part of a step that this rank needs.
        tokenizer: Tokenizer of the texts.
    """
    if not samples:
        raise ValueError("no samples to evaluate: expected at least one")
    config = replace(config.without_augmentation(), packing_buffer_size=None)

    def make(index: int) -> Outcome:
        raw = samples[index % len(samples)]
        return try_encode(raw, config, tokenizer, content=role.runs)

    streams = {lane: IndexedStream(make, lane, role.num_lanes, config) for lane in role.lanes}
    return StreamLoader(streams, config, role, tokenizer)


def _build(
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
    split: Split,
) -> "StreamLoader":
    if split is not Split.TRAIN:
        config = config.without_augmentation()
    streams: dict[int, LaneStream]
    if config.provider == "mock":

        def make(index: int) -> Outcome:
            raw = mock_sample(index, split, config)
            return try_encode(raw, config, tokenizer, content=role.runs)

        streams = {lane: IndexedStream(make, lane, role.num_lanes, config) for lane in role.lanes}
    else:
        # energon takes a second to import; only runs that use it import it.
        from megatron_mimo.data.reading.readers import eval_streams, train_streams

        build = train_streams if split is Split.TRAIN else eval_streams
        streams = build(config, role, tokenizer)
    return StreamLoader(streams, config, role, tokenizer)


class _PlacedItem(NamedTuple):
    """An item of a microbatch.

    Attributes:
        item: Encoded item.
        seed: Seed of its augmentation.
        sequence: Index of its sequence in the microbatch.
        positions: Positions of its rows in the sequence, int64 [rows].
    """

    item: Item
    seed: int
    sequence: int
    positions: NDArray[np.int64]


class StreamLoader(StepLoader):
    """Collates the streams of the lanes that a rank reads.

    Args:
        streams: Lane -> endless stream of the outcomes of its samples.
        config: Batch sizes and sequence length.
        role: Part of a step that this rank needs.
        tokenizer: Tokenizer with the numbers of the padding and placeholder tokens.

    Attributes:
        skips: Counts of the skipped samples so far, over the lanes that this rank reads.

    Raises:
        ValueError: A module that feeds the language model has no input in the settings.
    """

    def __init__(
        self,
        streams: Mapping[int, LaneStream],
        config: DataConfig,
        role: DataRole,
        tokenizer: Tokenizer,
    ) -> None:
        assert sorted(streams) == sorted(role.lanes), (sorted(streams), role.lanes)
        lacking = [module for module in role.sources if module not in config.inputs]
        if lacking:
            raise ValueError(
                f"module {lacking[0]!r} feeds the language model, but the data has no input of "
                f"that name: expected one for each of {', '.join(role.sources)}, and has "
                f"{', '.join(config.inputs) or 'none'}"
            )
        self._streams = streams
        self._types = WireTypes.of(config.inputs)
        # Modules whose first packed input has been found fit to be sent.
        self._sendable: set[str] = set()
        self._config = config
        self._role = role
        self._pad_id = tokenizer.pad_id
        self._token_ids = tokenizer.placeholder_ids
        self._num_microbatches = config.num_microbatches(role.num_lanes)
        self._step = 0
        self.skips = SkipReport(config.max_bad_sample_fraction)

    def _checked(self, module: str, packed: PackedInput) -> PackedInput:
        """A packed input; the first of a module must be one that other ranks could receive.

        Whether a run fails on it does then not depend on the layout.
        """
        if module not in self._sendable:
            kind = self._config.inputs[module].packed_type
            require_sendable(packed, kind, module, self._types)
            self._sendable.add(module)
        return packed

    def state(self) -> dict[int, Any]:
        """State for `restore`, by lane, for every lane that this rank reads."""
        return {
            lane: {"step": self._step, "stream": stream.state()}
            for lane, stream in self._streams.items()
        }

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """Continue from where `state` was taken; call it before the first step.

        Args:
            lanes: States of all lanes of the run that was stopped.

        Raises:
            ValueError: The states do not fit this run's readers; the message says what to keep.
        """
        try:
            states = [lanes[lane] for lane in sorted(lanes)]
            self._step = states[0]["step"]
            for lane, stream in self._streams.items():
                stream.restore(lane, [state["stream"] for state in states])
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"the checkpoint does not say where the data stood ({type(error).__name__}: "
                f"{error}): go back to another, or start again with --finetune and without "
                f"--dataloader-load"
            ) from error

    def next_step(self) -> StepData:
        """Draw the next global batch's share of this rank.

        Raises:
            ValueError: A sample contradicts itself or the settings, a lane has no more samples, or
                too many in a row are unreadable; the message names sample, dataset and shard.
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
            require_known_fields(document, f"lane {lane}", self._config.inputs)
        self.skips.add(lane, drawn)
        return drawn.documents

    def _item_seed(self, module: str, key: str, number: int) -> int:
        """Seed of an item's augmentation: different in each step, equal on every rank."""
        # Seeds of "encoder" are those of versions without other modules, so that runs continue.
        item = number if module == ENCODER else f"{module}/{number}"
        name = f"{self._config.seed}/{self._step}/{key}/{item}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def _collate(self, index: int, sequences: Mapping[int, Sequence[Documents]]) -> Microbatch:
        """One microbatch from the sequences of each lane, lanes ascending."""
        manifest: list[ManifestEntry] = []
        inputs: dict[str, PackedInput] = {}
        for module, source in self._role.sources.items():
            mine: list[Item] = []
            seeds: list[int] = []
            for lane, drawn in sequences.items():
                placed_items = list(self._items_of(module, drawn))
                ranks = assign_items(len(placed_items), source.serving[lane], index)
                for rank, (item, seed, sequence, at) in zip(ranks, placed_items, strict=True):
                    manifest += [
                        ManifestEntry(
                            module=module,
                            source_rank=rank,
                            lane=lane,
                            rows=count,
                            sequence=sequence,
                            start=first,
                        )
                        for first, count in runs_of(at)
                    ]
                    if rank == source.rank:
                        mine.append(item)
                        seeds.append(seed)
            packed = self._config.inputs[module].pack(mine, seeds)
            if packed is not None:
                inputs[module] = self._checked(module, packed)
        manifest.sort(key=lambda entry: (entry.lane, entry.sequence, entry.start))
        return Microbatch(
            index=index,
            manifest=tuple(manifest),
            keys={
                lane: tuple(sample.key for _, sample in placed(drawn))
                for lane, drawn in sequences.items()
            },
            text=self._collate_text(sequences),
            inputs=inputs,
            starts={
                lane: tuple(place for place, _ in placed(drawn))
                for lane, drawn in sequences.items()
            },
        )

    def _items_of(self, module: str, drawn: Sequence[Documents]) -> Iterator[_PlacedItem]:
        """The items of a module in a lane's sequences, in order."""
        for (sequence, start), sample in placed(drawn):
            items = sample.items.get(module, ())
            positions = start + np.flatnonzero(sample.tokens == self._token_ids[module])
            ends = np.cumsum([item.rows for item in items])[:-1]
            for number, (item, at) in enumerate(
                zip(items, np.split(positions, ends), strict=False)
            ):
                seed = self._item_seed(module, sample.key, number)
                yield _PlacedItem(item, seed, sequence, at)

    def _collate_text(self, sequences: Mapping[int, Sequence[Documents]]) -> TextBatch | None:
        lane, seq_length = self._role.text_lane, self._config.seq_length
        if lane is None:
            return None
        samples = [sample for _, sample in placed(sequences[lane])]
        if self._config.packing_buffer_size is None:
            text = collate_text(samples, seq_length, self._pad_id)
        else:
            (documents,) = sequences[lane]
            text = collate_packed(documents, seq_length, self._pad_id)
        return replace(text, facts=collate_facts(samples, self._config.inputs))


def _identity(microbatch: Microbatch, lane: int) -> bytes:
    """Facts that the readers of a lane must agree on: samples, their positions, and their rows."""
    entries = tuple(entry for entry in microbatch.manifest if entry.lane == lane)
    return repr((microbatch.keys[lane], microbatch.starts[lane], entries)).encode()
