"""The rank's side of fail-fast: `guard_rank` around a rank's whole life."""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from megatron_mimo.runtime.environment import RankEnvironment, read_environment
from megatron_mimo.runtime.failfast.report import (
    EXIT_FAILED,
    FailureReport,
    Kind,
    died,
    render,
    write_record,
    write_record_ahead,
)
from megatron_mimo.runtime.failfast.watcher import WatcherConfig
from megatron_mimo.runtime.failfast.wire import Link

SILENCE_S = 5.0
JOIN_S = 600.0

_SWITCH = "MIMO_FAILFAST"
_SILENCE = "MIMO_FAILFAST_SILENCE_S"
_JOIN = "MIMO_FAILFAST_JOIN_S"

_VERDICT_LIMIT_S = 8.0  # longer than the hub takes to decide and to see all others off
_PACKAGE = __name__.partition(".")[0]
_START_WATCHER = Path(__file__).with_name("start_watcher.py")


class Guard(Protocol):
    """What `guard_rank` returns: a context manager around a rank's whole life."""

    def training_starts(self) -> None:
        """From here on a ValueError is no longer taken for the user's wrong input."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None: ...


def guard_rank(role: str, *, silence_s: float | None = None, join_s: float | None = None) -> Guard:
    """End all ranks within seconds when one fails, and show its failure last.

    Put it around everything a rank does, before process groups are made:

        with guard_rank("encoder dp 0 tp 1") as guard:
            trainer = set_up(config)
            guard.training_starts()
            trainer.run()

    Entering waits until all ranks have entered. An exception that leaves the block, and the end
    or standstill of any rank's process, ends the processes of *all* ranks; nothing after the
    block runs then. Exit codes: 0 done, 1 failed, 2 the user's input was wrong. The latter is a
    ValueError that this package itself raised before `training_starts`: only its message is
    shown, as `error: ...`.

    Who shows the failure: under torchrun, torchrun in its summary; else the watcher of rank 0,
    after all other ranks have ended; a single process, itself.

    Rank and number of ranks are read from the environment, see `read_environment`. Variables:
    MIMO_FAILFAST=0 does without watchers (for a debugger that stops a rank for long);
    MIMO_FAILFAST_SILENCE_S and MIMO_FAILFAST_JOIN_S set what the arguments do not.

    Args:
        role: What this rank is, for people.
        silence_s: Seconds after which a rank that stands still, or a machine that is not heard,
            counts as lost. 5 by default, so that everything ends within 10; raise it where the
            network is known to pause. A rank that computes, or holds Python's lock, is not
            standing still, however long it takes.
        join_s: Seconds that ranks wait for each other at the start; 600 by default.

    Raises:
        ValueError: The launcher's variables are incomplete, or a number is not one.
        RuntimeError: On entering, if not all ranks enter in time.
    """
    environment = read_environment(os.environ)
    if environment.init_method is None or os.environ.get(_SWITCH) == "0":
        return _LoneGuard(role, environment.rank)
    return _RankGuard(
        role,
        environment,
        silence_s=_seconds(os.environ, _SILENCE, SILENCE_S) if silence_s is None else silence_s,
        join_s=_seconds(os.environ, _JOIN, JOIN_S) if join_s is None else join_s,
    )


class _LoneGuard:
    """Reports the failure of this process and leaves others alone."""

    def __init__(self, role: str, rank: int) -> None:
        self._role = role
        self._rank = rank
        self._training = False
        self._host = socket.gethostname()
        self._error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")

    def training_starts(self) -> None:
        self._training = True

    def __enter__(self) -> Self:
        ahead = died(self._rank, self._role, self._host, time.time())
        write_record_ahead(self._error_file, ahead)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        if _is_success(error):
            if self._error_file:
                Path(self._error_file).unlink(missing_ok=True)
            return
        assert error is not None
        report = _describe(error, frames, rank=self._rank, role=self._role, training=self._training)
        write_record(self._error_file, report, rank=self._rank, role=self._role, host=self._host)
        if not self._error_file:
            _show(report)
        raise SystemExit(report.exit_code) from None


class _RankGuard:
    """Reports to the watcher of this rank, and ends when the watcher says so."""

    def __init__(
        self, role: str, environment: RankEnvironment, *, silence_s: float, join_s: float
    ) -> None:
        self._role = role
        self._environment = environment
        self._silence_s = silence_s
        self._join_s = join_s
        self._training = False
        self._over = False
        self._pid = os.getpid()
        self._store: Any = None

    def training_starts(self) -> None:
        self._training = True

    def __enter__(self) -> Self:
        self._crash_file = tempfile.TemporaryFile()
        config = WatcherConfig(
            rank=self._environment.rank,
            world_size=self._environment.world_size,
            role=self._role,
            pid=self._pid,
            silence_s=self._silence_s,
            join_s=self._join_s,
            error_file=os.environ.get("TORCHELASTIC_ERROR_FILE", ""),
            crash_descriptor=self._crash_file.fileno(),
        )
        self._link, self._process = _start_watcher(config)
        try:
            self._meet()
        except BaseException:
            self._process.kill()  # it would take this rank's end for a failure of its own
            raise
        faulthandler.enable(self._crash_file)
        threading.Thread(target=self._obey, name="fail-fast", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            return  # a forked child, such as a data loader's, is nobody's rank
        if _is_success(error):
            self._over = True
            faulthandler.disable()
            self._link.send(kind="done")
            return
        assert error is not None
        report = _describe(
            error,
            frames,
            rank=self._environment.rank,
            role=self._role,
            training=self._training,
        )
        if self._link.send(kind="failed", report=report.to_json()):
            threading.Event().wait(_VERDICT_LIMIT_S)  # `_obey` ends the process
        _show(report)
        _end(report.exit_code)

    def _meet(self) -> None:
        """Wait until the watchers of all ranks have met."""
        host, port, token = self._exchange_address()
        self._link.send(kind="meet", host=host, port=port, token=token)
        answer = self._link.receive_first(self._join_s + 2 * _VERDICT_LIMIT_S) or {}
        if answer.get("kind") == "flush":
            # A rank that had entered has failed already; the watchers say which.
            abort = self._link.receive_first(_VERDICT_LIMIT_S) or {}
            _end(abort.get("code", EXIT_FAILED))
        if answer.get("kind") != "ready":
            absent = ", ".join(map(str, answer.get("absent") or ["?"]))
            raise RuntimeError(
                f"rank {absent} (of {self._environment.world_size}) did not start within "
                f"{self._join_s:g} s: look for their errors above, or raise {_JOIN}"
            )

    def _exchange_address(self) -> tuple[str, int, str]:
        """Learn the hub's address and token through the store at which process groups meet."""
        import torch.distributed as dist

        is_first = self._environment.rank == 0
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = _meeting_point(self._environment)
        limit = timedelta(seconds=self._join_s)
        try:
            # `init_process_group` will share this server, as it is made for several tenants.
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                host,
                port,
                is_master=is_first and not by_agent,
                timeout=limit,
                wait_for_workers=False,
                multi_tenant=True,
            )
            key = f"megatron_mimo/failfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            if is_first:
                hub = self._link.receive_first(_VERDICT_LIMIT_S * 4)
                if hub is None:
                    raise RuntimeError("the watcher of rank 0 did not start")
                self._store.set(key, f"{hub['port']} {hub['token']}")
                return "127.0.0.1", int(hub["port"]), hub["token"]
            hub_port, hub_token = self._store.get(key).decode().split()
        except dist.DistError as error:
            raise RuntimeError(
                f"rank {self._environment.rank} ({self._role}) did not find rank 0 at "
                f"{host}:{port} within {self._join_s:g} s: look for its error above"
            ) from error
        return host, int(hub_port), hub_token

    def _obey(self) -> None:
        """Thread: end this process when the watcher says so, or is gone.

        It runs while the main thread waits for a collective, in which Python's lock is free.
        """
        while (messages := self._link.receive()) is not None:
            for message in messages:
                if message["kind"] == "flush":
                    _flush()
                elif message["kind"] == "abort":
                    _end(message["code"])
        if not self._over:
            _say(f"rank {self._environment.rank} ({self._role}) ends: its watcher process is gone")
            _end(EXIT_FAILED)


