"""How the watchers find the hub, and the secret by which they know each other.

The hub's address goes through the store at which process groups meet. Everybody who reaches the
store can read it, so the secret does not: it comes from the environment, where the launcher has put
it, or from a file that only this user can read.
"""

import ipaddress
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_mimo.runtime.environment import RankEnvironment

SECRET = "MIMO_FAILFAST_SECRET"

_SHORTEST = 16  # characters of a secret
_LOOPBACK = "127.0.0.1"
_MADE = re.compile(r"[0-9a-f]{64}")
_BY_ENVIRONMENT = "-"
_REMEDY = (
    f"set {SECRET} to one random text for all ranks before they start, such as `export "
    f'{SECRET}="$(openssl rand -hex 32)"`'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the hub is.

    Attributes:
        host: Name or address to which watchers connect.
        port: Its port.
        secret: Secret that the watchers share.
    """

    host: str
    port: int
    secret: str


def new_secret() -> str:
    """A secret that nobody guesses."""
    return secrets.token_hex(32)


def given_secret(env: Mapping[str, str]) -> str | None:
    """The secret that the launcher has put into the environment; None without one.

    Raises:
        ValueError: It is too short.
    """
    secret = env.get(SECRET)
    if not secret:
        return None
    if len(secret) < _SHORTEST:
        raise ValueError(
            f"{SECRET} has {len(secret)} characters: expected at least {_SHORTEST}; {_REMEDY}"
        )
    return secret


class Meeting:
    """Exchange of the hub's place over the store.

    Args:
        environment: This rank and its meeting point.
        role: Description of this rank.
        limit_s: Seconds that ranks wait for each other.

    Raises:
        ValueError: The secret in the environment is too short.
    """

    def __init__(self, environment: RankEnvironment, role: str, limit_s: float) -> None:
        self._environment = environment
        self._limit_s = limit_s
        self._who = f"rank {environment.rank} ({role})"
        self._host, self._port = _meeting_point(environment)
        self._on_one_host = environment.on_one_host or _is_loopback(self._host)
        self._given = given_secret(os.environ)
        self._file: Path | None = None
        self._store: Any = None

    @property
    def listening_address(self) -> str:
        """Address on which the hub listens: the one that its peers use; "" for all addresses."""
        if self._on_one_host:
            return _LOOPBACK
        try:
            found = socket.getaddrinfo(self._host, None, type=socket.SOCK_STREAM)
        except OSError:
            return ""
        address = str(found[0][4][0])
        # A machine may know its own name as a loopback, which no other machine reaches.
        return "" if _is_loopback(address) else address

    def make_secret(self) -> str:
        """The secret, for the hub to begin with; rank 0 calls this.

        Raises:
            ValueError: There is no folder for it.
        """
        if self._given is not None:
            return self._given
        secret = new_secret()
        self._file = _leave(secret, _folders(self._on_one_host))
        return secret

    def publish(self, port: int) -> None:
        """Tell all other ranks where the hub is; rank 0 calls this.

        Raises:
            RuntimeError: The store cannot be opened.
        """
        host = _LOOPBACK if self._on_one_host else self._host
        source = _BY_ENVIRONMENT if self._file is None else str(self._file)
        self._open().set(self._key, f"{host} {port} {source}")

    def find(self) -> Place:
        """Learn where the hub is; all other ranks call this.

        Raises:
            RuntimeError: Rank 0 did not come in time, or its secret cannot be read here.
        """
        import torch.distributed as dist

        try:
            text: str = self._open().get(self._key).decode()
        except dist.DistError as error:
            raise self._nobody() from error
        host, port, source = text.split(" ", 2)
        return Place(host=host, port=int(port), secret=self._secret(source))

    def close(self) -> None:
        """Remove the file of the secret, which all ranks have read or will not read any more.

        Only the server of the store stays, for process groups: rank 0 has a socket for each client.
        """
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        if not self._serves_store:
            self._store = None

    @property
    def _serves_store(self) -> bool:
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return self._environment.rank == 0 and not by_agent

    @property
    def _key(self) -> str:
        return f"megatron_mimo/failfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def _open(self) -> Any:
        """The store; `init_process_group` will share its server, which is made for several."""
        import torch.distributed as dist

        try:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                self._host,
                self._port,
                is_master=self._serves_store,
                timeout=timedelta(seconds=self._limit_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistError as error:
            raise self._nobody() from error
        return self._store

    def _nobody(self) -> RuntimeError:
        return RuntimeError(
            f"{self._who} did not find rank 0 at {self._host}:{self._port} within "
            f"{self._limit_s:g} s: look for its error above"
        )

    def _secret(self, source: str) -> str:
        if source == _BY_ENVIRONMENT:
            if self._given is None:
                raise RuntimeError(f"{self._who} has no {SECRET}, but rank 0 has one: {_REMEDY}")
            return self._given
        try:
            return _read(Path(source))
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"{self._who} on {socket.gethostname()} cannot read the secret that rank 0 has "
                f"left for this user in {source} ({error}): {_REMEDY}"
            ) from error


def _folders(on_one_host: bool) -> list[Path]:
    """Folders for the secret, the best first; several machines share the home folder alone."""
    here = [Path(tempfile.gettempdir())]
    try:
        home = [Path.home() / ".cache" / "megatron-mimo"]
    except RuntimeError:
        home = []
    return here + home if on_one_host else home


def _leave(secret: str, folders: list[Path]) -> Path:
    """Write the secret to a new file that only this user can read."""
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix="megatron-mimo-failfast-", dir=folder)
            with open(descriptor, "w") as file:
                file.write(secret)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            continue
        return Path(name)
    raise ValueError(
        f"no folder in which rank 0 can leave a secret for the other ranks "
        f"({'; '.join(reasons) or 'no home folder'}): {_REMEDY}"
    )


def _read(path: Path) -> str:
    """Read what `_leave` wrote.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not such a file: the store, which named it, is not to be trusted.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            raise ValueError("not a file of this user")
        if about.st_mode & 0o077:
            raise ValueError("others may read it")
        text = file.read(100).decode(errors="replace")
    if _MADE.fullmatch(text) is None:
        raise ValueError("not such a secret")
    return text


def _meeting_point(environment: RankEnvironment) -> tuple[str, int]:
    if environment.init_method == "env://":
        port = os.environ["MASTER_PORT"]
        if not port.isdigit():
            raise ValueError(f"MASTER_PORT={port!r} is not a whole number")
        return os.environ["MASTER_ADDR"], int(port)
    url = urlsplit(environment.init_method or "")
    assert url.hostname is not None and url.port is not None
    return url.hostname, url.port


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
