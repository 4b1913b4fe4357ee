"""JSON objects over a socket, one a line."""

import json
import select
import socket
import struct
import time
from typing import Any

_LONGEST = 1 << 20  # bytes; nothing that we send comes near
_SEND_LIMIT = struct.pack("ll", 1, 0)  # a peer that does not read is given one second


class Link:
    """One end of a connection. One thread may send while another receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_LIMIT)
        self._socket = connection
        self._rest = b""
        self._waiting: list[dict[str, Any]] = []

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def send(self, **message: Any) -> bool:
        """Send one object; False if the other end is gone or does not read."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for bytes and return the objects that they complete; None at the end."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            return waiting
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LONGEST:
            return None
        return _decode(lines)

    def receive_first(self, limit_s: float) -> dict[str, Any] | None:
        """Wait for one object; None if it does not come in time. Others are kept for later."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        deadline = time.monotonic() + limit_s
        while self._waiting or poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            messages = self.receive()
            if messages is None:
                return None
            if messages:
                self._waiting = messages[1:]
                return messages[0]
        return None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _decode(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """None if somebody else's bytes came: any port may be probed by strangers."""
    try:
        messages = [json.loads(line) for line in lines]
    except ValueError:
        return None
    return messages if all(isinstance(message, dict) for message in messages) else None
