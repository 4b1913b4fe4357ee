"""Reasons to stop a run before its last iteration: a time limit, or a signal."""

import signal
import time
from enum import IntEnum
from types import FrameType

# Signals that Slurm and torchrun send before they kill, and that `sbatch --signal` often names.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Leave(IntEnum):
    """Reason for which a rank wants to stop; of several reasons the largest counts."""

    NOT = 0
    TIME = 1
    SIGUSR1 = 2
    SIGTERM = 3


class LeaveRequest:
    """Request of this rank to stop; the ranks agree on it at the start of each step.

    Args:
        minutes: Number of minutes from now after which to stop; None for no limit.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._minutes = minutes
        self._deadline = None if minutes is None else time.monotonic() + minutes * 60
        self._signal = Leave.NOT

    def watch_signals(self) -> None:
        """Record the first SIGTERM or SIGUSR1; a second one ends the process as usual.

        It has an effect only in the main thread.
        """
        for number in SIGNALS:
            signal.signal(number, self._note)

    def wish(self) -> Leave:
        """Reason for which this rank wants to stop after the next step, if any."""
        if self._signal is not Leave.NOT:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return Leave.TIME
        return Leave.NOT

    def explain(self, why: Leave) -> str:
        """Log line for a reason, as Megatron writes it."""
        if why is Leave.TIME:
            return f"exiting program after {self._minutes:g} minutes"
        return f"exiting program after receiving {why.name}"

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = max(self._signal, Leave[signal.Signals(number).name])
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
