"""The hub: the part of rank 0's watcher that listens to all watchers.

Every watcher sends a beat a second and gets one back, so the hub of 1000 ranks handles 2000
short messages a second, a few percent of a core; a failure reaches everyone in one message.
"""

import resource
import selectors
import socket
import time
from functools import partial
from typing import Any

from megatron_mimo.runtime.failfast.report import FailureReport
from megatron_mimo.runtime.failfast.verdict import Jury
from megatron_mimo.runtime.failfast.wire import Link

_BACKLOG = 4096


class Hub:
    """Accepts watchers, passes their messages to the jury, tells all of them the verdict.

    Args:
        selector: Of the process's loop; the hub registers callbacks without arguments.
        world_size: Number of ranks.
        silence_s: See `Jury`.
        token: Watchers of this job know it; other connections are dropped.
        role: Of rank 0, for the day on which nobody can ask it any more.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        world_size: int,
        silence_s: float,
        *,
        token: str,
        role: str,
    ) -> None:
        self._selector = selector
        self._token = token
        self._role = role
        self._jury = Jury(world_size, silence_s)
        self._links: dict[int, Link] = {}
        self._welcomed = False
        self.verdict: FailureReport | None = None
        _allow_connections(world_size)
        self._server = _listen()
        self.port: int = self._server.getsockname()[1]
        selector.register(self._server, selectors.EVENT_READ, self._accept)

    @property
    def absent(self) -> tuple[int, ...]:
        """Ranks that have not joined yet."""
        return self._jury.absent

    def others(self, rank: int) -> int:
        """How many ranks other than `rank` are connected."""
        return sum(other != rank for other in self._links)

    def forgive(self, now: float) -> None:
        """See `Jury.forgive`."""
        self._jury.forgive(now)

    def beat(self) -> None:
        """Tell all watchers that the hub lives."""
        for link in self._links.values():
            link.send(kind="beat")

    def decide(self) -> bool:
        """Tell all watchers the verdict once there is one; True at that moment."""
        if self.verdict is not None:
            return False
        self.verdict = self._jury.verdict(time.monotonic())
        if self.verdict is None:
            return False
        self._broadcast(kind="verdict", report=self.verdict.to_json())
        return True

    def close(self) -> None:
        """Stop listening."""
        self._selector.unregister(self._server)
        self._server.close()

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        link = Link(connection)
        self._selector.register(link, selectors.EVENT_READ, partial(self._greet, link))

    def _greet(self, link: Link) -> None:
        """Take the first message of a connection."""
        messages = link.receive()
        if messages is not None and not messages:
            return
        self._selector.unregister(link)
        hello = messages[0] if messages else {}
        if hello.get("kind") != "hello" or hello.get("token") != self._token:
            link.close()
            return
        rank = int(hello["rank"])
        self._links[rank] = link
        self._jury.join(rank, hello["role"], hello["host"], time.monotonic())
        self._selector.register(link, selectors.EVENT_READ, partial(self._hear, rank, link))
        for message in messages[1:] if messages else []:
            self._take(rank, message)
        if self.verdict is not None:
            link.send(kind="verdict", report=self.verdict.to_json())
        elif self._jury.complete and not self._welcomed:
            self._welcomed = True
            self._broadcast(kind="welcome", role=self._role, host=socket.gethostname())

    def _hear(self, rank: int, link: Link) -> None:
        messages = link.receive()
        if messages is None:
            self._drop(rank)
            self._jury.lost(rank, time.monotonic(), "closed its connection without a word")
            return
        for message in messages:
            self._take(rank, message)

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        now = time.monotonic()
        self._jury.beat(rank, now)
        if message["kind"] == "bye":
            self._jury.leave(rank)
            self._drop(rank)
        elif message["kind"] == "failed":
            self._jury.report(FailureReport.from_json(message["report"]), now)

    def _drop(self, rank: int) -> None:
        link = self._links.pop(rank)
        self._selector.unregister(link)
        link.close()

    def _broadcast(self, **message: Any) -> None:
        for link in self._links.values():
            link.send(**message)


def _listen() -> socket.socket:
    """A free port on all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError:
            pass  # IPv6 is compiled in, but switched off
    return socket.create_server(("", 0), backlog=_BACKLOG)


def _allow_connections(number: int) -> None:
    """Raise the limit of open files, often 1024, as far as needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 64
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