def _start_watcher(config: WatcherConfig) -> tuple[Link, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    arguments = [str(theirs.fileno()), json.dumps(asdict(config))]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_START_WATCHER), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), config.crash_descriptor],
            start_new_session=True,  # signals to the ranks, such as torchrun's, spare it
        )
    return Link(ours), process


def _describe(
    error: BaseException, frames: TracebackType | None, *, rank: int, role: str, training: bool
) -> FailureReport:
    summary = "".join(traceback.format_exception_only(error)).strip()
    text = "".join(traceback.format_exception(type(error), error, frames))
    kind = Kind.EXCEPTION
    if isinstance(error, KeyboardInterrupt):
        summary, text = "interrupted", ""
    elif isinstance(error, SystemExit):
        kind = Kind.USAGE if error.code == 2 else Kind.EXCEPTION
        summary, text = f"exited with {error.code}", ""
    elif isinstance(error, ValueError) and not training and _raised_here(frames):
        kind, summary = Kind.USAGE, str(error)
    return FailureReport(
        kind=kind,
        rank=rank,
        role=role,
        host=socket.gethostname(),
        summary=summary,
        traceback=text,
        seconds=time.time(),
    )


def _raised_here(frames: TracebackType | None) -> bool:
    """Whether this package's own code raised, as opposed to a library that it called."""
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    name = frames.tb_frame.f_globals.get("__name__", "") if frames is not None else ""
    return bool(name == _PACKAGE or name.startswith(f"{_PACKAGE}."))


def _is_success(error: BaseException | None) -> bool:
    return error is None or (isinstance(error, SystemExit) and error.code in (None, 0))


def _meeting_point(environment: RankEnvironment) -> tuple[str, int]:
    if environment.init_method == "env://":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    url = urlsplit(environment.init_method or "")
    assert url.hostname is not None and url.port is not None
    return url.hostname, url.port


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{name}={text!r}: expected a positive number of seconds")
    return value


def _show(report: FailureReport) -> None:
    _flush()
    _say(render(report))


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def _end(code: int) -> None:
    """End this process now: destructors of process groups may wait for ranks that are gone."""
    _flush()
    for child in multiprocessing.active_children():
        with suppress(OSError, AttributeError):
            os.kill(child.pid or 0, signal.SIGKILL)
    os._exit(code)
