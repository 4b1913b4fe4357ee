"""A process that computes items ahead of time for this one.

It is forked with an iterator to run, and sends its items through a separate pipe. Arrays are sent
without pickling: their bytes are written from their memory and read into their final memory.

torch's `DataLoader` is not used for three reasons: it does not know the task of a late process; a
process that dies raises from a signal handler, anywhere in the training step; and a process whose
parent was killed while its pipe is full never ends.
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

from megatron_mimo.runtime.exit_code import how_it_ended
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
    """Time limits for waiting for a process.

    Attributes:
        warn_s: Seconds after which a warning names the process that is waited for.
        fail_s: Seconds after which waiting is an error.
    """

    warn_s: float
    fail_s: float


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that a process raised, as text."""

    text: str


class _End:
    """The iterator has ended."""


class ForkedIterator(Iterator[Any]):
    """The items of an iterator that runs in a separate process.

    Args:
        make: Function that is called in the process and returns the iterator; its argument is a
            function to call with the number of each task that begins.
        name: Name of the process, for messages: "reader process 0 of 4 ...".
        task_name: Function that returns the name of a task from its number, for messages.
        prefetch: Largest number of items that wait in the process; as many again may be in transit.
        patience: Time limits for waiting for an item.
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
        """Id of the process; None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def busy_with(self) -> int | None:
        """Number of the task that the process works on; None between tasks."""
        task: int = self._task.value
        return None if task == _IDLE else task

    def start(self) -> None:
        """Fork the process, after a garbage collection: see `fork_all`."""
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
            RuntimeError: The process died, raised an error, or took too long; the message names it
                and its task.
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
            # The process has ended; its last message may have arrived in between.
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
        how = "ended" if code is None else how_it_ended(code)
        hint = ": was the machine out of memory?" if code == -signal.SIGKILL else ""
        return RuntimeError(f"{self._describe()} {how}{self._at()}{hint}")

    def _describe(self) -> str:
        return f"{self._name} (pid {self.pid})"

    def _at(self) -> str:
        task = self.busy_with
        return "" if task is None else f", busy with {self._task_name(task)}"


def fork_all(iterators: Sequence[ForkedIterator]) -> None:
    """Start the processes, from the thread in which the program began."""
    # Objects that this process does not use any more, such as process groups of gloo, must be
    # collected before: they cannot be destroyed in another process.
    gc.collect()
    # Text in output buffers would be written again by each process.
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
    # Processes that this one has forked hold copies, which must not end the process.
    if os.getpid() != owner:
        return
    os.close(fd)
    process.terminate()
    process.join(timeout=5)
    if process.is_alive():
        process.kill()


# -- in the process --------------------------------------------------------------------------------


def _run(make: Make, task: Any, reading: int, writing: int, prefetch: int, parent: int) -> None:
    # Objects of the parent are never collected here: they cannot be destroyed in this process,
    # and visiting them would copy memory that both share.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Meant for the training process, which decides when this one ends.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    # Images are allocated and freed: a sixth to a third of the processor time of decoding.
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
    # The parent raises every kind of error.
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
            # The parent does not read any more.
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
