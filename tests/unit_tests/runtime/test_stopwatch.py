"""Moments noted without waiting, on a host and with the events of a GPU."""

import time
from typing import ClassVar

import pytest

from megatron_mimo.runtime import Device
from megatron_mimo.runtime.stopwatch import CudaStopwatch, HostStopwatch, build_stopwatch


def test_a_host_reads_its_clock() -> None:
    stopwatch = build_stopwatch(Device("cpu"))
    assert isinstance(stopwatch, HostStopwatch)
    before = time.perf_counter()
    stopwatch.mark()
    time.sleep(0.01)
    stopwatch.mark()
    first, second = stopwatch.read()
    assert before <= first <= second - 0.01 <= time.perf_counter()
    assert stopwatch.read() == []


class Event:
    """Reached by a device that goes on by 2 ms with each event; knows who waited."""

    made: ClassVar[list["Event"]] = []
    clock: ClassVar[float] = 0.0
    waits: ClassVar[int] = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.made.append(self)

    def record(self) -> None:
        Event.clock += 2
        self.at = Event.clock

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_a_gpu_is_waited_for_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("time.perf_counter", lambda: Event.clock / 1000 + 100)
    stopwatch = CudaStopwatch()
    waits = Event.waits
    for interval in range(2):
        begin = Event.clock / 1000 + 100
        for _ in range(3):
            stopwatch.mark()
        assert Event.waits == waits
        times = stopwatch.read()
        assert times == pytest.approx([begin + 0.002, begin + 0.004, begin + 0.006]), interval
        assert Event.waits > waits
        waits = Event.waits
    # Events are used again: three for marks, and an anchor each time.
    assert len(Event.made) == 3 + 3
    assert stopwatch.read() == []
    assert Event.waits == waits
