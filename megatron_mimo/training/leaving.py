"""When a run leaves before its last iteration: a time limit, or a signal."""

import signal
import time
from enum import IntEnum
from types import FrameType

# What Slurm and torchrun send before they kill, and what `sbatch --signal` is usually told to.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Leave(IntEnum):
    """Why a rank wants to leave; of several reasons the largest counts."""

    NOT = 0
    TIME = 1
    SIGUSR1 = 2
    SIGTERM = 3


class LeaveRequest:
    """What this rank wants; the ranks agree on it at the start of each step.

    Args:
        minutes: From now on, after which it wants to leave; None: never.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._minutes = minutes
        self._deadline = None if minutes is None else time.monotonic() + minutes * 60
        self._signal = Leave.NOT

    def watch_signals(self) -> None:
        """Note the first SIGTERM or SIGUSR1; a second one ends the process as it otherwise would.

        Only in the main thread.
        """
        for number in SIGNALS:
            signal.signal(number, self._note)

    def wish(self) -> Leave:
        """Whether this rank wants to leave after the coming step, and why."""
        if self._signal is not Leave.NOT:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return Leave.TIME
        return Leave.NOT

    def explain(self, why: Leave) -> str:
        """What the log says, as Megatron does."""
        if why is Leave.TIME:
            return f"exiting program after {self._minutes:g} minutes"
        return f"exiting program after receiving {why.name}"

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = max(self._signal, Leave[signal.Signals(number).name])
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
