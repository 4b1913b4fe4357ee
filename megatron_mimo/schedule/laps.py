"""Times of a rank's actions and of the other parts of a step, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from megatron_mimo.runtime.stopwatch import Stopwatch
from megatron_mimo.schedule.actions import Action


class Phase(StrEnum):
    """A part of a step that is not an action of the schedule."""

    DATA = "data"
    AGREEMENT = "agreement"
    PREPARE = "prepare"
    DRAIN = "drain"
    GRADIENTS = "gradient finalisation"
    OPTIMIZER = "optimizer"
    LOSS = "loss"
    BETWEEN = "between steps"


Label = Action | Phase
# Function that is called with what a rank begins, which also ends what it did before.
Note = Callable[[Label], None]


def ignore(_: Label) -> None:
    """A `Note` that records nothing."""


@dataclass(frozen=True, slots=True)
class Lap:
    """One action, or other part of a step, of a rank.

    Attributes:
        iteration: Number of the iteration.
        what: Action or part of a step.
        start: Time at which it began, in seconds of the rank's clock.
        end: Time at which the next one began, in seconds of the same clock.
    """

    iteration: int
    what: Label
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Duration, seconds."""
        return self.end - self.start


class Recorder:
    """Collects the laps of this rank.

    Args:
        stopwatch: Clock of this rank.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._noted: list[tuple[int, Label]] = []
        self._iteration = 0

    def begin_step(self, iteration: int) -> None:
        """Begin an iteration; the laps that follow belong to it."""
        self._iteration = iteration

    def note(self, what: Label) -> None:
        """See `Note`."""
        self._stopwatch.mark()
        self._noted.append((self._iteration, what))

    def take(self) -> list[Lap]:
        """Return the laps since the last call, without time between steps; waits for the device.

        Call it between steps.
        """
        assert not self._noted or self._noted[-1][1] is Phase.BETWEEN, self._noted[-1]
        times = self._stopwatch.read()
        noted, self._noted = self._noted, []
        return [
            Lap(iteration, what, start, end)
            for (iteration, what), start, end in zip(noted, times, times[1:], strict=False)
            if what is not Phase.BETWEEN
        ]
