"""The line in which operations of a group wait for each other."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.strict.errors import StrictError


@dataclass(slots=True)
class Operation:
    """One operation of a group on this rank, and what a caller waits for.

    Attributes:
        text: What it is, for errors.
        run: Does it; to be called once.
        done: Whether it has ended, in one way or the other.
        error: Why it could not be done.
    """

    text: str
    run: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Line:
    """Runs operations one after the other, in a thread that begins with the first that must wait.

    Args:
        name: Name of the group.
        limit_s: Longest time in seconds that an operation may take.
    """

    def __init__(self, name: str, limit_s: float) -> None:
        self.name = name
        self._limit_s = limit_s
        self._lock = threading.Condition()
        self._waiting: deque[Operation] = deque()
        self._running: Operation | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._broken: BaseException | None = None

    def put(self, text: str, run: Callable[[], None], *, wait: bool) -> "StrictWork":
        """Post an operation.

        Args:
            text: What it is, for errors.
            run: Does it.
            wait: Whether the caller waits for it at once; where nothing is before it, the caller's
                thread then does it.
        """
        operation = Operation(text, run)
        with self._lock:
            here = wait and self._running is None and not self._waiting
            if here:
                self._running = operation
            else:
                self._waiting.append(operation)
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._serve, name=f"strict {self.name}", daemon=True
                    )
                    self._thread.start()
                self._lock.notify()
        if here:
            self._do(operation)
        return StrictWork(operation, self)

    def wait(self, operation: Operation) -> None:
        """Wait until an operation is done.

        Raises:
            StrictError: It is not done within the limit; the message has all that wait.
        """
        # A little longer than transport does, whose error is nearer to the cause.
        deadline = time.monotonic() + self._limit_s + 2
        while not operation.done.wait(max(0.0, deadline - time.monotonic())):
            raise StrictError(stuck(operation.text, self, self._limit_s))
        if operation.error is not None:
            raise operation.error

    def close(self) -> None:
        """End the thread once nothing waits any more."""
        with self._lock:
            self._closed = True
            self._lock.notify()

    def describe(self) -> str | None:
        """What this rank has in line; None for nothing."""
        with self._lock:
            texts = [one.text for one in ([self._running] if self._running else [])]
            texts += [f"then {one.text}" for one in self._waiting]
        return f"{self.name!r}: {', '.join(texts)}" if texts else None

    def _serve(self) -> None:
        while True:
            with self._lock:
                while self._running is not None or not self._waiting:
                    if self._closed:
                        return
                    self._lock.wait()
                self._running = self._waiting.popleft()
                operation = self._running
            self._do(operation)

    def _do(self, operation: Operation) -> None:
        try:
            if self._broken is not None:
                raise self._broken
            with torch.no_grad():
                operation.run()
        except StrictError as error:
            self._broken = error
        except RuntimeError as error:
            self._broken = self._explained(operation, error)
        except BaseException as error:
            self._broken = error
        # Whatever comes after one that failed fails with it.
        operation.error = self._broken
        with self._lock:
            self._running = None
            self._lock.notify()
        operation.done.set()

    def _explained(self, operation: Operation, error: RuntimeError) -> RuntimeError:
        """An error of transport, with what this rank waits for."""
        said = str(error).lower()
        # gloo's and the store's words for it.
        if "timed out" in said or "timeout" in said:
            # Without gloo's own, which would be the first that is read and says less.
            return StrictError(stuck(operation.text, self, self._limit_s))
        return RuntimeError(f"group {self.name!r}: {operation.text}: {error} {in_line()}")


class StrictWork:
    """What an asynchronous operation returns, as torch's `Work`."""

    def __init__(self, operation: Operation, line: Line) -> None:
        self._operation = operation
        self._line = line

    def wait(self, _timeout: Any = None) -> bool:
        """Wait until it is done; on a GPU the stream would wait, and all that is put into it."""
        self._line.wait(self._operation)
        return True

    def is_completed(self) -> bool:
        """Whether it is done."""
        return self._operation.done.is_set()


lines: list[Line] = []
"""Lines of this process that have begun, for errors."""


def stuck(text: str, line: Line, limit_s: float) -> str:
    """What a rank waits for that has waited too long."""
    return (
        f"group {line.name!r}: {text} has waited {limit_s:g} s, as it would under NCCL, where each "
        f"operation of a group waits for those before it. {in_line()}"
    )


def in_line() -> str:
    """What this rank has in line, in all of its groups."""
    found = [said for one in lines if (said := one.describe())]
    return f"In line on this rank: {'; '.join(found) or 'nothing'}"
