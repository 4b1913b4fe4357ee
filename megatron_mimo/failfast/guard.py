"""The rank's side of fail-fast: `guard_rank`, a context manager around all that a rank does."""

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
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

from megatron_mimo.failfast.meeting import SECRET, Meeting, Place
from megatron_mimo.failfast.process import state_and_parent
from megatron_mimo.failfast.report import (
    EXIT_FAILED,
    FailureReport,
    Kind,
    died,
    render,
    write_record,
    write_record_ahead,
)
from megatron_mimo.failfast.watcher import WatcherConfig
from megatron_mimo.failfast.wire import Link
from megatron_mimo.runtime.environment import RankEnvironment, read_environment

SILENCE_S = 5.0
JOIN_S = 600.0

_SWITCH = "MIMO_FAILFAST"
_SILENCE = "MIMO_FAILFAST_SILENCE_S"

_WATCHER_PART = 0.6
"""Part of the silence for which a watcher may be stopped: less, so that its rank tells the hub."""
_GLANCE_S = 0.5
_VERDICT_LIMIT_S = 8.0  # longer than the hub takes to decide and to see all others off
_PACKAGE = __name__.partition(".")[0]
_START_WATCHER = Path(__file__).with_name("start_watcher.py")


class Guard(Protocol):
    """What `guard_rank` returns: a context manager around all that a rank does."""

    def training_starts(self) -> None:
        """Report a ValueError as a failure from now on, no longer as wrong input of the user."""

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
    MIMO_FAILFAST_SILENCE_S sets what the argument does not; MIMO_FAILFAST_SECRET is what the
    watchers know each other by, one text for all ranks, which launchers set (see `meeting`).

    Args:
        role: Description of this rank in error messages, such as `encoder dp 0 tp 1`.
        silence_s: Seconds after which a stopped rank, or a machine from which no message arrives,
            counts as lost. 5 by default, so that everything ends within 10 seconds; raise it where
            the network is known to pause. A rank that computes, or holds Python's lock, is not
            stopped, however long it takes.
        join_s: Seconds that ranks wait for each other at the start; 600 by default.

    Raises:
        ValueError: The launcher's variables are incomplete, a variable is not a positive number, or
            the secret is too short.
        SystemExit: On entering: not all ranks have entered in time, or they have not the same
            secret. A line says so.
    """
    environment = read_environment(os.environ)
    if environment.init_method is None or os.environ.get(_SWITCH) == "0":
        return _LoneGuard(role, environment.rank)
    return _RankGuard(
        role,
        environment,
        silence_s=_seconds(os.environ, _SILENCE, SILENCE_S) if silence_s is None else silence_s,
        join_s=JOIN_S if join_s is None else join_s,
    )


class _LoneGuard:
    """Reports the failure of this process; does not affect other processes."""

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
        self._watcher_stopped: float | None = None
        self._watcher_blamed = 0.0
        self._meeting = Meeting(environment, role, join_s)

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
        except (RuntimeError, ValueError) as error:
            self._process.kill()  # it would take this rank's end for a failure of its own
            self._give_up(error)
        except BaseException:
            self._process.kill()
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
            return  # a forked child, such as a data loader's, is not a rank
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

    def _give_up(self, error: Exception) -> NoReturn:
        """End this rank, which did not meet the others; the message says why, a traceback not."""
        rank, host = self._environment.rank, socket.gethostname()
        report = FailureReport(
            kind=Kind.USAGE if isinstance(error, ValueError) else Kind.EXCEPTION,
            rank=rank,
            role=self._role,
            host=host,
            summary=str(error),
            seconds=time.time(),
        )
        record = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        write_record(record, report, rank=rank, role=self._role, host=host)
        if not record:
            _show(report)
        raise SystemExit(report.exit_code) from None

    def _meet(self) -> None:
        """Wait until the watchers of all ranks have met."""
        try:
            self._introduce()
            answer = self._link.receive_first(self._join_s + 2 * _VERDICT_LIMIT_S) or {}
        finally:
            self._meeting.close()
        if answer.get("kind") == "flush":
            # A rank that had entered has failed already; the watchers say which.
            abort = self._link.receive_first(_VERDICT_LIMIT_S) or {}
            _end(abort.get("code", EXIT_FAILED))
        if answer.get("kind") == "refused":
            raise RuntimeError(
                f"rank {self._environment.rank} ({self._role}) did not reach the watcher of rank "
                f"0: {answer['reason']}. Are {SECRET} and the number of ranks the same everywhere?"
            )
        if answer.get("kind") != "ready":
            absent = ", ".join(map(str, answer.get("absent") or ["?"]))
            raise RuntimeError(
                f"rank {absent} (of {self._environment.world_size}) did not start within "
                f"{self._join_s:g} s: look for their errors above, or raise "
                f"--distributed-timeout-minutes"
            )

    def _introduce(self) -> None:
        """Tell the watcher where the hub is; that of rank 0 is the hub."""
        if self._environment.rank == 0:
            secret = self._meeting.make_secret()
            address = self._meeting.listening_address
            self._link.send(kind="serve", address=address, secret=secret)
            hub = self._link.receive_first(_VERDICT_LIMIT_S * 4)
            if hub is None:
                raise RuntimeError("the watcher of rank 0 did not start")
            self._meeting.publish(hub["port"])
            place = Place(host=hub["host"], port=hub["port"], secret=secret)
        else:
            place = self._meeting.find()
        self._link.send(kind="meet", host=place.host, port=place.port, secret=place.secret)

    def _obey(self) -> None:
        """Thread that ends this process when its watcher says so, or has ended itself.

        It runs while the main thread waits for a collective, in which Python's lock is free.
        """
        messages: list[dict[str, Any]] | None = []
        while messages is not None:
            if not self._link.wait(_GLANCE_S):
                self._mind_watcher()
                continue
            messages = self._link.receive()
            for message in messages or []:
                if message["kind"] == "flush":
                    _flush()
                elif message["kind"] == "abort":
                    _end(message["code"])
        if not self._over:
            _say(f"rank {self._environment.rank} ({self._role}) ends: its watcher process is gone")
            _end(EXIT_FAILED)

    def _mind_watcher(self) -> None:
        """Report a watcher that is stopped: it sees no end of this rank, and brings no verdict.

        It is continued to pass on the report. If that brings no verdict, this rank ends by itself.
        """
        now = time.monotonic()
        limit_s = _WATCHER_PART * self._silence_s
        is_stopped = state_and_parent(self._process.pid)[0] == "T"
        if self._watcher_blamed:
            if is_stopped or now - self._watcher_blamed > _VERDICT_LIMIT_S:
                self._process.kill()  # then `_obey` sees that it is gone
        elif not is_stopped:
            self._watcher_stopped = None
        elif self._watcher_stopped is None:
            self._watcher_stopped = now
        elif now - self._watcher_stopped > limit_s:
            self._watcher_blamed = now
            report = FailureReport(
                kind=Kind.STOPPED,
                rank=self._environment.rank,
                role=self._role,
                host=socket.gethostname(),
                summary=f"its watcher process was stopped for {limit_s:g} s",
                seconds=time.time(),
            )
            self._link.send(kind="failed", report=report.to_json())
            self._process.send_signal(signal.SIGCONT)


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
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


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
