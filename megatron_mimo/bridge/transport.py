"""Send and receive the rows of a plan, without blocking and without exchanging shapes.

What a rank sends and receives of one microbatch in one direction is posted as one batch. A rank
that holds both ends of a boundary posts both together, because NCCL runs the operations of a group
in order: two such ranks that each posted their receive first would wait for each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.bridge.buffers import BufferPool
from megatron_mimo.bridge.plan import Message
from megatron_mimo.topology.sequence import Interval


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Rows to send.

    Attributes:
        messages: Messages of the plan, in its order.
        rows: Rows of this side [R, width] in local order, contiguous, in the channel's dtype. They
            must not change until `Channel.wait_sent` returns.
    """

    messages: Sequence[Message]
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Incoming:
    """Rows to receive.

    Attributes:
        messages: Messages of the plan, in its order; together they fill every row.
        num_rows: Number of rows of this side, R.
    """

    messages: Sequence[Message]
    num_rows: int


class Pending(Protocol):
    """Rows whose receive has been posted."""

    def wait(self) -> Tensor | None:
        """Wait for the rows [R, width] in local order; on a GPU only the stream waits.

        Raises:
            RuntimeError: With a checked channel: the ends disagree, or checksums differ.
        """
        ...

    def release(self) -> None:
        """Return the memory of the rows for later microbatches; they must not be read any more."""
        ...


@dataclass(slots=True)
class Arrival:
    """Implements `Pending`.

    Attributes:
        rows: Received rows [R, width] in local order; undefined until `wait` returns.
    """

    rows: Tensor
    _pool: BufferPool = field(repr=False)
    _buffers: list[Tensor]
    _landings: list[tuple[Message, Tensor]]
    _works: list[dist.Work] = field(default_factory=list)

    def wait(self) -> Tensor:
        """Received rows [R, width], as `Pending.wait` says; waiting again costs nothing."""
        for work in self._works:
            work.wait()
        for message, landing in self._landings:
            _scatter_runs(self.rows, message.runs, landing)
        self._works, self._landings = [], []
        return self.rows

    def release(self) -> None:
        """See `Pending.release`."""
        for buffer in self._buffers:
            self._pool.give(buffer)


@dataclass(slots=True)
class _Departure:
    """Rows whose send has been posted and may not be complete."""

    rows: Tensor
    buffers: list[Tensor]
    works: list[dist.Work]


