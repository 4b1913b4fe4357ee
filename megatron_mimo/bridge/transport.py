"""Move the rows that a plan names, without blocking and without exchanging shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.bridge.plan import Message, ModulePlan


class LocalRows:
    """Rows that a rank holding both modules hands to itself, by microbatch and direction."""

    def __init__(self) -> None:
        self._parcels: dict[tuple[str, int], Tensor] = {}

    def put(self, direction: str, microbatch: int, rows: Tensor) -> None:
        """Leave rows [R, H] for the other module of this rank."""
        self._parcels[direction, microbatch] = rows

    def take(self, direction: str, microbatch: int) -> Tensor:
        """Take what `put` left. A KeyError here is a fault of the schedule."""
        return self._parcels.pop((direction, microbatch))


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """One way over the bridge.

    Attributes:
        name: "rows" or "grads".
        group: Process group of its messages.
        local: Where a rank's messages to itself wait; shared by both modules of the rank.
    """

    name: str
    group: dist.ProcessGroup
    local: LocalRows = field(repr=False)


@dataclass(slots=True)
class Receive:
    """A posted receive; `wait` returns the rows [R, H] in local order."""

    direction: Direction
    microbatch: int
    buffer: Tensor
    pending: list[tuple[dist.Work, Message, Tensor]]
    local: Message | None

    def wait(self) -> Tensor:
        """Block until every row is there."""
        for work, message, landing in self.pending:
            work.wait()
            if len(message.runs) > 1:
                _scatter_runs(self.buffer, message, landing)
        if self.local is not None:
            rows = self.direction.local.take(self.direction.name, self.microbatch)
            if len(self.local.runs) == 1 and self.local.rows == self.buffer.shape[0]:
                return rows
            _scatter_runs(self.buffer, self.local, rows)
        return self.buffer


@dataclass(slots=True)
class Send:
    """Posted sends; the rows stay referenced until `wait`."""

    pending: list[tuple[dist.Work, Tensor]]

    def is_completed(self) -> bool:
        """Whether every row has left; never blocks."""
        return all(work.is_completed() for work, _ in self.pending)

    def wait(self) -> None:
        """Block until the rows may be reused."""
        for work, _ in self.pending:
            work.wait()


def post_receive(
    plan: ModulePlan,
    direction: Direction,
    microbatch: int,
    *,
    rank: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Receive:
    """Post the receives of one microbatch; a message of one run lands in place.

    Args:
        plan: This rank's side of the bridge.
        direction: Rows forward or gradients back.
        microbatch: Index within the step; also the message tag.
        rank: This global rank.
        width: H, elements per row.
        dtype: Of the rows, equal on both ends.
        device: Where they land.
    """
    buffer = torch.empty(plan.num_rows, width, dtype=dtype, device=device)
    pending = []
    local = None
    for message in plan.receives:
        if message.peer == rank:
            local = message
            continue
        if len(message.runs) == 1:
            start, stop = message.runs[0]
            landing = buffer[start:stop]
        else:
            landing = torch.empty(message.rows, width, dtype=dtype, device=device)
        work = dist.irecv(landing, src=message.peer, group=direction.group, tag=microbatch)
        assert work is not None
        pending.append((work, message, landing))
    return Receive(direction, microbatch, buffer, pending, local)


def post_send(
    plan: ModulePlan, direction: Direction, microbatch: int, rows: Tensor, *, rank: int
) -> Send:
    """Post the sends of one microbatch.

    Args:
        plan: This rank's side of the bridge.
        direction: Rows forward or gradients back.
        microbatch: Index within the step; also the message tag.
        rows: [R, H], this rank's rows in local order; unchanged until the send is waited for.
        rank: This global rank.

    Raises:
        RuntimeError: The module produced another number of rows than the manifest says.
    """
    if rows.shape[0] != plan.num_rows:
        raise RuntimeError(
            f"microbatch {microbatch}: the manifest names {plan.num_rows} rows, but "
            f"{rows.shape[0]} were produced to send as {direction.name}"
        )
    pending = []
    # Several receivers (tensor-parallel peers) take the same runs: gather them once.
    gathered: dict[tuple[tuple[int, int], ...], Tensor] = {}
    for message in plan.sends:
        if message.runs not in gathered:
            gathered[message.runs] = _gather_runs(rows, message.runs)
        parcel = gathered[message.runs]
        if message.peer == rank:
            direction.local.put(direction.name, microbatch, parcel)
            continue
        work = dist.isend(parcel, dst=message.peer, group=direction.group, tag=microbatch)
        assert work is not None
        pending.append((work, parcel))
    return Send(pending)


def _gather_runs(rows: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    parts = [rows[start:stop] for start, stop in runs]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _scatter_runs(buffer: Tensor, message: Message, rows: Tensor) -> None:
    offset = 0
    for start, stop in message.runs:
        buffer[start:stop] = rows[offset : offset + stop - start]
        offset += stop - start
