"""How a watcher and the hub make sure of each other, without sockets.

    hub      mimo-failfast 1 NONCE
    watcher  RANK NONCE PROOF
    hub      welcome PROOF        or: refused REASON

A nonce is 16 random bytes, a proof an HMAC-SHA256 over both nonces, the rank and the number of
ranks; the key is a secret that all ranks of the run share. So the secret never crosses the network,
and what was overheard proves nothing in another connection. All is text in lines of at most
`LONGEST` bytes, read by one pattern each: nothing of a stranger reaches a parser.
"""

import hmac
import re
import secrets
from dataclasses import dataclass
from hashlib import sha256

LONGEST = 256
"""Bytes of a line; none of ours is as long."""
LIMIT_S = 5.0
"""Seconds that a greeting may take."""

_VERSION = b"mimo-failfast 1 "
_CHALLENGE = re.compile(rb"mimo-failfast 1 ([0-9a-f]{32})")
_ANSWER = re.compile(rb"(0|[1-9][0-9]{0,8}) ([0-9a-f]{32}) ([0-9a-f]{64})")
_WELCOME = re.compile(rb"welcome ([0-9a-f]{64})")
_REFUSED = re.compile(rb"refused ([a-z ]{1,80})")


class Refused(ValueError):
    """The other end is none of this run, or says that this one is not."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A watcher that has proved that it is one.

    Attributes:
        rank: Its rank.
        welcome: Bytes that prove to it that this is the hub.
    """

    rank: int
    welcome: bytes


class HubGreeting:
    """The hub's side of one connection.

    Args:
        secret: Secret of the run.
        world_size: Number of ranks.

    Attributes:
        challenge: Bytes to send first.
    """

    def __init__(self, secret: str, world_size: int) -> None:
        self._secret = secret
        self._world_size = world_size
        self._nonce = _nonce()
        self._lines = _Line()
        self.challenge = _VERSION + self._nonce + b"\n"

    def take(self, data: bytes) -> Guest | None:
        """Take bytes that arrived; None while the answer is incomplete.

        Raises:
            Refused: This is no watcher of the run; the text is what it may be told.
        """
        line = self._lines.take(data)
        if line is None:
            return None
        # A watcher waits for the proof of the hub before it says anything else.
        answer = None if self._lines.rest else _ANSWER.fullmatch(line)
        if answer is None:
            raise Refused("not a watcher")
        rank, theirs, proof = answer.groups()
        facts = (self._nonce, theirs, rank, b"%d" % self._world_size)
        if not hmac.compare_digest(_proof(self._secret, b"watcher", *facts), proof):
            raise Refused("another secret")
        if int(rank) >= self._world_size:
            raise Refused("no such rank")
        return Guest(int(rank), b"welcome " + _proof(self._secret, b"hub", *facts) + b"\n")


class WatcherGreeting:
    """The watcher's side of one connection.

    Args:
        secret: Secret of the run.
        rank: Rank of the watcher.
        world_size: Number of ranks.

    Attributes:
        welcomed: Whether both ends are sure of each other.
    """

    def __init__(self, secret: str, rank: int, world_size: int) -> None:
        self._secret = secret
        self._rank = b"%d" % rank
        self._world_size = b"%d" % world_size
        self._mine = _nonce()
        self._facts: tuple[bytes, ...] | None = None
        self._lines = _Line()
        self.welcomed = False

    @property
    def rest(self) -> bytes:
        """Bytes that came after the welcome: the first messages of the hub."""
        return self._lines.rest

    def take(self, data: bytes) -> bytes:
        """Take bytes that arrived, and return those to answer with, b"" for none.

        Raises:
            Refused: This is not the hub of the run, or it has refused this watcher.
        """
        line = self._lines.take(data)
        if line is None:
            return b""
        if self._facts is None:
            challenge = _CHALLENGE.fullmatch(line)
            if challenge is None or self._lines.rest:
                raise Refused("what listens there is not the hub")
            self._facts = (challenge[1], self._mine, self._rank, self._world_size)
            proof = _proof(self._secret, b"watcher", *self._facts)
            return b" ".join((self._rank, self._mine, proof)) + b"\n"
        refused, welcome = _REFUSED.fullmatch(line), _WELCOME.fullmatch(line)
        if refused is not None:
            raise Refused(f"the hub refused it: {refused[1].decode()}")
        if welcome is None or not hmac.compare_digest(
            _proof(self._secret, b"hub", *self._facts), welcome[1]
        ):
            raise Refused("what listens there does not know the secret")
        self.welcomed = True
        return b""


def refusal(reason: str) -> bytes:
    """Bytes that tell a watcher why it was refused."""
    return b"refused " + reason.encode() + b"\n"


class _Line:
    """Collects bytes up to the end of a line, at most `LONGEST`."""

    def __init__(self) -> None:
        self.rest = b""

    def take(self, data: bytes) -> bytes | None:
        text = self.rest + data
        line, end, rest = text.partition(b"\n")
        if len(line) > LONGEST:
            raise Refused("not a watcher")
        self.rest = rest if end else text
        return line if end else None


def _nonce() -> bytes:
    return secrets.token_hex(16).encode()


def _proof(secret: str, end: bytes, *facts: bytes) -> bytes:
    text = b"|".join((b"megatron-mimo fail-fast 1", end, *facts))
    return hmac.new(secret.encode(), text, sha256).hexdigest().encode()
