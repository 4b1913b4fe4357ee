"""Where the readers of all lanes stand, in a folder of its own: beside checkpoints, or without.

    DIR/latest_checkpointed_iteration.txt     as of checkpoints
    DIR/iter_0000010/                         loader.pt, checksums.json

`loader.pt` is that of a checkpoint, so that a folder of checkpoints can be read here too.
"""

import logging
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.agreement import on_first_rank
from megatron_mimo.checkpoint.config import ReaderSaveConfig
from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.checkpoint.saving import Target, stored_value, write_positions

logger = logging.getLogger(__name__)
_SAVE, _LOAD = "--dataloader-save", "--dataloader-load"


class ReaderSaver:
    """Writes the positions of the readers where no checkpoints are. Collective throughout.

    A run with checkpoints gives their folder to its `Checkpointer`.

    Args:
        config: Where and when.
        control: The world, on the host; used by the training thread alone.

    Raises:
        ValueError: The folder cannot be written, or another run saves there.
    """

    def __init__(self, config: ReaderSaveConfig, control: dist.ProcessGroup) -> None:
        self._config = config
        self._control = control
        self._lock: folders.SaveLock | None = None
        on_first_rank(control, self._take_lock)

    def is_due(self, iteration: int) -> bool:
        """Whether the interval ends with an iteration."""
        return self._config.interval is not None and iteration % self._config.interval == 0

    def save(self, progress: Progress, loader: Mapping[int, Any]) -> None:
        """Save after an iteration.

        Args:
            progress: How far training is.
            loader: State of the reader of each lane that this rank answers for.

        Raises:
            RuntimeError: Rank 0 could not write; what was saved before is untouched.
        """
        start, config = time.perf_counter(), self._config
        target = Target(config.root, progress.iteration, config.keep_last)
        for folder in write_positions(pickle.dumps(loader), target, self._control):
            logger.info("removed %s", folder)
        logger.info(
            "saved the position of the data at iteration %7d to %s [ %.1f s ]",
            progress.iteration,
            config.root,
            time.perf_counter() - start,
        )

    def poll(self) -> None:
        """Nothing is written in the background."""

    def finish(self) -> None:
        """Nothing is written in the background."""

    def close(self) -> None:
        """Let another run save there."""
        if self._lock is not None:
            self._lock.release()

    def _take_lock(self) -> None:
        self._lock = folders.take(self._config.root, flag=_SAVE)


def load_readers(
    path: Path, iteration: int | None, control: dist.ProcessGroup
) -> Mapping[int, Any] | None:
    """Where the readers stood, of every lane. Collective over the world.

    Args:
        path: Folder of positions or of checkpoints, or that of one iteration.
        iteration: Of the checkpoint that the model goes on from; None if it begins anew.
        control: The world, on the host.

    Returns:
        Of the folder's iteration if it is that of one; else of `iteration` if it is there, else
        of the newest; None when nothing has been saved there yet.

    Raises:
        ValueError: It is damaged, or holds no positions; names the file.
    """
    folder: Path | None = on_first_rank(control, lambda: _find(path, iteration))
    if folder is None:
        return None
    logger.info("the data goes on where %s says", folder)
    lanes: Mapping[int, Any] = stored_value(folder / folders.LOADER)["lanes"]
    return lanes


def _find(path: Path, iteration: int | None) -> Path | None:
    """The folder to read, its file checked; on one rank."""
    if folders.is_iteration(path):
        if not path.is_dir():
            raise ValueError(f"{_LOAD} {path} is not there: expected a folder that {_SAVE} wrote")
        folder = path
    else:
        newest = folders.latest_iteration(path, flag=_SAVE)
        if newest is None:
            logger.warning(
                "WARNING: could not find the metadata file %s; %s changes nothing",
                path / folders.TRACKER,
                _LOAD,
            )
            return None
        folder = folders.iteration_folder(path, newest)
        if iteration is not None and iteration != newest:
            same = folders.iteration_folder(path, iteration)
            if same.is_dir():
                folder = same
            else:
                logger.warning(
                    "WARNING: the model goes on behind iteration %d, and the data behind iteration "
                    "%d, the newest of %s %s: what was read in between is left out or read again",
                    iteration,
                    newest,
                    _LOAD,
                    path,
                )
    expected = folders.read_checksums(folder)
    if folders.LOADER not in expected:
        raise ValueError(
            f"{_LOAD} {path}: {folder} has no {folders.LOADER}, so it says nothing of the data: "
            f"expected a folder that {_SAVE} or --save has written"
        )
    # The weights of a checkpoint are not read for this.
    wrong = folders.check_files(folder, [folders.LOADER], expected)
    if wrong:
        raise folders.damaged(folder, wrong)
    return folder
