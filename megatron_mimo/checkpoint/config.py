"""What a run saves and loads."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig:
    """Where and how checkpoints are written.

    Attributes:
        root: Folder of the checkpoints.
        interval: Iterations between them; None saves at the end only.
        optimizer: Save the optimizer's state.
        rng: Save the states of random generators.
        in_background: Train on while files are written.
        keep_last: How many checkpoints to keep; None keeps all.
    """

    root: Path
    interval: int | None = None
    optimizer: bool = True
    rng: bool = True
    in_background: bool = False
    keep_last: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderSaveConfig:
    """Where and when the positions of the readers are written by themselves.

    Attributes:
        root: Their folder.
        interval: Iterations between them; None saves at the end only.
        keep_last: How many to keep; None keeps all.
    """

    root: Path
    interval: int | None = None
    keep_last: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """What is loaded.

    Attributes:
        root: Folder of the checkpoints.
        finetune: Weights only; training begins at iteration 0.
        optimizer: Load the optimizer's state.
        scheduler: Go on with the schedule.
        rng: Load the states of random generators.
    """

    root: Path
    finetune: bool = False
    optimizer: bool = True
    scheduler: bool = True
    rng: bool = True
