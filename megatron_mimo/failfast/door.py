"""Both ends of a connection until watcher and hub are sure of each other: `Door` and `Visit`.

Whoever can reach the port may connect. So a connection that has not proved who it is costs little
(no thread, at most `LONGEST` bytes), only for `LIMIT_S`, and there are never more than `WAITING`.
"""

import selectors
import socket
import time
from collections.abc import Callable
from functools import partial

from megatron_mimo.failfast.greeting import (
    LIMIT_S,
    LONGEST,
    HubGreeting,
    Refused,
    WatcherGreeting,
    refusal,
)
from megatron_mimo.failfast.wire import Link

WAITING = 64
"""Connections that have not proved who they are; of more, the oldest are closed."""

_BACKLOG = 4096
_ANY = ("::", "0.0.0.0")
_CONNECT_LIMIT_S = 1.0
# Longer than the hub allows: one that gives up while its answer is read would count as lost.
_PATIENCE_S = 30.0


class Door:
    """The hub's port: hands over the connections of watchers, and closes all others.

    Args:
        selector: Selector of the process's loop; the door registers callbacks without arguments.
        address: Address to listen on; "" for all of this machine.
        secret: Secret of the run.
        world_size: Number of ranks.
        taken: Function that tells whether a rank has a watcher already.
        admit: Function that takes the rank and the link of a watcher.

    Attributes:
        address: Host and port at which this machine reaches it.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        address: str,
        secret: str,
        world_size: int,
        *,
        taken: Callable[[int], bool],
        admit: Callable[[int, Link], None],
    ) -> None:
        self._selector = selector
        self._secret = secret
        self._world_size = world_size
        self._taken = taken
        self._admit = admit
        self._waiting: dict[socket.socket, float] = {}
        self._open = True
        self._server = _listen(address)
        self._server.setblocking(False)
        self._accepting = False
        host, port = self._server.getsockname()[:2]
        self.address: tuple[str, int] = ("127.0.0.1" if host in _ANY else host, port)
        self._accept_again()

    def tick(self, now: float) -> None:
        """Close connections that have waited for too long."""
        for connection, until in list(self._waiting.items()):
            if now > until:
                self._turn_away(connection)
        self._accept_again()

    def close(self) -> None:
        """Stop listening, and close all connections that were not handed over."""
        self._open = False
        for connection in list(self._waiting):
            self._turn_away(connection)
        if self._accepting:
            self._selector.unregister(self._server)
            self._accepting = False
        self._server.close()

    def _accept_again(self) -> None:
        if self._open and not self._accepting:
            self._selector.register(self._server, selectors.EVENT_READ, self._accept)
            self._accepting = True

    def _accept(self) -> None:
        if not self._open:
            return  # closed by a callback of the same round
        try:
            connection, _ = self._server.accept()
        except BlockingIOError:
            return
        except OSError:
            # Too many open files, of this process or of the machine: make room, and let the next
            # tick go on, since the connection stays ready to be accepted.
            self._selector.unregister(self._server)
            self._accepting = False
            self._turn_away_oldest()
            return
        if len(self._waiting) >= WAITING:
            self._turn_away_oldest()
        greeting = HubGreeting(self._secret, self._world_size)
        connection.setblocking(False)
        self._waiting[connection] = time.monotonic() + LIMIT_S
        self._selector.register(
            connection, selectors.EVENT_READ, partial(self._greet, connection, greeting)
        )
        self._tell(connection, greeting.challenge)

    def _greet(self, connection: socket.socket, greeting: HubGreeting) -> None:
        if connection not in self._waiting:
            return  # closed by a callback of the same round
        try:
            data = connection.recv(LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._turn_away(connection)
            return
        try:
            guest = greeting.take(data)
            if guest is not None and self._taken(guest.rank):
                raise Refused("the rank is taken")
        except Refused as refused:
            self._turn_away(connection, str(refused))
            return
        if guest is None or not self._tell(connection, guest.welcome):
            return
        del self._waiting[connection]
        self._selector.unregister(connection)
        self._admit(guest.rank, Link(connection))

    def _tell(self, connection: socket.socket, text: bytes) -> bool:
        """Send a line, for which a new connection has room; False if it is closed now."""
        try:
            whole = connection.send(text) == len(text)
        except OSError:
            whole = False
        if not whole:
            self._turn_away(connection)
        return whole

    def _turn_away_oldest(self) -> None:
        oldest = next(iter(self._waiting), None)
        if oldest is not None:
            self._turn_away(oldest)

    def _turn_away(self, connection: socket.socket, reason: str = "") -> None:
        del self._waiting[connection]
        self._selector.unregister(connection)
        if reason:
            try:
                connection.send(refusal(reason))
            except OSError:
                pass
        connection.close()


class Visit:
    """A watcher's connection to the hub; it is made again until the hub has welcomed it.

    Args:
        selector: Selector of the process's loop.
        address: Host and port of the hub.
        secret: Secret of the run.
        rank: Rank of the watcher.
        world_size: Number of ranks.
        welcomed: Function that takes the link to the hub.
        refused: Function that takes the reason why there will be none.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        address: tuple[str, int],
        *,
        secret: str,
        rank: int,
        world_size: int,
        welcomed: Callable[[Link], None],
        refused: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._address = address
        self._secret = secret
        self._rank = rank
        self._world_size = world_size
        self._welcomed = welcomed
        self._refused = refused
        self._connection: socket.socket | None = None
        self._until = 0.0
        self._over = False

    def tick(self, now: float) -> None:
        """Connect, if there is no connection or the hub has not answered in time."""
        if self._connection is not None and now > self._until:
            self._hang_up()
        if self._connection is None and not self._over:
            self._connect(now)

    def _connect(self, now: float) -> None:
        try:
            connection = socket.create_connection(self._address, timeout=_CONNECT_LIMIT_S)
        except OSError:
            return  # the next tick tries again
        connection.setblocking(False)
        self._connection, self._until = connection, now + _PATIENCE_S
        greeting = WatcherGreeting(self._secret, self._rank, self._world_size)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, greeting))

    def _hear(self, greeting: WatcherGreeting) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            data = connection.recv(LONGEST)
            answer = greeting.take(data) if data else b""
            if answer:
                connection.send(answer)
        except BlockingIOError:
            return
        except Refused as refused:
            self._over = True
            self._hang_up()
            self._refused(str(refused))
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
        elif greeting.welcomed:
            self._over = True
            self._connection = None
            self._selector.unregister(connection)
            self._welcomed(Link(connection, greeting.rest))

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._selector.unregister(self._connection)
            self._connection.close()
            self._connection = None


def _listen(address: str) -> socket.socket:
    """Listening socket on a free port."""
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return socket.create_server((address, 0), family=family, backlog=_BACKLOG)
        except OSError:
            pass  # an address of the network outside, such as of a container's host
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError:
            pass  # IPv6 is compiled in, but switched off
    return socket.create_server(("", 0), backlog=_BACKLOG)
