"""How far a run is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is.

    Attributes:
        iteration: Last finished one.
        consumed_samples: Samples trained on so far.
    """

    iteration: int
    consumed_samples: int
