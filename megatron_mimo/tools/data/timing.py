"""The loader of training with a clock at the borders of its stages."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig, stateless

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import ItemInput
from megatron_mimo.data.loader.sequences import SequenceDataset
from megatron_mimo.data.loader.stream_loader import StreamLoader
from megatron_mimo.data.reading.capacity import check_capacity
from megatron_mimo.data.reading.energon import open_split
from megatron_mimo.data.reading.readers import ReadingHere, RoutedStream, Routing
from megatron_mimo.data.reading.stream import LaneStream
from megatron_mimo.data.reading.task_encoder import Media, MimoTaskEncoder
from megatron_mimo.data.role import DataRole
from megatron_mimo.data.samples.sample import Draw, Drawn
from megatron_mimo.data.text.tokenizer import Tokenizer


class Stage(StrEnum):
    """Stage of a loader; the last one runs in the training process, a step ahead."""

    READ = "read"
    DECODE = "decode"
    TOKENISE = "tokenise"
    PACK = "pack"
    COLLATE = "collate"


class StageClock:
    """Seconds of each stage: time counts for the innermost stage that has begun.

    Attributes:
        seconds: Seconds so far of each stage that has ended or was interrupted.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(Stage, 0.0)
        self._open: list[Stage] = []
        self._since = 0.0

    @contextmanager
    def of(self, stage: Stage) -> Iterator[None]:
        """Count the time inside for a stage."""
        self._turn()
        self._open.append(stage)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class TimedLoader:
    """Reads training samples in this process, sequence by sequence, and times the stages.

    It is put together from the classes of training; the clock is at the borders between them.

    Args:
        config: Settings of the data.
        role: Part of a step that is read, of one lane.
        tokenizer: Tokenizer of the texts.

    Attributes:
        clock: Seconds of each stage so far.
        dataset_size: Number of samples of the split.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no train split.
    """

    def __init__(self, config: DataConfig, role: DataRole, tokenizer: Tokenizer) -> None:
        self.clock = StageClock()
        inputs = {name: _TimedItems(kind, self.clock) for name, kind in config.inputs.items()}
        timed = replace(
            config, micro_batch_size=1, global_batch_size=1, num_workers=1, inputs=inputs
        )
        encoder = _TimedEncoder(timed, tokenizer, content=role.runs, clock=self.clock)
        split = open_split(timed, "train", tokenizer, content=role.runs, encoder=encoder)
        check_capacity(timed, split.num_samples, 1, 1)
        routing = Routing((0,), 1, 1)
        stream = RoutedStream(ReadingHere(split, routing), split, routing, 0)
        self._stream = _TimedStream(stream, self.clock)
        streams: dict[int, LaneStream] = {0: self._stream}
        self._loader = StreamLoader(streams, timed, role, tokenizer)
        self.dataset_size = sum(split.num_samples)

    def next_sequence(self) -> Drawn:
        """The documents of the next sequence, after they have become a microbatch.

        Raises:
            ValueError: A sample contradicts the settings, or a shard cannot be read.
        """
        with self.clock.of(Stage.COLLATE):
            self._loader.next_step()
        assert self._stream.last is not None
        return self._stream.last


class _TimedStream:
    """A lane's stream, whose time is that of reading unless a stage inside has its own."""

    def __init__(self, stream: RoutedStream, clock: StageClock) -> None:
        self._stream, self._clock = stream, clock
        self.last: Drawn | None = None

    def __next__(self) -> Draw:
        with self._clock.of(Stage.READ):
            found = next(self._stream)
        if isinstance(found, Drawn):
            self.last = found
        return found

    def state(self) -> Any:
        return self._stream.state()

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        self._stream.restore(lane, lanes)


class _TimedItems:
    """A kind of items whose decoding is timed; all else is the kind's own."""

    def __init__(self, kind: ItemInput, clock: StageClock) -> None:
        self._kind, self._clock = kind, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)

    def among(self, count: int) -> "_TimedItems":
        return _TimedItems(self._kind.among(count), self._clock)

    def encode(self, source: Any, shape: Any, *, with_content: bool) -> Any:
        with self._clock.of(Stage.DECODE):
            return self._kind.encode(source, shape, with_content=with_content)

    def examine(self, source: Any) -> Any:
        with self._clock.of(Stage.DECODE):
            return self._kind.examine(source)


class _TimedMedia:
    """Files that samples name by path; reading them counts as reading."""

    def __init__(self, media: Media, clock: StageClock) -> None:
        self._media, self._clock = media, clock

    @property
    def folder(self) -> object:
        return self._media.folder

    def read(self, path: str, what: str) -> bytes:
        with self._clock.of(Stage.READ):
            return self._media.read(path, what)


class _TimedEncoder(MimoTaskEncoder):
    """Encodes as training does, and times what it does."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        content: Collection[str],
        clock: StageClock,
    ) -> None:
        super().__init__(config, tokenizer, content=content)
        self._clock = clock

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Any:
        """Parse, check and encode a sample."""
        with self._clock.of(Stage.TOKENISE):
            return super().encode_sample(sample)

    def _media(self, store: Any) -> Media:
        return _TimedMedia(super()._media(store), self._clock)

    def build_batch(
        self,
        dataset: SavableDataset[Any],
        *,
        batch_size: int | None,
        batch_drop_last: bool = False,
        packing_buffer_size: int | None = None,
        worker_config: WorkerConfig,
    ) -> SavableDataset[Any]:
        """The last stage that energon builds: packing, with a clock, or nothing."""
        built = super().build_batch(
            dataset,
            batch_size=batch_size,
            batch_drop_last=batch_drop_last,
            packing_buffer_size=packing_buffer_size,
            worker_config=worker_config,
        )
        if isinstance(built, SequenceDataset):
            _time_packing(built, self._clock)
        return built


def _time_packing(dataset: SequenceDataset, clock: StageClock) -> None:
    """Let the two steps of packing count as such; the samples that it draws are read before."""
    steps: Mapping[str, Any] = {
        name: getattr(dataset, name) for name in ("_begin_round", "_next_sequence")
    }

    def timed(step: Any) -> Any:
        def run() -> Any:
            with clock.of(Stage.PACK):
                return step()

        return run

    for name, step in steps.items():
        setattr(dataset, name, timed(step))
