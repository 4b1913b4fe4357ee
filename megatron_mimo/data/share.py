"""One rank reads, its peers receive, and the next step is drawn while this one runs."""

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo.data.batch import ResumableLoader, StepData
from megatron_mimo.data.config import DataRole
from megatron_mimo.data.trace import SampleTrace
from megatron_mimo.data.wire import decode_step, encode_step

# What a message of this length says instead.
_END, _FAILED = 0, -1


def equal_readers(roles: Sequence[DataRole]) -> tuple[tuple[int, ...], ...]:
    """Ranks that need the same of every step: the tp, cp and pp peers of a replica.

    Args:
        roles: Of every rank.

    Returns:
        Every rank once; in each group and among the groups' first ranks ascending.
    """
    groups: list[tuple[DataRole, list[int]]] = []
    for rank, role in enumerate(roles):
        for known, ranks in groups:
            if known == role:
                ranks.append(rank)
                break
        else:
            groups.append((role, [rank]))
    return tuple(tuple(ranks) for _, ranks in groups)


@dataclass(frozen=True, slots=True)
class ReadingGroup:
    """Ranks of which the first reads for all.

    Attributes:
        ranks: Global ranks, ascending.
        group: gloo group of them, used by nothing else; None for a rank of its own.
        rank: This global rank.
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
    """A step that waits for its turn, and where its reader stood behind it."""

    step: StepData
    state: dict[int, Any]


class SharedLoader(ResumableLoader):
    """Draws a step ahead, in a thread, and hands every step to the peers of the rank that reads.

    Peers take the same number of steps, and all of them call `close`.

    Args:
        source: What this rank reads; None on ranks that receive.
        peers: With whom.
        trace: Records the sample keys of every step that is taken, on ranks that read.
    """

    def __init__(
        self,
        source: ResumableLoader | None,
        peers: ReadingGroup,
        *,
        trace: SampleTrace | None = None,
    ) -> None:
        assert (source is not None) == peers.reads, peers
        self._source = source
        self._peers = peers
        self._trace = trace
        self._ready: queue.Queue[_Ready | Exception] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._state: dict[int, Any] | None = None

    def next_step(self) -> StepData:
        """Draw the next global batch's share of this rank.

        Raises:
            ValueError: As the reading rank's loader says, on all its peers.
        """
        # The first in this thread: processes that read are started by it.
        ready = self._draw() if self._thread is None else self._ready.get()
        assert ready is not None, "a step after the last one"
        if isinstance(ready, Exception):
            raise ready
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="next-step", daemon=True)
            self._thread.start()
        self._state = ready.state
        if self._trace is not None:
            self._trace.write(_keys(ready.step))
        return ready.step

    def state(self) -> dict[int, Any]:
        """What `restore` needs to go on behind the last step; empty on ranks that receive."""
        if self._state is not None:
            return self._state
        return {} if self._source is None else self._source.state()

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """Go on where `state` was taken; before the first step."""
        assert self._thread is None, "restored after its first step"
        if self._source is not None:
            self._source.restore(lanes)

    def close(self) -> None:
        """Let go of the step that was drawn ahead. Collective over the peers."""
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
                return

    def _draw(self) -> _Ready | Exception | None:
        """The next step, or why there is none; None behind the last one."""
        return self._read() if self._source is not None else self._receive()

    def _read(self) -> _Ready | Exception | None:
        assert self._source is not None
        if self._closing.is_set():
            self._send(_END)
            return None
        try:
            step = self._source.next_step()
            state = self._source.state()
            message = None if self._peers.group is None else encode_step(step)
        # Whatever it is, the training thread raises it.
        except Exception as error:
            text = torch.frombuffer(bytearray(str(error).encode() or b"?"), dtype=torch.uint8)
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
        return _Ready(decode_step(message), {})

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
        for lane, drawn in microbatch.keys.items():
            keys.setdefault(lane, []).extend(drawn)
    return keys
