"""The process beside each rank that sees it die or stop, and ends it when another rank failed.

Run by `guard_rank`, with the standard library alone: it must start fast and stay small. It talks
to its rank over a socket pair, and to the hub (in the watcher of rank 0) over TCP.
"""

import json
import os
import resource
import selectors
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.failfast.door import Visit
from megatron_mimo.failfast.hub import Hub
from megatron_mimo.failfast.process import exit_code, open_process, state_and_parent
from megatron_mimo.failfast.report import (
    FailureReport,
    Kind,
    died,
    farewell,
    render,
    write_own_record,
    write_record,
    write_record_ahead,
)
from megatron_mimo.failfast.wire import Link

BEATS = 5
"""A silence that counts as loss is as long as this many beats."""
LONGEST_BEAT_S = 1.0
STALL_S = 2.0
"""A loop that takes longer was itself kept from running, and may not judge others' silence."""
KILL_AFTER_S = 1.0
"""A rank that is told to end, and does not in this time, is killed."""
LEAVE_S = 3.0
"""The hub shows the first failure when all other ranks have ended, but no later than this."""
CRASH_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class WatcherConfig:
    """What a rank tells its watcher.

    Attributes:
        rank: Global rank that is watched.
        world_size: Number of ranks.
        role: Description of the rank in error messages.
        pid: Process id of the rank, the parent of the watcher.
        silence_s: Seconds after which a stopped rank, or a watcher that sends nothing, counts as
            lost.
        join_s: Seconds within which all ranks must have started.
        error_file: Path to the file from which torchrun reads a failed rank's record; "" without
            torchrun.
        crash_descriptor: Descriptor of an open file to which faulthandler writes when the rank
            crashes.
    """

    rank: int
    world_size: int
    role: str
    pid: int
    silence_s: float
    join_s: float
    error_file: str
    crash_descriptor: int


def main(descriptor: int, config: str) -> None:
    """Watch the parent process.

    Args:
        descriptor: Descriptor of this end of a socket pair whose other end the parent holds.
        config: Settings, a `WatcherConfig` as JSON.
    """
    # A rank may leave cleanly on these; its watcher stays until it has.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The hub has a connection for each rank.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    link = Link(socket.socket(fileno=descriptor))
    Watcher(WatcherConfig(**json.loads(config)), link).run()


