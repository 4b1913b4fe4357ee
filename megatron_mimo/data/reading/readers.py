"""All lanes of a rank, read by a few processes.

A rank that reads k lanes needs k x `--num-workers` virtual workers, each with its global worker id.
They are distributed to `--loader-processes` processes, and samples of a worker return to its lane
by that id: the samples of a lane do not depend on the number of processes.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any, Protocol

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.capacity import check_capacity
from megatron_mimo.data.reading.energon import OpenedSplit, VirtualWorker, energon_lock, open_split
from megatron_mimo.data.reading.processes import Begin, ForkedIterator, Patience, fork_all
from megatron_mimo.data.reading.stream import LaneStream
from megatron_mimo.data.role import DataRole
from megatron_mimo.data.samples.sample import Draw, Drawn
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.runtime.environment import cores_per_rank

# Number of samples after which a worker reports its state; a run that continues reads about as many
# again. A report takes as long as reading a small image.
_SNAPSHOT_EVERY = 64
# Divides by the numbers of lanes that most runs have.
_LANES_OF_MANY = 8


def train_streams(
    config: DataConfig, role: DataRole, tokenizer: Tokenizer
) -> dict[int, LaneStream]:
    """Endless, shuffled sequences of the train split, for each lane that a rank reads.

    Args:
        config: Dataset, seed, shuffling, workers of a lane, and processes.
        role: Lanes of the rank, and modules whose items are decoded.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no train split, or the settings ask
            for more workers or memory than there is.
    """
    split = open_split(config, "train", tokenizer, content=role.runs)
    routing = Routing(role.lanes, role.num_lanes, max(1, config.num_workers))
    check_capacity(config, split.num_samples, role.num_lanes, len(role.lanes))
    # Errors of energon are raised before any process is forked.
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

    They are read in this process by one worker per lane, whatever `num_workers` says: evaluations
    are short, and their samples then do not depend on the number of workers.

    Args:
        config: Settings of the data, with the dataset's path.
        role: Lanes of the rank, and modules whose items are decoded.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no val split.
    """
    split = open_split(config, "val", tokenizer, content=role.runs)
    routing = Routing(role.lanes, role.num_lanes, 1)
    split.build(routing.workers[0], routing.num_workers)
    source = ReadingHere(split, routing)
    return {lane: RoutedStream(source, split, routing, lane) for lane in role.lanes}


def _name(role: DataRole) -> str:
    names = [f"{module} dp rank {role.sources[module].rank}" for module in role.runs]
    return ", ".join(names) or f"lane {role.text_lane}"


# -- who reads what --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Routing:
    """The virtual workers of a rank.

    Attributes:
        lanes: Numbers of the lanes that the rank reads, ascending.
        num_lanes: Number of lanes of the job.
        per_lane: Number of workers of a lane, which take turns.
    """

    lanes: tuple[int, ...]
    num_lanes: int
    per_lane: int

    @property
    def num_workers(self) -> int:
        """Number of workers of the whole job."""
        return self.num_lanes * self.per_lane

    @property
    def workers(self) -> tuple[int, ...]:
        """Global worker ids, ascending."""
        return tuple(worker for lane in self.lanes for worker in self.of_lane(lane))

    def of_lane(self, lane: int) -> tuple[int, ...]:
        """Global worker ids of a lane."""
        return tuple(range(lane * self.per_lane, (lane + 1) * self.per_lane))

    def lane(self, worker: int) -> int:
        """Lane that gets a worker's sequences."""
        return worker // self.per_lane

    def describe(self, worker: int) -> str:
        """Description of a worker, for messages."""
        return f"global worker {worker} (lane {self.lane(worker)})"


@dataclass(frozen=True, slots=True)
class Position:
    """Position up to which a virtual worker was read.

    Attributes:
        drawn: Number of all sequences that were read.
        since: Number of those that were read after the snapshot.
        snapshot: State of the worker; None for its beginning.
    """

    drawn: int = 0
    since: int = 0
    snapshot: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.since <= self.drawn:
            raise ValueError(
                f"a reader stood at sequence {self.drawn}, {self.since} after its last state: "
                f"expected numbers that fit each other; the position is damaged"
            )


_BEGINNING = Position()
Positions = Mapping[int, Position]


def deal(routing: Routing, positions: Positions, processes: int) -> list[tuple[int, ...]]:
    """Distribute workers to processes, each in the order in which its workers take turns.

    Workers with the first turns in their lanes are first, spread over all processes.

    Args:
        routing: Virtual workers of the rank.
        positions: Position of each worker; workers without one are at their beginning.
        processes: Number of processes, at most that of the workers.
    """

    def turn(worker: int) -> tuple[int, int, int]:
        drawn = positions.get(worker, _BEGINNING).drawn
        return drawn, worker % routing.per_lane, worker

    order = sorted(routing.workers, key=turn)
    return [tuple(order[process::processes]) for process in range(processes)]


