"""Which rank failed first: the decision of the hub, without sockets or a clock."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mimo.failfast.report import FailureReport, Kind

SETTLE_S = 0.2
"""After a failure, another one that happened at the same time may still be on its way."""
CONSEQUENCE_SETTLE_S = 2.0
"""After a lost connection, the failure that caused it must still be on its way."""


@dataclass(slots=True)
class Member:
    """A rank that has joined.

    Attributes:
        role: Description of the rank.
        host: Name of its machine.
        last_beat: Time of the last message from its watcher, on the hub's clock.
        present: Whether the rank has neither ended with success nor been reported as lost.
        is_lost: Whether its watcher has ended or is silent.
    """

    role: str
    host: str
    last_beat: float
    present: bool = True
    is_lost: bool = False


class Jury:
    """Collects the reports of the watchers and decides once; all times are the hub's, in seconds.

    Args:
        world_size: Number of ranks that will join.
        silence_s: Seconds without a message after which a watcher counts as lost.
    """

    def __init__(self, world_size: int, silence_s: float) -> None:
        self._world_size = world_size
        self._silence_s = silence_s
        self._members: dict[int, Member] = {}
        self._reports: list[FailureReport] = []
        self._decide_at: float | None = None
        self._verdict: FailureReport | None = None

    @property
    def complete(self) -> bool:
        """Whether every rank has joined."""
        return len(self._members) == self._world_size

    @property
    def absent(self) -> tuple[int, ...]:
        """Ranks that have not joined."""
        return tuple(rank for rank in range(self._world_size) if rank not in self._members)

    def join(self, rank: int, role: str, host: str, now: float) -> None:
        """Add a rank whose watcher has connected."""
        self._members[rank] = Member(role, host, now)

    def beat(self, rank: int, now: float) -> None:
        """Note that a watcher has sent a message."""
        self._members[rank].last_beat = now

    def leave(self, rank: int) -> None:
        """Note that a rank has ended with success."""
        self._members[rank].present = False

    def report(self, report: FailureReport, now: float) -> None:
        """Note that a rank has failed."""
        wait = CONSEQUENCE_SETTLE_S if report.is_consequence else SETTLE_S
        decide_at = now + wait
        self._reports.append(report)
        self._decide_at = decide_at if self._decide_at is None else min(self._decide_at, decide_at)
        if report.rank in self._members:
            self._members[report.rank].present = False

    def lost(self, rank: int, now: float, how: str) -> None:
        """Note that a connected watcher has ended or is silent; `how` follows "its watcher "."""
        member = self._members[rank]
        if not member.present:
            return
        member.is_lost = True
        summary = f"lost: its watcher {how}; its machine or the network may be down"
        self.report(
            FailureReport(
                kind=Kind.SILENT,
                rank=rank,
                role=member.role,
                host=member.host,
                summary=summary,
                seconds=time.time(),
            ),
            now,
        )

    def is_lost(self, rank: int) -> bool:
        """Whether the watcher of a rank has ended or is silent."""
        return rank in self._members and self._members[rank].is_lost

    def forgive(self, now: float) -> None:
        """Restart the measurement of every silence, after the hub itself was stopped."""
        for member in self._members.values():
            member.last_beat = now

    def verdict(self, now: float) -> FailureReport | None:
        """The first failure, once it is decided; the same report in all later calls."""
        if self.complete:
            for rank in self._silent(now):
                self.lost(rank, now, f"was not heard for {self._silence_s:g} s")
        if self._verdict is None and self._decide_at is not None and now >= self._decide_at:
            self._verdict = first_failure(self._reports)
        return self._verdict

    def _silent(self, now: float) -> list[int]:
        return [
            rank
            for rank, member in self._members.items()
            if member.present and now - member.last_beat > self._silence_s
        ]


def first_failure(reports: Iterable[FailureReport]) -> FailureReport:
    """The first report that is not a consequence of another failure, or else the first of all."""
    return min(reports, key=lambda report: report.is_consequence)