class Channel:
    """One direction over one boundary, as one rank sees it.

    Args:
        name: Name of the content for error messages: "rows", "gradients of rows".
        group: Process group of the messages. Apart from batches in both directions, a rank only
            sends or only receives in it.
        rank: Global rank of this process.
        width: Number of elements of a row.
        dtype: Dtype of the elements, equal on both ends.
        device: Device of the rows.

    Attributes:
        name, group, rank, width, dtype: As given.
    """

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        *,
        rank: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name = name
        self.group = group
        self.rank = rank
        self.width = width
        self.dtype = dtype
        self._pool = BufferPool(width, dtype, device)
        self._departures: dict[int, _Departure] = {}

    def post(
        self, microbatch: int, outgoing: Outgoing | None, incoming: Incoming | None
    ) -> Pending | None:
        """Post what this rank sends and receives of a microbatch as one batch.

        Args:
            microbatch: Index within the step; also the tag of the messages.
            outgoing: Rows to send; None where this rank only receives.
            incoming: Rows to receive; None where this rank only sends.

        Returns:
            The rows to wait for; None without any.
        """
        self._reap()
        arrival, operations = self._land(incoming, outgoing, microbatch)
        departure: _Departure | None = None
        leaving: list[dist.P2POp] = []
        if outgoing is not None:
            departure, leaving = self._leave(outgoing, microbatch)
            operations += leaving
        works = dist.batch_isend_irecv(operations) if operations else []
        # One work for each operation, or for a backend that fuses a batch, one for all.
        received = len(works) - len(leaving) if len(works) == len(operations) else len(works)
        if arrival is not None:
            arrival._works = works[:received]
        if departure is not None:
            departure.works = works[received:] or works
            self._departures[microbatch] = departure
        return arrival

    def wait_sent(self, microbatch: int) -> None:
        """Block until the rows of a microbatch have been sent and may be changed."""
        departure = self._departures.pop(microbatch, None)
        if departure is not None:
            self._finish(departure)

    def drain(self) -> None:
        """Block until all rows have been sent."""
        for microbatch in list(self._departures):
            self.wait_sent(microbatch)

    def _land(
        self, incoming: Incoming | None, outgoing: Outgoing | None, microbatch: int
    ) -> tuple[Arrival | None, list[dist.P2POp]]:
        if incoming is None:
            return None, []
        own = [message for message in incoming.messages if message.peer == self.rank]
        if own:
            assert outgoing is not None, "rows for this rank itself leave in the same batch"
            mine = _gather_own(outgoing, self.rank)
            if mine.shape[0] == incoming.num_rows and len(own[0].runs) == 1:
                # Nothing else arrives: the rows that were produced are the rows that are used.
                return Arrival(mine, self._pool, [], []), []
        buffer = self._pool.take(incoming.num_rows)
        arrival = Arrival(buffer[: incoming.num_rows], self._pool, [buffer], [])
        operations = []
        for message in incoming.messages:
            if message.peer == self.rank:
                _scatter_runs(arrival.rows, message.runs, mine)
                continue
            landing = _in_place(arrival.rows, message.runs)
            if landing is None:
                staging = self._pool.take(message.rows)
                arrival._buffers.append(staging)
                landing = staging[: message.rows]
                arrival._landings.append((message, landing))
            operations.append(
                dist.P2POp(dist.irecv, landing, message.peer, self.group, tag=microbatch)
            )
        return arrival, operations

    def _leave(
        self, outgoing: Outgoing, microbatch: int
    ) -> tuple[_Departure | None, list[dist.P2POp]]:
        departure = _Departure(outgoing.rows, [], [])
        operations = []
        # Several receivers may take the same runs: gather them once.
        parcels: dict[tuple[Interval, ...], Tensor] = {}
        for message in outgoing.messages:
            if message.peer == self.rank:
                continue
            parcel = parcels.get(message.runs)
            if parcel is None:
                parcel = _in_place(outgoing.rows, message.runs)
                if parcel is None:
                    staging = self._pool.take(message.rows)
                    departure.buffers.append(staging)
                    parcel = staging[: message.rows]
                    torch.cat([outgoing.rows[a:b] for a, b in message.runs], out=parcel)
                parcels[message.runs] = parcel
            operations.append(
                dist.P2POp(dist.isend, parcel, message.peer, self.group, tag=microbatch)
            )
        return (departure if operations else None), operations

    def _reap(self) -> None:
        """Release rows whose send is complete, without blocking.

        gloo only reports completion when it is waited for; there only `wait_sent` releases rows.
        """
        for microbatch, departure in list(self._departures.items()):
            if all(work.is_completed() for work in departure.works):
                self._finish(self._departures.pop(microbatch))

    def _finish(self, departure: _Departure) -> None:
        for work in departure.works:
            work.wait()
        for buffer in departure.buffers:
            self._pool.give(buffer)


def _in_place(rows: Tensor, runs: tuple[Interval, ...]) -> Tensor | None:
    """The rows of a message as a view of local rows; None when they are in several pieces."""
    if len(runs) > 1:
        return None
    start, stop = runs[0]
    return rows[start:stop]


def _gather_own(outgoing: Outgoing, rank: int) -> Tensor:
    """The rows that a rank sends to itself."""
    (own,) = [message for message in outgoing.messages if message.peer == rank]
    parts = [outgoing.rows[start:stop] for start, stop in own.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scatter_runs(rows: Tensor, runs: tuple[Interval, ...], arrived: Tensor) -> None:
    offset = 0
    for start, stop in runs:
        rows[start:stop] = arrived[offset : offset + stop - start]
        offset += stop - start
