"""Positions of the readers of all lanes, in a folder of their own.

    DIR/latest_checkpointed_iteration.txt     as of checkpoints
    DIR/iter_0000010/                         loader.json, checksums.json

`loader.json` is that of a checkpoint, so that a folder of checkpoints can be read here too.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.collectives import on_first_rank
from megatron_mimo.checkpoint.config import ReaderConfig
from megatron_mimo.checkpoint.loader_file import file_in, lanes_text, read_lanes
from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.checkpoint.saving import Target, write_positions
from megatron_mimo.checkpoint.start import position_of

logger = logging.getLogger(__name__)
_SAVE, _LOAD = "--dataloader-save", "--dataloader-load"


class ReaderSaver:
    """Writes the positions of the readers in a run without checkpoints. Collective.

    A run with checkpoints passes the folder to its `Checkpointer` instead.

    Args:
        config: Folder, interval and number of positions to keep.
        control: Group of all ranks on the hosts, used by the training thread only.

    Raises:
        ValueError: The folder cannot be written to, or another run saves in it.
    """

    def __init__(self, config: ReaderConfig, control: dist.ProcessGroup) -> None:
        self._config = config
        self._control = control
        self._lock: folders.SaveLock | None = None
        on_first_rank(control, self._take_lock)

    def is_due(self, iteration: int) -> bool:
        """Whether a save interval ends with this iteration."""
        return self._config.interval is not None and iteration % self._config.interval == 0

    def save(self, progress: Progress, loader: Mapping[int, Any]) -> None:
        """Save after an iteration.

        Args:
            progress: Progress of training.
            loader: State of the reader of each lane that this rank reports on.

        Raises:
            RuntimeError: Rank 0 could not write; earlier positions are unchanged.
        """
        start, config = time.perf_counter(), self._config
        target = Target(config.folder, progress.iteration, config.keep_last)
        for folder in write_positions(lanes_text(loader), target, self._control):
            logger.info("removed %s", folder)
        logger.info(
            "saved the position of the data at iteration %7d to %s [ %.1f s ]",
            progress.iteration,
            config.folder,
            time.perf_counter() - start,
        )

    def poll(self) -> None:
        """Do nothing: no positions are written in the background."""

    def finish(self) -> None:
        """Do nothing: no positions are written in the background."""

    def close(self) -> None:
        """Release the folder, so that another run may save in it."""
        if self._lock is not None:
            self._lock.release()

    def _take_lock(self) -> None:
        self._lock = folders.take(self._config.folder, flag=_SAVE)


def load_readers(
    path: Path,
    iteration: int | None,
    control: dist.ProcessGroup,
    *,
    own: bool = False,
    trust: bool = False,
) -> Mapping[int, Any] | None:
    """Load the positions of the readers of every lane. Collective over the world.

    Args:
        path: Path to a folder of positions or of checkpoints, or to that of one iteration.
        iteration: Iteration of the checkpoint that the model continues from; None for a new model.
        control: Group of all ranks on the hosts.
        own: Whether this run writes its positions there too, so that there may be none yet.
        trust: Whether a file of an earlier version may run code.

    Returns:
        Positions by lane. They are those of the path's iteration if it is the folder of one; else
        those of `iteration` if they exist, else the newest; None when the folder has none yet.

    Raises:
        ValueError: The file is damaged, or holds no positions; the message names it.
    """
    folder: Path | None = on_first_rank(control, lambda: _find(path, iteration, own=own))
    if folder is None:
        logger.info("%s %s has no position of the data yet", _LOAD, path)
        return None
    logger.info("the data goes on where %s says", folder)
    return read_lanes(folder, trust=trust)


def _find(path: Path, iteration: int | None, *, own: bool) -> Path | None:
    """Folder to read, with its file checked; called on one rank."""
    folder = position_of(path, own=own)
    if folder is None:
        return None
    if folder != path and iteration is not None:
        same = folders.iteration_folder(path, iteration)
        if same.is_dir():
            folder = same
        elif same != folder:
            logger.warning(
                "WARNING: the model goes on after iteration %d, and the data after iteration "
                "%s, the newest of %s %s: what was read in between is left out or read again",
                iteration,
                folder.name.removeprefix("iter_").lstrip("0") or "0",
                _LOAD,
                path,
            )
    expected = folders.read_checksums(folder)
    name = file_in(expected)
    if name is None:
        raise ValueError(
            f"{_LOAD} {path}: {folder} has no {folders.LOADER}, so it says nothing of the data: "
            f"expected a folder that {_SAVE} or --save has written"
        )
    # The weights of a checkpoint are not read for this.
    wrong = folders.check_files(folder, [name], expected)
    if wrong:
        raise folders.damaged(folder, wrong)
    return folder