def num_processes(config: DataConfig, routing: Routing, cores: int) -> int:
    """Number of processes that read for a rank; 0 to read in this one.

    Args:
        config: Settings of the data, with the user's choice.
        routing: Virtual workers of the rank, of which no process has less than one.
        cores: Number of processor cores for the rank, of which one is left to training.
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
    """A sequence and, for some sequences, the state of its worker after it.

    Attributes:
        draw: Sequence with its skipped samples; None if the worker has no sample at all.
        snapshot: State of the worker after it, for some sequences.
    """

    draw: Draw | None
    snapshot: str | None = None


class Source(Protocol):
    """Source of the sequences of virtual workers."""

    def begin(self, positions: Positions) -> None:
        """Continue from these positions; call it before anything is taken."""
        ...

    def take(self, worker: int) -> Taken:
        """The next sequence of a worker."""
        ...


class _Reading:
    """One virtual worker that is being read."""

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
    """Reads in this process, on demand.

    Args:
        split: Opened split of the dataset.
        routing: Virtual workers of the rank.
    """

    def __init__(self, split: OpenedSplit, routing: Routing) -> None:
        self._split = split
        self._routing = routing
        self._positions: dict[int, Position] = {}
        self._readings: dict[int, _Reading] = {}

    def begin(self, positions: Positions) -> None:
        """Continue from these positions; call it before anything is taken."""
        self._positions.update(positions)

    def take(self, worker: int) -> Taken:
        """A worker's next sequence."""
        if worker not in self._readings:
            built = self._split.build(worker, self._routing.num_workers)
            self._readings[worker] = _Reading(built, self._positions.get(worker, _BEGINNING))
        return self._readings[worker].take()


class ReadingProcesses:
    """Reads ahead in other processes, which start when the first sequence is taken.

    Args:
        split: Opened split of the dataset.
        routing: Virtual workers of the rank.
        config: Batch size, by which processes read ahead, and time limits for waiting.
        processes: Number of processes, at most that of the workers.
        name: Name of this rank, for messages.
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
        # Lanes of a rank are at most one microbatch apart; more than twice that is a mistake.
        self._most_waiting = 2 * of_worker + 6

    def begin(self, positions: Positions) -> None:
        """Continue from these positions; call it before anything is taken."""
        self._positions.update(positions)

    def take(self, worker: int) -> Taken:
        """A worker's next sequence.

        Raises:
            RuntimeError: Its process died, failed or takes too long, or too many sequences of other
                workers wait; the message names this rank, the process, workers and lanes.
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
        """Read the workers of a process in turns, endlessly; runs in that process."""
        here = ReadingHere(self._split, self._routing)
        here.begin(self._positions)
        for worker in cycle(workers):
            begin(worker)
            yield worker, here.take(worker)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# -- lanes -----------------------------------------------------------------------------------------


class RoutedStream(Iterator[Draw]):
    """Sequences of a lane, from its workers in turns.

    Args:
        source: Source of the sequences of all lanes of this rank.
        split: Opened split of the dataset.
        routing: Virtual workers of the rank.
        lane: Number of the lane.
    """

    def __init__(self, source: Source, split: OpenedSplit, routing: Routing, lane: int) -> None:
        self._source = source
        self._split = split
        self._routing = routing
        self._positions = dict.fromkeys(routing.of_lane(lane), _BEGINNING)

    def __next__(self) -> Draw:
        # The turn follows from what was drawn, so that it need not be stored: workers may come
        # from other lanes.
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
        """Positions of the lane's workers by global worker id, and the identity of the dataset."""
        return {
            "num_samples": self._split.num_samples,
            "per_lane": self._routing.per_lane,
            "workers": {worker: asdict(at) for worker, at in self._positions.items()},
        }

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Continue where a run with the same product of lanes and workers stopped.

        Raises:
            ValueError: The product or the dataset differs, or the checkpoint is of another kind of
                data.
        """
        found = worker_positions(lanes, self._split, self._routing)
        self._positions = {worker: found[worker] for worker in self._routing.of_lane(lane)}
        self._source.begin(self._positions)


def worker_positions(
    lanes: Sequence[Any], split: OpenedSplit, routing: Routing
) -> dict[int, Position]:
    """Positions of all workers of the job, from the states of all its lanes.

    Raises:
        ValueError: This run cannot continue from there; the message says what to keep.
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
            f"the checkpoint was written: keep the dataset as it was, or start again with "
            f"--finetune and without --dataloader-load"
        )
    positions = {
        worker: Position(**position)
        for state in lanes
        for worker, position in state["workers"].items()
    }
    if len(positions) != routing.num_workers:
        raise ValueError(
            f"{where} cannot go on with --llm-dp {routing.num_lanes} --num-workers "
            f"{routing.per_lane}: the checkpoint's samples were shared by --llm-dp {len(lanes)} "
            f"x --num-workers {lanes[0]['per_lane']}, and the product must stay "
            f"{len(positions)}: {_for_lanes(routing.num_lanes, len(positions), len(lanes))}"
        )
    return positions


def _for_lanes(num_lanes: int, num_workers: int, lanes_before: int) -> str:
    """What to do to continue on another number of lanes with the workers that a run began with."""
    per_lane, rest = divmod(num_workers, num_lanes)
    if not rest:
        return f"set --num-workers {per_lane}"
    fits = [count for count in range(1, num_workers + 1) if num_workers % count == 0]
    total = math.lcm(_LANES_OF_MANY, lanes_before)
    return (
        f"set --llm-dp to one of {_listed(fits)}, and --num-workers to {num_workers} divided by "
        f"it; for other lanes only --finetune, which begins with the first sample, is left. A run "
        f"that begins with --num-workers {total // lanes_before} on {lanes_before} lanes continues "
        f"with any --llm-dp that divides {total}"
    )
