"""A process that makes things ahead of time for this one.

It is forked with an iterator to run, and sends what that yields through a pipe of its own. Arrays
cross without being pickled: their bytes are written from where they lie to where they will lie.

torch's `DataLoader` is not used for three reasons: it does not know what a late process works at; a
process that dies raises from a signal handler, anywhere in the training step; and one whose parent
was killed while its pipe is full stays for good.
"""

import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import select
import signal
import struct
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from typing import Any

import numpy as np
import torch

from megatron_mimo.runtime.host.memory import keep_freed_memory

_logger = logging.getLogger(__name__)
_CONTEXT = multiprocessing.get_context("fork")
# A message: the length of its pickle and the number of its arrays, the lengths of the arrays, the
# pickle, the arrays.
_HEAD = struct.Struct("<QQ")
# The system takes 1024 pieces in one call.
_PIECES = 1000
_PIPE_BYTES = 1 << 20
_IDLE = -1

Begin = Callable[[int], None]
Make = Callable[[Begin], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a process.

    Attributes:
        warn_s: Seconds after which a warning says whom this one waits for.
        fail_s: Seconds after which that is an error.
    """

    warn_s: float
    fail_s: float


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a process raised, as text."""

    text: str


class _End:
    """The iterator has ended."""


class ForkedIterator(Iterator[Any]):
    """What an iterator yields in a process of its own.

    Args:
        make: Called in the process; gets a function that it may call with the number of the task
            that it begins.
        name: Of the process, for messages: "reader process 0 of 4 ...".
        task_name: Name of a task by its number, for messages.
        prefetch: Items that wait in the process, at most; as many again may be under way.
        patience: How long to wait for an item.
    """

    def __init__(
        self,
        make: Make,
        *,
        name: str,
        task_name: Callable[[int], str],
        prefetch: int,
        patience: Patience,
    ) -> None:
        self._make = make
        self._name = name
        self._task_name = task_name
        self._prefetch = prefetch
        self._patience = patience
        self._task = RawValue("q", _IDLE)
        self._fd = -1
        self._process: BaseProcess | None = None
        self._poll = select.poll()

    @property
    def pid(self) -> int | None:
        """Of the process; None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def busy_with(self) -> int | None:
        """The task that the process works at; None between tasks."""
        task: int = self._task.value
        return None if task == _IDLE else task

    def start(self) -> None:
        """Fork the process. Garbage must have been collected: see `fork_all`."""
        self._fd, writing = os.pipe()
        with contextlib.suppress(OSError, AttributeError):
            import fcntl

            # Fewer, larger pieces; there is a limit over all pipes of a user.
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._process = _CONTEXT.Process(
            target=_run,
            args=(self._make, self._task, self._fd, writing, self._prefetch, os.getpid()),
            name=self._name,
            daemon=True,
        )
        self._process.start()
        os.close(writing)
        self._poll.register(self._fd, select.POLLIN)
        self._poll.register(self._process.sentinel, select.POLLIN)
        weakref.finalize(self, _stop, self._process, self._fd, os.getpid())

    def __next__(self) -> Any:
        """The next item.

        Raises:
            RuntimeError: The process died, raised, or took too long; names it and its task.
        """
        try:
            item = self._receive()
        except EOFError:
            raise self._died() from None
        if isinstance(item, _End):
            raise StopIteration
        if isinstance(item, _Failure):
            raise RuntimeError(f"{self._name} failed{self._at()}:\n{item.text}")
        return item

    def _receive(self) -> Any:
        head = bytearray(_HEAD.size)
        self._read([memoryview(head)])
        length, arrays = _HEAD.unpack(head)
        lengths = np.empty(arrays, np.uint64)
        pickled = bytearray(length)
        self._read([memoryview(lengths).cast("B"), memoryview(pickled)])
        buffers = [memoryview(np.empty(int(size), np.uint8)) for size in lengths]
        self._read(buffers)
        # Written by a process that this one has forked.
        return pickle.loads(pickled, buffers=buffers)  # noqa: S301

    def _read(self, pieces: Sequence[memoryview]) -> None:
        _transfer(self._read_some, pieces)

    def _read_some(self, pieces: list[memoryview]) -> int:
        began = time.monotonic()
        warned = False
        while not (ready := self._poll.poll(1e3 * self._left(began, warned))):
            waited = time.monotonic() - began
            if waited >= self._patience.fail_s:
                raise RuntimeError(
                    f"{self._describe()} has sent nothing for {waited:.0f} s{self._at()}: "
                    f"check the storage and the machine"
                )
            if not warned and waited >= self._patience.warn_s:
                warned = True
                _logger.warning(
                    "%s has sent nothing for %.0f s%s; an error after %.0f s",
                    self._describe(),
                    waited,
                    self._at(),
                    self._patience.fail_s,
                )
        if all(fd != self._fd for fd, _ in ready):
            # The process has ended; its last words may have come in between.
            ready = self._poll.poll(0)
            if all(fd != self._fd for fd, _ in ready):
                raise EOFError
        return os.readv(self._fd, pieces)

    def _left(self, began: float, warned: bool) -> float:
        until = self._patience.fail_s if warned else self._patience.warn_s
        return max(0.0, min(until, self._patience.fail_s) - (time.monotonic() - began))

    def _died(self) -> RuntimeError:
        assert self._process is not None
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        hint = ": was the machine out of memory?" if code == -signal.SIGKILL else ""
        return RuntimeError(f"{self._describe()} {how}{self._at()}{hint}")

    def _describe(self) -> str:
        return f"{self._name} (pid {self.pid})"

    def _at(self) -> str:
        task = self.busy_with
        return "" if task is None else f", busy with {self._task_name(task)}"


def fork_all(iterators: Sequence[ForkedIterator]) -> None:
    """Start them, from the thread in which the program began."""
    # What this process has left, process groups of gloo for one, must be gone by then: it cannot be
    # ended elsewhere.
    gc.collect()
    # What waits in buffers would come out once more from each process.
    sys.stdout.flush()
    sys.stderr.flush()
    for iterator in iterators:
        iterator.start()


def _transfer(call: Callable[[list[memoryview]], int], pieces: Sequence[memoryview]) -> None:
    """Read or write all pieces with calls that may do a part."""
    left = deque(piece for piece in pieces if piece.nbytes)
    while left:
        done = call(list(islice(left, _PIECES)))
        if not done:
            raise EOFError
        while done and done >= left[0].nbytes:
            done -= left.popleft().nbytes
        if done:
            left[0] = left[0][done:]


def _stop(process: BaseProcess, fd: int, owner: int) -> None:
    # Processes that this one has forked hold copies, which are not theirs to end.
    if os.getpid() != owner:
        return
    os.close(fd)
    process.terminate()
    process.join(timeout=5)
    if process.is_alive():
        process.kill()


# -- in the process --------------------------------------------------------------------------------


def _run(make: Make, task: Any, reading: int, writing: int, prefetch: int, parent: int) -> None:
    # Nothing of the parent's is ever collected here: it could not be ended, and looking at it
    # would copy the memory that both share.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Meant for the training process, which says when this one ends.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    # Pictures come and go: a sixth to a third of the processor time of decoding them.
    keep_freed_memory()
    os.close(reading)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    ready: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
    sender = threading.Thread(target=_send_all, args=(ready, writing), daemon=True)
    sender.start()

    def begin(number: int) -> None:
        task.value = number

    try:
        for item in make(begin):
            task.value = _IDLE
            ready.put(item)
        ready.put(_End())
    # Whatever it is, the parent raises it.
    except BaseException:
        ready.put(_Failure(traceback.format_exc()))
    sender.join()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _send_all(ready: "queue.Queue[Any]", fd: int) -> None:
    while True:
        item = ready.get()
        try:
            _send(item, fd)
        except OSError:
            # Nobody reads any more.
            os._exit(1)
        if isinstance(item, _End | _Failure):
            return


def _send(item: Any, fd: int) -> None:
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(item, protocol=5, buffer_callback=arrays.append)
    raw = [array.raw() for array in arrays]
    lengths = np.array([piece.nbytes for piece in raw], np.uint64)
    head = _HEAD.pack(len(pickled), len(raw))
    pieces = [memoryview(head), memoryview(lengths).cast("B"), memoryview(pickled), *raw]
    _transfer(lambda left: os.writev(fd, left), pieces)
