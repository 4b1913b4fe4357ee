"""Loading by one rank for its peers; the next step is drawn while the current one runs."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.loader.batch import Microbatch, ReadingLoader, ResumableLoader, StepData
from megatron_mimo.data.loader.drawn import EndOfSteps
from megatron_mimo.data.loader.trace import SampleTrace
from megatron_mimo.data.loader.wire import WireTypes, decode_step, encode_step
from megatron_mimo.data.role import DataRole, equal_readers

# A message of this length has this meaning instead.
_END, _FAILED = 0, -1


@dataclass(frozen=True, slots=True)
class ReadingGroup:
    """A group of ranks of which the first reads for all.

    Attributes:
        ranks: Global ranks, ascending.
        group: Process group of these ranks, gloo, used by nothing else; None for a single rank.
        rank: Global rank of this process.
    """

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    rank: int

    @property
    def reads(self) -> bool:
        """Whether this rank is the one that reads."""
        return self.rank == self.ranks[0]


def build_reading_group(roles: Sequence[DataRole], rank: int) -> ReadingGroup:
    """Create the groups of `equal_readers`. Collective over the world, with equal roles."""
    mine: ReadingGroup | None = None
    for ranks in equal_readers(roles):
        group = None
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), backend="gloo", group_desc="reading")
        if rank in ranks:
            mine = ReadingGroup(ranks, group, rank)
    assert mine is not None, (rank, len(roles))
    return mine


@dataclass(frozen=True, slots=True)
class _Ready:
    """A step that was drawn ahead, and the state of its reader after it."""

    step: StepData
    state: dict[int, Any]


class SharedLoader(ResumableLoader):
    """Draws a step ahead, in a thread, and sends every step to the peers of the reading rank.

    Peers draw the same number of steps, and all of them call `close`.

    Args:
        source: Loader of this rank; None on ranks that receive.
        peers: Group of the ranks that receive the same data.
        inputs: Kinds of items of the run, whose packed inputs may be sent; equal on all peers.
        trace: Recorder of the sample keys of every step, on ranks that read; None for none.
    """

    def __init__(
        self,
        source: ReadingLoader | None,
        peers: ReadingGroup,
        *,
        inputs: Inputs,
        trace: SampleTrace | None = None,
    ) -> None:
        assert (source is not None) == peers.reads, peers
        self._source = source
        self._peers = peers
        self._types = WireTypes.of(inputs)
        self._trace = trace
        self._prepare: Callable[[Sequence[Microbatch]], Any] | None = None
        self._ready: queue.Queue[_Ready | Exception] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._state: dict[int, Any] | None = None

    def prepare_ahead(self, prepare: Callable[[Sequence[Microbatch]], Any]) -> None:
        """Prepare every step where it is drawn; call it before the first step.

        Args:
            prepare: Function of the microbatches that returns `StepData.prepared`. It runs in the
                thread that draws.
        """
        assert self._thread is None, "told how to prepare after its first step"
        self._prepare = prepare

    def next_step(self) -> StepData:
        """Draw the next global batch's share of this rank.

        Raises:
            ValueError: The reading rank's loader raised it; all its peers raise the same.
        """
        # The first step in this thread: it starts the reading processes.
        ready = self._draw() if self._thread is None else self._ready.get()
        assert ready is not None, "a step after the last one"
        if isinstance(ready, Exception):
            if self._thread is None and self._source is not None:
                self._source.fail(ready)
            raise ready
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="next-step", daemon=True)
            self._thread.start()
        self._state = ready.state
        if self._trace is not None:
            self._trace.write(_keys(ready.step))
        return ready.step

    def state(self) -> dict[int, Any]:
        """State for `restore` to continue after the last step; empty on ranks that receive."""
        if self._state is not None:
            return self._state
        return {} if self._source is None else self._source.state()

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """Continue from where `state` was taken; call it before the first step."""
        assert self._thread is None, "restored after its first step"
        if self._source is not None:
            self._source.restore(lanes)

    def close(self) -> None:
        """Discard the step that was drawn ahead, and stop reading.

        Collective over the peers, and over the ranks that decide with this one who runs an item.
        """
        self._closing.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread = None

    def _run(self) -> None:
        while (ready := self._draw()) is not None:
            self._ready.put(ready)
            if isinstance(ready, Exception):
                # After the step has been told: others may need it before they listen again.
                if self._source is not None:
                    self._source.fail(ready)
                return

    def _draw(self) -> _Ready | Exception | None:
        """The next step, or the error that prevents it; None after the last one."""
        ready = self._read() if self._source is not None else self._receive()
        if self._prepare is None or not isinstance(ready, _Ready):
            return ready
        try:
            prepared = self._prepare(ready.step.microbatches)
        # As in `_read`; page-locked memory may be short.
        except Exception as error:
            return error
        return replace(ready, step=replace(ready.step, prepared=prepared))

    def _read(self) -> _Ready | Exception | None:
        assert self._source is not None
        if self._closing.is_set():
            self._source.end()
            self._send(_END)
            return None
        try:
            step = self._source.next_step()
            state = self._source.state()
            message = None if self._peers.group is None else encode_step(step, self._types)
        except EndOfSteps:
            self._send(_END)
            return None
        # The training thread raises every kind of error.
        except Exception as error:
            text = torch.frombuffer(
                bytearray(str(error).encode(errors="backslashreplace") or b"?"), dtype=torch.uint8
            )
            self._send(_FAILED, text)
            return error
        if message is not None:
            self._send(len(message), message)
        return _Ready(step, state)

    def _receive(self) -> _Ready | Exception | None:
        kind, message = self._next_message()
        if kind == _END:
            return None
        if kind == _FAILED:
            return ValueError(
                f"rank {self._peers.ranks[0]}, which reads for this one: "
                f"{message.numpy().tobytes().decode()}"
            )
        return _Ready(decode_step(message, self._types), {})

    def _send(self, kind: int, message: torch.Tensor | None = None) -> None:
        group, source = self._peers.group, self._peers.rank
        if group is None:
            return
        length = 0 if message is None else len(message)
        dist.broadcast(torch.tensor([kind, length]), source, group=group)
        if message is not None:
            dist.broadcast(message, source, group=group)

    def _next_message(self) -> tuple[int, torch.Tensor]:
        group, source = self._peers.group, self._peers.ranks[0]
        head = torch.empty(2, dtype=torch.int64)
        dist.broadcast(head, source, group=group)
        kind, length = head.tolist()
        message = torch.empty(length, dtype=torch.uint8)
        if length:
            dist.broadcast(message, source, group=group)
        return kind, message


def _keys(step: StepData) -> dict[int, list[str]]:
    """Lane -> sample keys of the step, in order."""
    keys: dict[int, list[str]] = {}
    for microbatch in step.microbatches:
        for lane in step.lane_digest:  # The lanes that this rank reads.
            keys.setdefault(lane, []).extend(microbatch.keys[lane])
    return keys
