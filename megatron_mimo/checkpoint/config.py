"""Flags of saving, and of the state with which a run begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction

from megatron_mimo.settings import Derived, Folder, Number, OnlyWith, Switch, Within, named
from megatron_mimo.settings.ranges import MOST_ITERATIONS

_SAVE = OnlyWith("--save")
_SAVE_ANYTHING = OnlyWith("--save", "--dataloader-save")
_LOAD = OnlyWith("--load")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig:
    """Where and how checkpoints are written.

    Attributes:
        root: Folder of the checkpoints to write; one is written at the end in any case. Without
            --tensorboard-dir, metrics.jsonl is written there too.
        interval: Number of iterations between checkpoints, or between the positions of
            --dataloader-save; left out: only at the end.
        without_optimizer: Whether checkpoints leave the optimizer's state out.
        without_rng: Whether checkpoints leave the states of random generators out.
        in_background: Whether training continues while a checkpoint is written.
        keep_last: Number of checkpoints to keep, the newest ones, and the same number of positions
            of --dataloader-save; left out: all.
    """

    root: Annotated[Folder, named("--save")] = None
    interval: Annotated[
        Number, named("--save-interval"), Within(1, MOST_ITERATIONS), _SAVE_ANYTHING
    ] = None
    without_optimizer: Annotated[Switch, named("--no-save-optim"), _SAVE] = False
    without_rng: Annotated[Switch, named("--no-save-rng"), _SAVE] = False
    in_background: Annotated[Switch, named("--async-save"), _SAVE] = False
    keep_last: Annotated[Number, Within(1, MOST_ITERATIONS), _SAVE_ANYTHING] = None

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints, in a run that saves."""
        return _folder(self.root)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """Checkpoint that a run continues from.

    Attributes:
        root: Folder of checkpoints; the run continues from the newest, or starts from the beginning
            where there is none.
        finetune: Whether to load only the weights and begin at iteration 0.
        without_optimizer: Whether to begin with a fresh optimizer.
        without_scheduler: Whether to start the schedule from its beginning.
        without_rng: Whether to seed the random generators again.
    """

    root: Annotated[Folder, named("--load")] = None
    finetune: Annotated[Switch, _LOAD] = False
    without_optimizer: Annotated[Switch, named("--no-load-optim"), _LOAD] = False
    without_scheduler: Annotated[Switch, named("--no-load-scheduler"), _LOAD] = False
    without_rng: Annotated[Switch, named("--no-load-rng"), _LOAD] = False

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints, in a run that loads."""
        return _folder(self.root)


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstWeightsConfig:
    """Sources of initial weights where --load finds no checkpoint; at most one is given.

    Attributes:
        load_hf: Folder of a nemotron_h_omni model to begin with; a checkpoint of --load replaces
            it.
        without: Part of the folder of --load-hf that is neither built nor trained; an export
            carries it over unchanged.
        load_nemotron_checkpoint: Megatron checkpoint of a Nemotron vision-language model whose
            weights to begin with, its root or one iteration's folder; a checkpoint of --load
            replaces it.
        load_vision_from: Megatron checkpoint whose vision encoder to begin with, its root or one
            iteration's folder; a checkpoint of --load replaces it.
        load_base: Checkpoint of a run without adapters, its root or one iteration's folder, whose
            weights --lora-rank adapts; they replace those of --load-hf.
    """

    load_hf: Folder = None
    without: Annotated[
        UseAppendAction[tuple[Literal["audio", "video"], ...]],
        named("--load-hf-without"),
        OnlyWith("--load-hf"),
    ] = ()
    load_nemotron_checkpoint: Folder = None
    load_vision_from: Folder = None
    load_base: Annotated[Folder, OnlyWith("--lora-rank")] = None

    def __post_init__(self) -> None:
        given = [
            f"{flag} {path}"
            for flag, path in (
                ("--load-hf", self.load_hf),
                ("--load-nemotron-checkpoint", self.load_nemotron_checkpoint),
                ("--load-vision-from", self.load_vision_from),
            )
            if path is not None
        ]
        if self.load_base is not None and self.load_hf is None:
            given.append(f"--load-base {self.load_base}")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: expected at most one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderConfig:
    """Separate folders that positions of the readers are written to and read from.

    Attributes:
        save: Folder to write the positions in the data to as well, with each checkpoint; without
            --save, every --save-interval iterations and at the end.
        load: Folder that --dataloader-save, or --save, has written: the data continues from its
            position, whatever --load says. It is the newest position, or that of the iteration
            that --load continues from if there is one; DIR/iter_0000100 chooses one.
        interval: Number of iterations between positions; None: only at the end. It is that of
            --save-interval.
        keep_last: Number of positions to keep, the newest; None: all. It is that of --keep-last.
    """

    save: Annotated[Folder, named("--dataloader-save")] = None
    load: Annotated[Folder, named("--dataloader-load")] = None
    interval: Derived[int | None] = None
    keep_last: Derived[int | None] = None

    @property
    def folder(self) -> Path:
        """Folder of the positions, in a run that writes them."""
        return _folder(self.save)


def _folder(text: str | None) -> Path:
    assert text is not None
    return Path(text)
