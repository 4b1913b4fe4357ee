"""All lanes of a rank, read by a few processes.

A rank that reads k lanes needs k x `--num-workers` virtual workers, each with its global worker id.
They are dealt to `--loader-processes` processes, and what a worker draws returns to its lane by
that id: the number of processes never decides what a lane sees.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any, Protocol

from megatron_mimo.data.config import DataConfig, DataRole
from megatron_mimo.data.energon import OpenedSplit, VirtualWorker, energon_lock, open_split
from megatron_mimo.data.processes import Begin, ForkedIterator, Patience, fork_all
from megatron_mimo.data.sample import Draw, Drawn
from megatron_mimo.data.stream import LaneStream
from megatron_mimo.data.tokenizer import Tokenizer
from megatron_mimo.runtime.environment import cores_per_rank

# Samples after which a worker says where it stands; a run that goes on reads about as many again.
# Saying it takes as long as reading a small image.
_SNAPSHOT_EVERY = 64


def train_streams(
    config: DataConfig, role: DataRole, tokenizer: Tokenizer
) -> dict[int, LaneStream]:
    """Endless, shuffled sequences of the train split, for each lane that a rank reads.

    Args:
        config: Dataset, seed, shuffling, workers of a lane, and processes.
        role: The lanes, and whether pixels are kept.
        tokenizer: Of the texts.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no train split.
    """
    split = open_split(config, "train", tokenizer, with_patches=role.encoder_rank is not None)
    routing = Routing(role.lanes, role.num_lanes, max(1, config.num_workers))
    # What energon refuses is said before anything is forked.
    split.build(routing.workers[0], routing.num_workers)
    processes = num_processes(config, routing, cores_per_rank(os.environ))
    source: Source
    if processes:
        source = ReadingProcesses(split, routing, config, processes, _name(role))
    else:
        source = ReadingHere(split, routing)
    return {lane: RoutedStream(source, split, routing, lane) for lane in role.lanes}


def eval_streams(config: DataConfig, role: DataRole, tokenizer: Tokenizer) -> dict[int, LaneStream]:
    """Sequences of the val split, for each lane that a rank reads, in stored order; endless.

    Read in this process and by one worker a lane, whatever `num_workers` says: evaluations are
    short, and their samples then do not depend on the number of workers.

    Args:
        config: Dataset.
        role: The lanes, and whether pixels are kept.
        tokenizer: Of the texts.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no val split.
    """
    split = open_split(config, "val", tokenizer, with_patches=role.encoder_rank is not None)
    routing = Routing(role.lanes, role.num_lanes, 1)
    split.build(routing.workers[0], routing.num_workers)
    source = ReadingHere(split, routing)
    return {lane: RoutedStream(source, split, routing, lane) for lane in role.lanes}


def _name(role: DataRole) -> str:
    if role.encoder_rank is not None:
        return f"encoder dp rank {role.encoder_rank}"
    return f"lane {role.text_lane}"


# -- who reads what --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Routing:
    """The virtual workers of a rank.

    Attributes:
        lanes: That the rank reads, ascending.
        num_lanes: Of the job.
        per_lane: Workers of a lane, which take turns.
    """

    lanes: tuple[int, ...]
    num_lanes: int
    per_lane: int

    @property
    def num_workers(self) -> int:
        """Of the whole job."""
        return self.num_lanes * self.per_lane

    @property
    def workers(self) -> tuple[int, ...]:
        """Global worker ids, ascending."""
        return tuple(worker for lane in self.lanes for worker in self.of_lane(lane))

    def of_lane(self, lane: int) -> tuple[int, ...]:
        """A lane's global worker ids."""
        return tuple(range(lane * self.per_lane, (lane + 1) * self.per_lane))

    def lane(self, worker: int) -> int:
        """Where a worker's sequences go."""
        return worker // self.per_lane

    def describe(self, worker: int) -> str:
        """For messages."""
        return f"global worker {worker} (lane {self.lane(worker)})"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a virtual worker was read.

    Attributes:
        drawn: Sequences in all.
        since: The last of them, those after the snapshot.
        snapshot: The worker's state; None is its beginning.
    """

    drawn: int = 0
    since: int = 0
    snapshot: bytes | None = None


_BEGINNING = Position()
Positions = Mapping[int, Position]


def deal(routing: Routing, positions: Positions, processes: int) -> list[tuple[int, ...]]:
    """Share workers out among processes, each in the order in which its workers take turns.

    Those whose turn comes first in their lanes come first, spread over all processes.

    Args:
        routing: The workers.
        positions: Of each; the beginning where there is none.
        processes: At most as many as there are workers.
    """

    def turn(worker: int) -> tuple[int, int, int]:
        drawn = positions.get(worker, _BEGINNING).drawn
        return drawn, worker % routing.per_lane, worker

    order = sorted(routing.workers, key=turn)
    return [tuple(order[process::processes]) for process in range(processes)]


def num_processes(config: DataConfig, routing: Routing, cores: int) -> int:
    """Processes that read for a rank; 0 is to read in this one.

    Args:
        config: What the user chose.
        routing: There is no use for more than there are workers.
        cores: That the rank may keep busy; one is left to itself.
    """
    if config.num_workers == 0:
        return 0
    wanted = config.loader_processes
    if wanted is None:
        wanted = max(1, cores - 1)
    return min(wanted, len(routing.workers))


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Taken:
    """A sequence, and now and then where its worker stands behind it.

    Attributes:
        draw: None if the worker has no sample at all.
        snapshot: Of the worker.
    """

    draw: Draw | None
    snapshot: bytes | None = None


class Source(Protocol):
    """Gives the sequences of virtual workers."""

    def begin(self, positions: Positions) -> None:
        """Go on from there; before anything is taken."""
        ...

    def take(self, worker: int) -> Taken:
        """A worker's next one."""
        ...