class Watcher:
    """Event loop of the watcher: one thread, callbacks on sockets, checks once per tick."""

    def __init__(self, config: WatcherConfig, rank_link: Link) -> None:
        self._config = config
        self._host = socket.gethostname()
        self._selector = selectors.DefaultSelector()
        self._rank_link = rank_link
        self._rank_alive = True
        self._exit_code: int | None = None
        self._rank_done = False
        self._leave_until = 0.0
        self._launcher = state_and_parent(config.pid)[1]
        self._pidfd = open_process(config.pid)
        self._hub: Hub | None = None
        self._hub_link: Link | None = None
        self._visit: Visit | None = None
        self._hub_role = "unknown role"
        self._hub_host = "unknown machine"
        self._hub_heard = 0.0
        self._welcomed = False
        self._stopped_since: float | None = None
        self._own: FailureReport | None = None
        self._verdict: FailureReport | None = None
        self._verdict_at = 0.0
        self._shown = False
        self._kill_at: float | None = None
        self._beat_s = min(LONGEST_BEAT_S, config.silence_s / BEATS)
        self._next_beat = 0.0
        self._join_until = time.monotonic() + config.join_s

    def run(self) -> None:
        """Watch until the rank has ended, with success or not."""
        self._selector.register(self._rank_link, selectors.EVENT_READ, self._hear_rank)
        if self._pidfd is not None:
            self._selector.register(self._pidfd, selectors.EVENT_READ, self._rank_died)
        write_record_ahead(self._config.error_file, self._death())
        last = time.monotonic()
        while not self._finished(last):
            for key, _ in self._selector.select(self._beat_s / 2):
                key.data()
            now = time.monotonic()
            if now - last > STALL_S:
                self._forgive(now)
            last = now
            self._tick(now)

    def _finished(self, now: float) -> bool:
        if self._rank_alive and not self._rank_done:
            return False
        if self._rank_done and self._config.error_file and self._verdict is None:
            Path(self._config.error_file).unlink(missing_ok=True)
        others = self._hub.others(self._config.rank) if self._hub is not None else 0
        if self._verdict is None:
            # The watcher of a dead rank stays until the hub has decided which rank failed first,
            # that of a finished rank until the hub has noted it, the hub until all have left.
            noted = self._hub_link is None or now > self._leave_until
            return self._rank_done and noted and others == 0
        return self._shown and (others == 0 or now > self._verdict_at + LEAVE_S)

    # What the rank says and does.

    def _hear_rank(self) -> None:
        messages = self._rank_link.receive()
        if messages is None:
            self._selector.unregister(self._rank_link)
            if self._pidfd is None:
                self._rank_died()
            return
        for message in messages:
            if message["kind"] == "serve":
                self._serve(message["address"], message["secret"])
            elif message["kind"] == "meet":
                self._meet((message["host"], message["port"]), message["secret"])
            elif message["kind"] == "failed":
                self._report(FailureReport.from_json(message["report"]))
            elif message["kind"] == "done":
                self._rank_done = True
                self._leave_until = time.monotonic() + LEAVE_S
                if self._hub_link is not None:
                    self._hub_link.send(kind="bye")

    def _rank_died(self) -> None:
        if not self._rank_alive:
            return
        self._rank_alive = False
        if self._pidfd is not None:
            self._selector.unregister(self._pidfd)
        if not self._rank_done and self._verdict is None and self._own is None:
            self._exit_code = exit_code(self._config.pid)
            self._report(self._death())

    def _check_rank(self, now: float) -> None:
        """Check whether the process is stopped, has lost its launcher, or has ended."""
        if self._pidfd is None and os.getppid() != self._config.pid:
            self._rank_died()
        if not self._rank_alive or self._rank_done or self._own is not None:
            return
        state, launcher = state_and_parent(self._config.pid)
        if state != "T":
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since >= self._config.silence_s:
            self._report(
                self._describe(
                    Kind.STOPPED, f"its process was stopped for {self._config.silence_s:g} s"
                )
            )
        if self._config.error_file and launcher != self._launcher and state not in ("", "Z"):
            self._report(self._describe(Kind.LAUNCHER, "its launcher is gone"))

    def _report(self, report: FailureReport) -> None:
        self._own = report
        if not report.is_consequence:
            maybe_ended = report.kind is Kind.DIED and self._exit_code in (None, -signal.SIGTERM)
            write_own_record(self._config.error_file, report, maybe_ended=maybe_ended)
        if self._hub_link is None or not self._hub_link.send(
            kind="failed", report=report.to_json()
        ):
            self._decide(report)

    def _death(self) -> FailureReport:
        crash = os.pread(self._config.crash_descriptor, CRASH_LIMIT, 0).decode(errors="replace")
        return died(
            self._config.rank,
            self._config.role,
            self._host,
            time.time(),
            exit_code=self._exit_code,
            crash=crash,
        )

    def _describe(self, kind: Kind, summary: str) -> FailureReport:
        return FailureReport(
            kind=kind,
            rank=self._config.rank,
            role=self._config.role,
            host=self._host,
            summary=summary,
            seconds=time.time(),
        )

    # The hub.

    def _serve(self, address: str, secret: str) -> None:
        self._hub = Hub(
            self._selector,
            self._config.world_size,
            self._config.silence_s,
            address=address,
            secret=secret,
            role=self._config.role,
        )
        host, port = self._hub.address
        self._rank_link.send(kind="hub", host=host, port=port)

    def _meet(self, address: tuple[str, int], secret: str) -> None:
        self._visit = Visit(
            self._selector,
            address,
            secret=secret,
            rank=self._config.rank,
            world_size=self._config.world_size,
            welcomed=self._join,
            refused=self._turned_away,
        )

    def _join(self, link: Link) -> None:
        self._hub_link = link
        self._hub_heard = time.monotonic()
        self._selector.register(link, selectors.EVENT_READ, self._hear_hub)
        link.send(kind="join", role=self._config.role, host=self._host)
        if link.wait(0.0):
            self._hear_hub()

    def _turned_away(self, reason: str) -> None:
        self._rank_link.send(kind="refused", reason=reason)

    def _hear_hub(self) -> None:
        assert self._hub_link is not None
        self._hub_heard = time.monotonic()
        messages = self._hub_link.receive()
        how = "closed its connection without a word"
        try:
            for message in messages or []:
                self._take(message)
        except ValueError:
            messages, how = None, "sent something that no hub sends"
        if self._hub_link.is_broken:
            how = "sent something that no hub sends"
        if messages is None:
            self._lose_hub(how)

    def _take(self, message: Mapping[str, Any]) -> None:
        """Take a message of the hub.

        Raises:
            ValueError: No hub sends that.
        """
        if message["kind"] == "welcome":
            self._welcomed = True
            self._hub_role, self._hub_host = str(message.get("role")), str(message.get("host"))
            self._rank_link.send(kind="ready")
        elif message["kind"] == "verdict":
            self._decide(FailureReport.from_json(message.get("report", {})))

    def _lose_hub(self, how: str) -> None:
        assert self._hub_link is not None
        self._selector.unregister(self._hub_link)
        self._hub_link.close()
        self._hub_link = None
        if self._rank_done or self._verdict is not None:
            return
        if self._own is not None and not self._own.is_consequence:
            self._decide(self._own)
            return
        self._decide(
            FailureReport(
                kind=Kind.SILENT,
                rank=0,
                role=self._hub_role,
                host=self._hub_host,
                summary=f"lost: its watcher {how}; its machine or the network may be down",
                seconds=time.time(),
            )
        )

    def _forgive(self, now: float) -> None:
        self._hub_heard = now
        self._stopped_since = None
        if self._hub is not None:
            self._hub.forgive(now)

    # The end.

    def _decide(self, first: FailureReport) -> None:
        """The run has failed: end this rank."""
        if self._verdict is not None:
            return
        self._verdict = first
        self._verdict_at = time.monotonic()
        if self._rank_alive:
            write_record(
                self._config.error_file,
                first,
                rank=self._config.rank,
                role=self._config.role,
                host=self._host,
            )
        self._rank_link.send(kind="flush")

    def _tick(self, now: float) -> None:
        if self._verdict is None:
            self._check_rank(now)
            self._keep_in_touch(now)
        if self._hub is not None and self._hub.decide() and self._hub.verdict is not None:
            self._decide(self._hub.verdict)
        if self._verdict is not None:
            self._end_rank(now, self._verdict)

    def _keep_in_touch(self, now: float) -> None:
        if self._visit is not None:
            self._visit.tick(now)
        if self._hub is not None:
            self._hub.tick(now)
        if now >= self._next_beat:
            self._next_beat = now + self._beat_s
            if self._hub_link is not None:
                self._hub_link.send(kind="beat")
            if self._hub is not None:
                self._hub.beat()
        if self._hub_link is not None and now - self._hub_heard > self._config.silence_s:
            self._lose_hub(f"was not heard for {self._config.silence_s:g} s")
        if not self._welcomed and now > self._join_until:
            self._join_until = float("inf")
            absent = self._hub.absent if self._hub is not None else ()
            self._rank_link.send(kind="late", absent=list(absent))

    def _end_rank(self, now: float, first: FailureReport) -> None:
        """Show the failure, unless torchrun will; end the rank, kill it if it does not end."""
        is_hub = self._hub is not None
        if not self._shown:
            others = self._hub.others(self._config.rank) if self._hub is not None else 0
            by_torchrun = bool(self._config.error_file) and first.kind is not Kind.LAUNCHER
            if is_hub and not by_torchrun and others and now < self._verdict_at + LEAVE_S:
                return
            if not by_torchrun:
                self._show(first)
            self._shown = True
            self._rank_link.send(kind="abort", code=first.exit_code)
            stands_still = self._stopped_since is not None
            self._kill_at = now if stands_still else now + KILL_AFTER_S
        if self._rank_alive and self._kill_at is not None and now >= self._kill_at:
            self._kill_rank()

    def _show(self, first: FailureReport) -> None:
        """Print the failure: the hub does; another watcher only if the hub cannot."""
        if self._hub is not None or self._hub_link is None:
            text = render(first)
        elif first.rank == self._config.rank or first.kind is Kind.USAGE:
            return
        else:
            text = farewell(self._config.rank, self._config.role, first)
        try:
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))
        except OSError:
            pass  # standard error is closed

    def _kill_rank(self) -> None:
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif os.getppid() == self._config.pid:
                os.kill(self._config.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
