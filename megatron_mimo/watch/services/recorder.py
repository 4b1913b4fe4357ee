"""Program of the process that records in one service; started by `Courier`, with `-m`.

It reads messages from its standard input, and answers on its standard output, a JSON object a
line. It outlives neither the run nor its rank: it ends when there are no more messages.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_mimo.watch.services.mlflow_service import MlflowService
from megatron_mimo.watch.services.run_id import KeptId, read_id, write_id
from megatron_mimo.watch.services.service import (
    CLOSE_S,
    Refused,
    Row,
    Service,
    Start,
    one_line,
)
from megatron_mimo.watch.services.wandb_service import WandbService

SERVICES: Mapping[str, Callable[..., Service]] = {"wandb": WandbService, "mlflow": MlflowService}

_GLANCE_S = 1.0
_RETRY_S = 10.0
_MOST_WAITING = 10_000
_ORPHAN_S = 15.0
_NICE = 10  # Steps of the ranks of this machine come first.
Answer = Callable[..., None]


class Inbox:
    """Messages of the rank, until it closes its end or ends itself.

    Args:
        descriptor: File descriptor to read.
        parent: Process id of the rank. Its readers are forked from it and hold its end open as
            well, so the end of the pipe alone would come too late.
    """

    def __init__(self, descriptor: int, parent: int) -> None:
        self._descriptor, self._parent = descriptor, parent
        self._rest = b""

    def take(self) -> list[dict[str, Any]] | None:
        """Messages that have come within a second; None when no more will come."""
        ready, _, _ = select.select([self._descriptor], [], [], _GLANCE_S)
        if not ready:
            return [] if os.getppid() == self._parent else None
        found = os.read(self._descriptor, 1 << 20)
        if not found:
            return None
        *lines, self._rest = (self._rest + found).split(b"\n")
        return [json.loads(line) for line in lines]


class Recorder:
    """Hands rows on to a service, and keeps those that it does not take for later.

    Args:
        service: Service that was checked.
        path: File that keeps the id of the run; None keeps none.
        answer: Function that sends an answer to the rank.
    """

    def __init__(self, service: Service, path: Path | None, answer: Answer) -> None:
        self._service, self._path, self._answer = service, path, answer
        self._waiting: deque[Row] = deque()
        self._warned = False
        self._retry = 0.0
        self._dropped = 0

    def open(self, start: Start) -> None:
        """Begin a run, or go on with the one that the run's folder has the id of.

        Raises:
            Refused: The run cannot be begun.
        """
        try:
            kept = None if self._path is None else read_id(self._path)
        except ValueError as error:
            raise Refused(str(error)) from error
        # What begins anew is another run, also in the same folder.
        if kept is not None and (start.iteration == 0 or kept.identity != self._service.identity):
            kept = None
        try:
            run_id, text = self._service.open(start, None if kept is None else kept.id)
        except Refused as error:
            if kept is None:
                raise
            raise Refused(f"{error}; without {self._path}, a new run is begun") from error
        last = 0 if kept is None else kept.iteration
        self._kept = KeptId(id=run_id, identity=self._service.identity, iteration=last)
        self._first = last + 1
        if last > start.iteration:
            text += (
                f"; it has iterations up to {last} and takes none twice, so it gets nothing before "
                f"iteration {last + 1}"
            )
        try:
            self._keep()
        except OSError as error:
            raise Refused(f"{self._path} cannot be written: {one_line(error)}") from error
        self._answer(kind="opened", text=text)

    def add(self, row: Row) -> None:
        """Take a row, which `deliver` hands on."""
        if row.iteration < self._first:
            return
        if len(self._waiting) == _MOST_WAITING:
            self._waiting.popleft()
            self._dropped += 1
        self._waiting.append(row)

    def deliver(self, *, now: bool = False) -> None:
        """Hand on what waits; a failure is told once, and tried again after a while.

        Args:
            now: Whether to try although the last attempt has just failed.
        """
        if not self._waiting or (not now and time.monotonic() < self._retry):
            return
        try:
            while self._waiting:
                self._service.log(self._waiting[0])
                self._kept = KeptId(
                    id=self._kept.id,
                    identity=self._kept.identity,
                    iteration=self._waiting[0].iteration,
                )
                self._waiting.popleft()
            self._keep()
        # A service raises whatever its libraries do, and none of it may end the curves.
        except Exception as error:
            self._retry = time.monotonic() + _RETRY_S
            if not self._warned:
                self._warned = True
                self._answer(
                    kind="warning",
                    text=f"takes no curves at iteration {self._iteration}: {one_line(error)}; "
                    f"training goes on, and what is missing there is tried again",
                )

    def close(self, *, failed: bool) -> None:
        """Hand on what waits, and end the run."""
        self.deliver(now=True)
        lost = self._dropped + len(self._waiting)
        if lost:
            self._answer(
                kind="warning",
                text=f"lacks {lost} log lines of the run, which it did not take; metrics.jsonl and "
                f"the event files have them",
            )
        try:
            self._service.close(failed=failed)
        except Exception as error:
            self._answer(kind="warning", text=f"did not end the run: {one_line(error)}")

    @property
    def _iteration(self) -> int:
        return self._waiting[0].iteration if self._waiting else self._kept.iteration

    def _keep(self) -> None:
        if self._path is not None:
            write_id(self._path, self._kept)


def main() -> None:
    """Record what the messages say; the first names the service, its settings and the folder."""
    # Only the rank decides when a run ends: this process sees it end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    inbox = Inbox(0, os.getppid())
    os.nice(_NICE)
    answers = os.dup(1)
    # What the packages print would mix with answers, or with the rank's own lines.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)

    def answer(**values: Any) -> None:
        try:
            os.write(answers, (json.dumps(values) + "\n").encode())
        except OSError:
            pass  # The rank has ended, and `inbox` will say so.

    try:
        failed = _record(inbox, answer)
    except Refused as error:
        answer(kind="refused", text=str(error))
        sys.exit(2)
    # Such as a package that is installed in part.
    except Exception as error:
        answer(kind="refused", text=f"recording failed: {type(error).__name__}: {one_line(error)}")
        raise
    if not failed:
        answer(kind="closed")


def _record(inbox: Inbox, answer: Answer) -> bool:
    """Whether the run ended before its time.

    Raises:
        Refused: The service cannot be used.
    """
    recorder: Recorder | None = None
    service: Service | None = None
    path: Path | None = None
    is_open = False
    while (messages := inbox.take()) is not None:
        for message in messages:
            kind = message.pop("kind")
            if kind == "begin":
                service = SERVICES[message["service"]](**message["settings"])
                path = None if message["id_file"] is None else Path(message["id_file"])
                service.check()
                recorder = Recorder(service, path, answer)
                answer(kind="ready")
            elif recorder is not None and kind == "open":
                recorder.open(Start(**message))
                is_open = True
            elif recorder is not None and kind == "row":
                recorder.add(Row(**message))
            elif recorder is not None and kind == "close":
                _end_within(CLOSE_S + 5, answer)
                recorder.close(failed=False)
                return False
        if recorder is not None and is_open:
            recorder.deliver()
    if recorder is not None and is_open:
        _end_within(_ORPHAN_S, answer)
        recorder.close(failed=True)
    return True


def _end_within(seconds: float, answer: Answer) -> None:
    """End this process after a while, whatever a service is waiting for."""

    def end() -> None:
        answer(kind="warning", text="took too long at the end of the run; the last values are lost")
        answer(kind="closed")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