class _Reading:
    """One virtual worker at work."""

    def __init__(self, worker: VirtualWorker, position: Position) -> None:
        self._worker = worker
        self._again = position.since
        self._samples = 0
        if position.snapshot is not None:
            worker.restore(position.snapshot)

    def take(self) -> Taken:
        """The next sequence."""
        while self._again:
            self._again -= 1
            self._draw()
        found = self._draw()
        if self._samples < _SNAPSHOT_EVERY or not isinstance(found, Drawn):
            return Taken(found)
        self._samples = 0
        return Taken(found, self._worker.snapshot())

    def _draw(self) -> Draw | None:
        found = self._worker.draw()
        if isinstance(found, Drawn):
            self._samples += len(found.documents) + len(found.skipped)
        return found


class ReadingHere:
    """Reads in this process, when asked.

    Args:
        split: The dataset.
        routing: The workers.
    """

    def __init__(self, split: OpenedSplit, routing: Routing) -> None:
        self._split = split
        self._routing = routing
        self._positions: dict[int, Position] = {}
        self._readings: dict[int, _Reading] = {}

    def begin(self, positions: Positions) -> None:
        """Go on from there; before anything is taken."""
        self._positions.update(positions)

    def take(self, worker: int) -> Taken:
        """A worker's next sequence."""
        if worker not in self._readings:
            built = self._split.build(worker, self._routing.num_workers)
            self._readings[worker] = _Reading(built, self._positions.get(worker, _BEGINNING))
        return self._readings[worker].take()


