"""Times of a rank's work, recorded without waiting for the device."""

import time
from typing import Protocol

import torch

from megatron_mimo.runtime.device import Device


class Stopwatch(Protocol):
    """Records times, and returns them later."""

    def mark(self) -> None:
        """Record the present moment of what the rank computes, without waiting."""
        ...

    def read(self) -> list[float]:
        """Times recorded since the last call, in order; seconds of `time.perf_counter`.

        Waits for the device.
        """
        ...


class HostStopwatch:
    """Stopwatch of a rank that computes on a host."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """See `Stopwatch.mark`."""
        self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """See `Stopwatch.read`."""
        marks, self._marks = self._marks, []
        return marks


class CudaStopwatch:
    """Stopwatch of a rank that computes on a GPU: an event in the current stream marks each time.

    An event is reached when all work that was started before it is done. So the time between two
    events is the time that the device computed, or waited for other ranks.
    """

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []
        self._free: list[torch.cuda.Event] = []
        self._anchor, self._anchored_at = self._set_anchor()

    def mark(self) -> None:
        """See `Stopwatch.mark`."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def read(self) -> list[float]:
        """See `Stopwatch.read`."""
        if not self._marks:
            return []
        self._marks[-1].synchronize()
        # Events count milliseconds.
        seconds = [
            self._anchored_at + self._anchor.elapsed_time(event) / 1000 for event in self._marks
        ]
        self._free += self._marks
        self._marks = []
        # A new anchor each time: the distance is a float32, and both clocks drift.
        self._anchor, self._anchored_at = self._set_anchor()
        return seconds

    @staticmethod
    def _set_anchor() -> tuple[torch.cuda.Event, float]:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event, time.perf_counter()


def build_stopwatch(device: Device) -> Stopwatch:
    """The stopwatch of a rank that computes on a device."""
    return HostStopwatch() if device.type == "cpu" else CudaStopwatch()
