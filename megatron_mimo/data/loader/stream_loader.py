"""Conversion of streams of encoded samples, one per lane, to the data of a step."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import ENCODER, PackedInput
from megatron_mimo.data.loader.batch import Microbatch, ReadingLoader, StepData, TextBatch
from megatron_mimo.data.loader.collate import (
    Documents,
    collate_facts,
    collate_packed,
    collate_text,
    packed_lengths,
    placed,
    require_known_fields,
    runs_of,
)
from megatron_mimo.data.loader.drawn import (
    Dispatcher,
    DrawnStep,
    ItemPlace,
    LaneDispatcher,
    LaneSamples,
    PlacedItem,
    Share,
    Work,
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


def build_train_loader(
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
    dispatcher: Dispatcher | None = None,
) -> "StreamLoader":
    """Endless steps of training samples.

    Args:
        config: Settings of the data.
        role: Part of a step that this rank needs.
        tokenizer: Tokenizer of the texts.
        dispatcher: What decides who runs an item; None for the ranks that serve its lane.

    Raises:
        ValueError: The dataset is missing or not prepared, or the batch sizes do not divide.
    """
    return _build(config, role, tokenizer, Split.TRAIN, dispatcher)


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
    dispatcher: Dispatcher | None = None,
) -> "StreamLoader":
    """Endless steps over given samples in their order, repeated after the last one.

    Sample `s * GBS + m * (L * B) + l * B + j` is the j-th of lane l in microbatch m of step s, as
    with mock data.

    Args:
        samples: Stored samples, at least one.
        config: Batch sizes, sequence length and kinds of items.
        role: Part of a step that this rank needs.
        tokenizer: Tokenizer of the texts.
        dispatcher: What decides who runs an item; None for the ranks that serve its lane.
    """
    if not samples:
        raise ValueError("no samples to evaluate: expected at least one")
    config = replace(config.without_augmentation(), packing_buffer_size=None)

    def make(index: int) -> Outcome:
        raw = samples[index % len(samples)]
        return try_encode(raw, config, tokenizer, content=role.runs)

    streams = {lane: IndexedStream(make, lane, role.num_lanes, config) for lane in role.lanes}
    return StreamLoader(streams, config, role, tokenizer, dispatcher)


def _build(
    config: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
    split: Split,
    dispatcher: Dispatcher | None = None,
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
    return StreamLoader(streams, config, role, tokenizer, dispatcher)


class StreamLoader(ReadingLoader):
    """Collates the streams of the lanes that a rank reads.

    Args:
        streams: Lane -> endless stream of the outcomes of its samples.
        config: Batch sizes and sequence length.
        role: Part of a step that this rank needs.
        tokenizer: Tokenizer with the numbers of the padding and placeholder tokens.
        dispatcher: What decides who runs an item; None for the ranks that serve its lane.

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
        dispatcher: Dispatcher | None = None,
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
        self._dispatcher = dispatcher or LaneDispatcher(role)
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
                too many in a row are unreadable; the message names sample, dataset and shard. Or a
                rank that decides with this one cannot go on, for such a reason.
            EndOfSteps: A rank that decides with this one takes no further step.
        """
        try:
            drawn = [self._draw_microbatch() for _ in range(self._num_microbatches)]
            step = self._placed(drawn)
        except Exception as error:
            self.fail(error)
            raise
        dispatched = self._dispatcher.dispatch(step)
        self._step += 1
        documents = {
            lane: [d for sequences in drawn for documents in sequences[lane] for d in documents]
            for lane in self._role.lanes
        }
        packed = self._config.packing_buffer_size is not None
        return StepData(
            microbatches=tuple(
                self._collate(index, share, sequences)
                for index, (share, sequences) in enumerate(
                    zip(dispatched.shares, drawn, strict=True)
                )
            ),
            lane_digest=dict(step.digests),
            lane_target_tokens={
                lane: sum(document.target_tokens for document in of_lane)
                for lane, of_lane in documents.items()
            },
            lane_positions={
                lane: sum(document.num_positions for document in of_lane)
                for lane, of_lane in documents.items()
                if packed
            },
            balanced=dispatched.balanced,
            dispatch=dispatched.report,
        )

    def fail(self, error: Exception) -> None:
        """Tell the ranks that decide with this one that it cannot go on, unless they know."""
        self._dispatcher.fail(error)

    def end(self) -> None:
        """Tell the ranks that decide with this one that it takes no further step."""
        self._dispatcher.end()

    def _draw_microbatch(self) -> dict[int, list[Documents]]:
        """The sequences of each lane, lanes ascending."""
        return {
            lane: [self._draw(lane) for _ in range(self._config.micro_batch_size)]
            for lane in sorted(self._role.lanes)
        }

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

    def _placed(self, drawn: Sequence[Mapping[int, Sequence[Documents]]]) -> DrawnStep:
        """Samples and items of the sequences of each microbatch and lane."""
        samples = {
            lane: [self._samples_of(sequences[lane]) for sequences in drawn]
            for lane in self._role.lanes
        }
        items = {
            module: [
                item
                for m, sequences in enumerate(drawn)
                for lane, of_lane in sequences.items()
                for item in self._items_of(module, of_lane, m, lane)
            ]
            for module in self._role.sources
        }
        return DrawnStep(
            num_microbatches=len(drawn),
            samples=samples,
            items=items,
            digests={lane: _digest(lane, samples[lane], items) for lane in self._role.lanes},
        )

    def _collate(
        self, index: int, share: Share, sequences: Mapping[int, Sequence[Documents]]
    ) -> Microbatch:
        """One microbatch from this rank's share of it and the sequences of each lane."""
        inputs: dict[str, PackedInput] = {}
        for module, work in share.work.items():
            items, seeds = [each.item for each in work], [each.seed for each in work]
            packed = self._config.inputs[module].pack(items, seeds)
            if packed is not None:
                inputs[module] = self._checked(module, packed)
        return Microbatch(
            index=index,
            manifest=share.manifest,
            keys={lane: of_lane.keys for lane, of_lane in share.samples.items()},
            text=self._collate_text(sequences),
            inputs=inputs,
            starts={lane: of_lane.starts for lane, of_lane in share.samples.items()},
            documents={
                lane: of_lane.lengths for lane, of_lane in share.samples.items() if of_lane.lengths
            },
            network_rows=share.network_rows,
        )

    def _samples_of(self, sequences: Sequence[Documents]) -> LaneSamples:
        found = list(placed(sequences))
        lengths: tuple[int, ...] = ()
        if self._config.packing_buffer_size is not None:
            (documents,) = sequences
            lengths = packed_lengths(documents, self._config.seq_length)
        return LaneSamples(
            keys=tuple(sample.key for _, sample in found),
            starts=tuple(place for place, _ in found),
            lengths=lengths,
        )

    def _items_of(
        self, module: str, drawn: Sequence[Documents], microbatch: int, lane: int
    ) -> Iterator[PlacedItem]:
        """The items of a module in a lane's sequences, in order."""
        for (sequence, start), sample in placed(drawn):
            items = sample.items.get(module, ())
            positions = start + np.flatnonzero(sample.tokens == self._token_ids[module])
            ends = np.cumsum([item.rows for item in items])[:-1]
            for number, (item, at) in enumerate(
                zip(items, np.split(positions, ends), strict=False)
            ):
                yield PlacedItem(
                    ItemPlace(microbatch, lane, sequence, tuple(runs_of(at))),
                    Work(item, self._item_seed(module, sample.key, number)),
                )

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


def _digest(
    lane: int, samples: Sequence[LaneSamples], items: Mapping[str, Sequence[PlacedItem]]
) -> int:
    """63-bit hash of what readers of a lane must agree on: samples, positions, and rows.

    Who runs an item follows from these. Lengths of documents are among them, as they say which rank
    takes which row.
    """
    digest = hashlib.blake2b(digest_size=8)
    for of_microbatch in samples:
        facts = (of_microbatch.keys, of_microbatch.starts, of_microbatch.lengths)
        digest.update(repr(facts).encode())
    for module, of_module in items.items():
        places = [item.place for item in of_module if item.place.lane == lane]
        digest.update(repr((module, [(m, at, runs) for m, _, at, runs in places])).encode())
    return int.from_bytes(digest.digest(), "little") >> 1
