"""JSON objects over a socket, one per line, between ends that are sure of each other."""

import json
import select
import socket
import struct
import time
from typing import Any

LONGEST = 1 << 18
"""Bytes of a line: a report whose every character is escaped fits."""

_SEND_LIMIT = struct.pack("ll", 1, 0)  # a peer that does not read is given one second


class Link:
    """One end of a connection. One thread may send while another receives.

    Args:
        connection: Connected socket.
        rest: Bytes that arrived already.

    Attributes:
        is_broken: Whether the stream ended, for `receive`, because of bytes that are no messages.
    """

    def __init__(self, connection: socket.socket, rest: bytes = b"") -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_LIMIT)
        self._socket = connection
        self._rest = b""
        self._waiting: list[dict[str, Any]] = []
        self.is_broken = False
        if rest:
            self._waiting = self._split(rest) or []

    def fileno(self) -> int:
        """Descriptor of the socket, for `selectors`."""
        return self._socket.fileno()

    def send(self, **message: Any) -> bool:
        """Send one object; False if the other end is closed or does not read."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for bytes and return the objects that they complete; None at the stream's end.

        Every object has a `kind`, a text. Bytes that are no such objects end the stream.
        """
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            return waiting
        if self.is_broken:
            return None
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            return None
        return self._split(data) if data else None

    def receive_first(self, limit_s: float) -> dict[str, Any] | None:
        """Wait for one object; None on timeout. Further objects are kept for the next call."""
        deadline = time.monotonic() + limit_s
        while self.wait(deadline - time.monotonic()):
            messages = self.receive()
            if messages is None:
                return None
            if messages:
                self._waiting = messages[1:]
                return messages[0]
        return None

    def wait(self, limit_s: float) -> bool:
        """Wait until `receive` would return; False on timeout."""
        if self._waiting or self.is_broken:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(1000 * max(0.0, limit_s)))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _split(self, data: bytes) -> list[dict[str, Any]] | None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = None
        if max(map(len, (*lines, self._rest))) <= LONGEST:
            messages = _decode(lines)
        self.is_broken = messages is None
        return messages


def _decode(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """Objects of complete lines; None where one is no message."""
    try:
        messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):  # nested too deeply
        return None
    is_message = [isinstance(one, dict) and isinstance(one.get("kind"), str) for one in messages]
    return messages if all(is_message) else None
