"""Processes that make things ahead of time: what they send, and how their end is noticed."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mimo.data.reading.processes import Begin, ForkedIterator, Make, Patience, fork_all

PATIENT = Patience(60, 120)


def started(make: Make, patience: Patience = PATIENT, prefetch: int = 2) -> ForkedIterator:
    process = ForkedIterator(
        make,
        name="reader process 1 of 4",
        task_name=lambda number: f"global worker {number}",
        prefetch=prefetch,
        patience=patience,
    )
    fork_all([process])
    return process


def waits(begin: Begin) -> Iterator[int]:
    """One item, then nothing for good."""
    yield 1
    begin(7)
    time.sleep(600)


def until(happened: Callable[[], bool]) -> None:
    """Wait for it; the test's own time limit is the end of patience."""
    while not happened():
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Not so if nobody has taken note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_items_come_in_order_and_end() -> None:
    process = started(lambda begin: iter([1, "two", None, (4, {5: 6.0})]))
    assert list(process) == [1, "two", None, (4, {5: 6.0})]


@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
def test_arrays_arrive_as_they_were(size: int) -> None:
    def make(begin: Begin) -> Iterator[Any]:
        for seed in range(3):
            whole = np.random.default_rng(seed).integers(0, 255, (size, 3), dtype=np.uint8)
            yield {
                "a": whole,
                "b": whole[:, ::2],
                "c": whole.T,
                "d": np.arange(seed, dtype=np.int64),
            }

    for found, wanted in zip(started(make), make(int), strict=True):
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
            assert found[name].dtype == wanted[name].dtype
        found["a"][:] = 0  # nobody else's memory, and writable


def test_many_arrays_fit_one_item() -> None:
    (found,) = started(lambda begin: iter([[np.full(3, i) for i in range(5000)]]))
    assert [int(array[0]) for array in found] == list(range(5000))


def test_a_process_works_ahead_but_not_without_end(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.touch()

    def make(begin: Begin) -> Iterator[bytes]:
        while True:
            with made.open("a") as file:
                file.write("x")
            yield bytes(4 << 20)  # more than any pipe holds

    process = started(make, prefetch=3)
    # Three wait, one is on its way, one is made.
    until(lambda: len(made.read_text()) == 5)
    time.sleep(0.3)
    assert len(made.read_text()) == 5
    next(process)
    until(lambda: len(made.read_text()) == 6)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_named_with_its_signal_and_task(number: signal.Signals) -> None:
    process = started(waits)
    next(process)
    until(lambda: process.busy_with == 7)
    os.kill(process.pid, number)
    with pytest.raises(
        RuntimeError,
        match=rf"^reader process 1 of 4 \(pid {process.pid}\) was killed by {number.name}, "
        r"busy with global worker 7",
    ):
        next(process)


def test_a_process_killed_while_it_sends_is_named() -> None:
    process = started(lambda begin: iter([bytes(64 << 20)]))
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="killed by SIGKILL"):
        next(process)


def test_a_process_that_leaves_is_named_with_its_code() -> None:
    process = started(lambda begin: iter(lambda: os._exit(3), None))
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        next(process)


def test_an_error_comes_with_its_traceback() -> None:
    def make(begin: Begin) -> Iterator[int]:
        yield 1
        begin(2)
        raise KeyError("lost")

    process = started(make)
    assert next(process) == 1
    with pytest.raises(RuntimeError, match=r"process 1 of 4 failed, busy with global worker 2:\n"):
        next(process)


def test_a_slow_process_is_a_warning_and_then_an_error(caplog: pytest.LogCaptureFixture) -> None:
    process = started(waits, Patience(warn_s=0.1, fail_s=0.4))
    next(process)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RuntimeError, match="has sent nothing for 0 s, busy with global worker 7"),
    ):
        next(process)
    (warning,) = caplog.messages
    assert f"reader process 1 of 4 (pid {process.pid}) has sent nothing for 0 s, busy" in warning


def test_a_process_ends_with_what_it_works_for() -> None:
    process = started(waits)
    next(process)
    pid = process.pid
    assert is_running(pid)
    del process
    until(lambda: not is_running(pid))


ORPHAN = """
import os, time
from megatron_mimo.data.reading.processes import ForkedIterator, Patience, fork_all
def make(begin):
    while True:
        yield bytes({size})
        time.sleep({pause})
process = ForkedIterator(make, name="", task_name=str, prefetch=2, patience=Patience(9, 9))
fork_all([process])
next(process)
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("size", "pause"), [(1, 600), (8 << 20, 0)])
def test_a_process_ends_when_its_parent_is_killed(size: int, pause: float) -> None:
    """Waiting, or with its pipe full."""
    program = ORPHAN.format(size=size, pause=pause)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    until(lambda: not is_running(pid))
    parent.stdout.close()
