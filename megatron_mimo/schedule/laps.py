"""What a rank did when: its actions and the other parts of a step, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from megatron_mimo.runtime.stopwatch import Stopwatch
from megatron_mimo.schedule.actions import Action


class Phase(StrEnum):
    """A part of a step that is no action of the schedule."""

    DATA = "data"
    AGREEMENT = "agreement"
    PREPARE = "prepare"
    DRAIN = "drain"
    GRADIENTS = "gradient finalisation"
    OPTIMIZER = "optimizer"
    LOSS = "loss"
    BETWEEN = "between steps"


Label = Action | Phase
# Told what a rank begins to do; it has then ended what it did before.
Note = Callable[[Label], None]


def ignore(_: Label) -> None:
    """A `Note` that records nothing."""


@dataclass(frozen=True, slots=True)
class Lap:
    """One thing that a rank did.

    Attributes:
        iteration: In which.
        what: It did.
        start: Seconds of the rank's clock.
        end: When the next thing began.
    """

    iteration: int
    what: Label
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


class Recorder:
    """Keeps what it is told until it is asked.

    Args:
        stopwatch: Of this rank.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._noted: list[tuple[int, Label]] = []
        self._iteration = 0

    def begin_step(self, iteration: int) -> None:
        """What follows is of this iteration."""
        self._iteration = iteration

    def note(self, what: Label) -> None:
        """See `Note`."""
        self._stopwatch.mark()
        self._noted.append((self._iteration, what))

    def take(self) -> list[Lap]:
        """Everything since the last call, what lies between steps left out. Waits for the device.

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
