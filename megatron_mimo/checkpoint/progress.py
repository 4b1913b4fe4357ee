"""Progress of a run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of training.

    Attributes:
        iteration: Last iteration that has finished.
        consumed_samples: Number of samples trained on so far.
    """

    iteration: int
    consumed_samples: int
