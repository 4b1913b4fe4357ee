"""The hub: the part of rank 0's watcher that listens to all watchers.

Every watcher sends a beat a second and gets one back, so the hub of 1000 ranks handles 2000
short messages a second, a few percent of a core; a failure reaches everyone in one message.
"""

import selectors
import socket
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_mimo.failfast.door import Door
from megatron_mimo.failfast.report import FailureReport
from megatron_mimo.failfast.verdict import Jury
from megatron_mimo.failfast.wire import Link

_TEXT_LIMIT = 1000  # characters of a role or a host


class Hub:
    """Hears the watchers, passes their messages to the `Jury`, and tells all of them its verdict.

    It listens until every rank has joined.

    Args:
        selector: Selector of the process's loop; the hub registers callbacks without arguments.
        world_size: Number of ranks.
        silence_s: Seconds without a message after which a watcher counts as lost (see `Jury`).
        address: Address to listen on; "" for all of this machine.
        secret: Secret that the watchers of this run share; see `greeting`.
        role: Description of rank 0, needed for its report once its process has ended.

    Attributes:
        address: Host and port at which this machine reaches it.
        verdict: The first failure, once it is decided.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        world_size: int,
        silence_s: float,
        *,
        address: str,
        secret: str,
        role: str,
    ) -> None:
        self._selector = selector
        self._world_size = world_size
        self._role = role
        self._jury = Jury(world_size, silence_s)
        self._links: dict[int, Link] = {}
        self._joined: set[int] = set()
        self._welcomed = False
        self.verdict: FailureReport | None = None
        self._door = Door(
            selector,
            address,
            secret,
            world_size,
            taken=lambda rank: rank in self._links or rank in self._joined,
            admit=self._admit,
        )
        self.address = self._door.address

    @property
    def absent(self) -> tuple[int, ...]:
        """Ranks that have not joined yet."""
        return self._jury.absent

    def others(self, rank: int) -> int:
        """Number of connected ranks other than `rank`, without those that are lost."""
        return sum(other != rank and not self._jury.is_lost(other) for other in self._links)

    def forgive(self, now: float) -> None:
        """See `Jury.forgive`."""
        self._jury.forgive(now)

    def tick(self, now: float) -> None:
        """Close connections that do not prove who they are."""
        self._door.tick(now)

    def beat(self) -> None:
        """Send a beat to all watchers: the hub is alive."""
        self._broadcast(kind="beat")

    def decide(self) -> bool:
        """Send the verdict to all watchers once there is one; True in the call that sends it."""
        if self.verdict is not None:
            return False
        self.verdict = self._jury.verdict(time.monotonic())
        if self.verdict is None:
            return False
        self._broadcast(kind="verdict", report=self.verdict.to_json())
        return True

    def close(self) -> None:
        """Stop listening."""
        self._door.close()

    def _admit(self, rank: int, link: Link) -> None:
        self._links[rank] = link
        self._selector.register(link, selectors.EVENT_READ, partial(self._hear, rank, link))

    def _hear(self, rank: int, link: Link) -> None:
        if self._links.get(rank) is not link:
            return  # closed by a callback of the same round
        messages = link.receive()
        how = "closed its connection without a word"
        try:
            for message in messages or []:
                self._take(rank, message)
        except ValueError:
            messages, how = None, "sent something that no watcher sends"
        if link.is_broken:
            how = "sent something that no watcher sends"
        if messages is None and rank in self._links:
            self._drop(rank)
            if rank in self._joined:
                self._jury.lost(rank, time.monotonic(), how)

    def _take(self, rank: int, message: Mapping[str, Any]) -> None:
        """Take a message.

        Raises:
            ValueError: No watcher sends that.
        """
        now, kind = time.monotonic(), message["kind"]
        if kind == "join" and rank not in self._joined:
            self._join(rank, _text(message, "role"), _text(message, "host"), now)
            return
        if rank not in self._joined:
            raise ValueError("a watcher joins first")
        self._jury.beat(rank, now)
        if kind == "bye":
            self._jury.leave(rank)
            if rank in self._links:
                self._drop(rank)
        elif kind == "failed":
            report = FailureReport.from_json(message.get("report", {}))
            if report.rank != rank:
                raise ValueError("a watcher reports on its own rank")
            self._jury.report(report, now)
        elif kind != "beat":
            raise ValueError("no such kind")

    def _join(self, rank: int, role: str, host: str, now: float) -> None:
        self._joined.add(rank)
        self._jury.join(rank, role, host, now)
        if self._jury.complete:
            self._door.close()
        if self.verdict is not None:
            self._links[rank].send(kind="verdict", report=self.verdict.to_json())
        elif self._jury.complete and not self._welcomed:
            self._welcomed = True
            self._broadcast(kind="welcome", role=self._role, host=socket.gethostname())

    def _drop(self, rank: int) -> None:
        link = self._links.pop(rank)
        self._selector.unregister(link)
        link.close()

    def _broadcast(self, **message: Any) -> None:
        for rank, link in self._links.items():
            # One that does not read would delay all others.
            if not self._jury.is_lost(rank):
                link.send(**message)


def _text(message: Mapping[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or len(value) > _TEXT_LIMIT:
        raise ValueError(f"{name} is not a text")
    return value