class ReadingProcesses:
    """Reads ahead in processes of its own, which start when the first sequence is taken.

    Args:
        split: The dataset.
        routing: The workers.
        config: Batch size, by which they read ahead, and how long to wait for them.
        processes: At most as many as there are workers.
        name: Of this rank, for messages.
    """

    def __init__(
        self, split: OpenedSplit, routing: Routing, config: DataConfig, processes: int, name: str
    ) -> None:
        self._split = split
        self._routing = routing
        self._num_processes = processes
        self._name = name
        self._patience = Patience(config.slow_reader_s, config.stuck_reader_s)
        self._positions: dict[int, Position] = {}
        self._process_of: dict[int, ForkedIterator] = {}
        self._waiting: dict[int, deque[Taken]] = {worker: deque() for worker in routing.workers}
        # A microbatch is drawn lane by lane.
        of_worker = -(-config.micro_batch_size // routing.per_lane)
        self._ahead = max(2, 2 * of_worker)
        # Lanes of a rank are a microbatch apart at most; twice that and a bit is a mistake.
        self._most_waiting = 2 * of_worker + 6

    def begin(self, positions: Positions) -> None:
        """Go on from there; before anything is taken."""
        self._positions.update(positions)

    def take(self, worker: int) -> Taken:
        """A worker's next sequence.

        Raises:
            RuntimeError: Its process died, failed or takes too long, or sequences of other workers
                pile up; names this rank, the process, workers and lanes.
        """
        if not self._process_of:
            self._start()
        while not self._waiting[worker]:
            other, taken = next(self._process_of[worker])
            self._waiting[other].append(taken)
            if len(self._waiting[other]) > self._most_waiting:
                raise RuntimeError(
                    f"{self._name}: {len(self._waiting[other])} sequences of "
                    f"{self._routing.describe(other)} wait while more of "
                    f"{self._routing.describe(worker)} are asked for: lanes that one rank reads "
                    f"must be drawn in step"
                )
        return self._waiting[worker].popleft()

    def _start(self) -> None:
        dealt = deal(self._routing, self._positions, self._num_processes)
        for number, workers in enumerate(dealt):
            lanes = sorted({self._routing.lane(worker) for worker in workers})
            process = ForkedIterator(
                partial(self._read, workers),
                name=f"reader process {number} of {len(dealt)} of {self._name}, with global "
                f"workers {_listed(sorted(workers))} of lanes {_listed(lanes)}",
                task_name=self._routing.describe,
                prefetch=self._ahead * len(workers),
                patience=self._patience,
            )
            self._process_of |= dict.fromkeys(workers, process)
        with energon_lock:
            fork_all(list(dict.fromkeys(self._process_of.values())))

    def _read(self, workers: Sequence[int], begin: Begin) -> Iterator[tuple[int, Taken]]:
        """In a process: its workers in turns, for ever."""
        here = ReadingHere(self._split, self._routing)
        here.begin(self._positions)
        for worker in cycle(workers):
            begin(worker)
            yield worker, here.take(worker)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# -- lanes -----------------------------------------------------------------------------------------


class RoutedStream(Iterator[Draw]):
    """A lane's sequences: its workers in turns.

    Args:
        source: Reads for all lanes of this rank.
        split: The dataset.
        routing: The workers.
        lane: This one.
    """

    def __init__(self, source: Source, split: OpenedSplit, routing: Routing, lane: int) -> None:
        self._source = source
        self._split = split
        self._routing = routing
        self._positions = dict.fromkeys(routing.of_lane(lane), _BEGINNING)

    def __next__(self) -> Draw:
        # Whose turn it is follows from what was drawn, so that it need not be known from before
        # when workers come from other lanes.
        worker = min(self._positions, key=lambda worker: (self._positions[worker].drawn, worker))
        taken = self._source.take(worker)
        if taken.draw is None:
            raise StopIteration
        at = self._positions[worker]
        self._positions[worker] = (
            Position(at.drawn + 1, at.since + 1, at.snapshot)
            if taken.snapshot is None
            else Position(at.drawn + 1, 0, taken.snapshot)
        )
        return taken.draw

    def state(self) -> dict[str, Any]:
        """Where each of the lane's workers stands, by global worker id, and of which dataset."""
        return {
            "num_samples": self._split.num_samples,
            "per_lane": self._routing.per_lane,
            "workers": {worker: asdict(at) for worker, at in self._positions.items()},
        }

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Go on where a run stopped whose lanes x workers were as many.

        Raises:
            ValueError: They were not, the dataset is another, or the checkpoint is of another kind
                of data.
        """
        found = worker_positions(lanes, self._split, self._routing)
        self._positions = {worker: found[worker] for worker in self._routing.of_lane(lane)}
        self._source.begin(self._positions)


def worker_positions(
    lanes: Sequence[Any], split: OpenedSplit, routing: Routing
) -> dict[int, Position]:
    """Where all workers of the job stopped, from the states of all its lanes.

    Raises:
        ValueError: This run cannot go on from there; says what to keep.
    """
    where = f"--data-path {split.path}"
    if any("workers" not in state for state in lanes):
        raise ValueError(
            f"{where}: the checkpoint's data was not read with energon; use --finetune to begin "
            f"with this dataset, and no --dataloader-load"
        )
    before = tuple(lanes[0]["num_samples"])
    if before != split.num_samples:
        raise ValueError(
            f"{where} has {_listed(split.num_samples)} samples, and had {_listed(before)} when "
            f"the checkpoint was written: keep the dataset as it was, or begin anew with "
            f"--finetune and without --dataloader-load"
        )
    positions = {
        worker: Position(**position)
        for state in lanes
        for worker, position in state["workers"].items()
    }
    if len(positions) != routing.num_workers:
        per_lane, rest = divmod(len(positions), routing.num_lanes)
        fits = [count for count in range(1, len(positions) + 1) if len(positions) % count == 0]
        remedy = f"set --num-workers {per_lane}"
        if rest:
            remedy = f"set --llm-dp to one of {_listed(fits)}, and --num-workers to the rest"
        raise ValueError(
            f"{where} cannot go on with --llm-dp {routing.num_lanes} --num-workers "
            f"{routing.per_lane}: the checkpoint's samples were shared by --llm-dp {len(lanes)} "
            f"x --num-workers {lanes[0]['per_lane']}, and the product must stay "
            f"{len(positions)}: {remedy}"
        )
    return positions
