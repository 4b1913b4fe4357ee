"""What a step tells of itself while it runs."""

from collections.abc import Sequence
from typing import Protocol

from megatron_mimo.bridge.microbatch import MicrobatchPlan
from megatron_mimo.data.loader.batch import StepData
from megatron_mimo.schedule.laps import Label


class StepWatch(Protocol):
    """Receives the progress of a step; it must not wait for the device."""

    def note(self, what: Label) -> None:
        """See `schedule.laps.Note`."""
        ...

    def planned(self, data: StepData, plans: Sequence[MicrobatchPlan]) -> None:
        """The step is about to run on this data."""
        ...


class Unwatched(StepWatch):
    """Records nothing."""

    def note(self, what: Label) -> None:
        """See `StepWatch.note`."""

    def planned(self, data: StepData, plans: Sequence[MicrobatchPlan]) -> None:
        """See `StepWatch.planned`."""


UNWATCHED = Unwatched()
