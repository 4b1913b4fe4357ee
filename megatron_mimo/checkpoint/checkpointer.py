"""Saves a training run and brings it back."""

import logging
import pickle
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.agreement import check_whole, compare, listed, on_first_rank
from megatron_mimo.checkpoint.config import LoadConfig, ReaderSaveConfig, SaveConfig
from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.checkpoint.saving import (
    Contents,
    Target,
    stored_bytes,
    stored_value,
    write_checkpoint,
)
from megatron_mimo.checkpoint.tensors import optimizer_tensors, reads, writes
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.optim.mimo_optimizer import MimoOptimizer
from megatron_mimo.runtime.host_copy import HostCopy
from megatron_mimo.runtime.rng import rng_state, set_rng_state
from megatron_mimo.runtime.sharded_files import (
    ShardedWriter,
    Stored,
    StoredTensor,
    read,
    stored_tensors,
)
from megatron_mimo.topology.groups import Topology

logger = logging.getLogger(__name__)
VERSION = 3.0
"""`checkpoint_version` of Megatron."""


@dataclass(frozen=True, slots=True)
class TrainedParts:
    """What of this rank a checkpoint holds.

    Attributes:
        topology: Grids and groups.
        model: The modules.
        optimizer: Over them.
        scheduler: Learning rate.
    """

    topology: Topology
    model: MimoModel
    optimizer: MimoOptimizer
    scheduler: OptimizerParamScheduler


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint says of its run.

    Attributes:
        progress: Where to go on; zeros with `finetune`.
        loader: State of the readers, of every lane; None when there is none to go on from.
    """

    progress: Progress
    loader: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Running:
    """A save in the background.

    Attributes:
        iteration: That it was taken after.
        start: Seconds, of `time.perf_counter`.
        removed: Older checkpoints that it removed; here when it is published, or has failed.
    """

    iteration: int
    start: float
    removed: Future[list[Path]]


class Checkpointer:
    """Writes checkpoints so that the last whole one can always be loaded. Collective throughout.

    In the background a save is a thread, over a group of its own. Training stands still while it
    copies what is saved; ranks do not wait for each other.

    Args:
        parts: What is saved.
        config: Where and how.
        flags: Of the run, for `args` in the checkpoint.
        readers: Where the positions of the readers go as well, each time; None for nowhere else.

    Raises:
        ValueError: A folder cannot be written, or another run saves there.
    """

    def __init__(
        self,
        parts: TrainedParts,
        config: SaveConfig,
        flags: Mapping[str, Any],
        readers: ReaderSaveConfig | None = None,
    ) -> None:
        self._parts = parts
        self._config = config
        self._readers = readers
        self._flags = dict(flags)
        self._group = dist.new_group(backend="gloo", group_desc="checkpoints")
        self._writer = ShardedWriter(dist.get_rank())
        self._copy = HostCopy()
        self._running: _Running | None = None
        self._locks: list[folders.SaveLock] = []
        self._last: int | None = None
        on_first_rank(parts.topology.control, self._take_lock)
        if config.in_background:
            # Memory that is new, or not there, should not hold up the first save.
            self._copied(self._what())

    def is_due(self, iteration: int) -> bool:
        """Whether the interval ends with an iteration."""
        return self._config.interval is not None and iteration % self._config.interval == 0

    def save(self, progress: Progress, loader: Mapping[int, Any]) -> None:
        """Save after an iteration; in the background, `poll` or `finish` announces it.

        A save in the background that still runs is waited for.

        Args:
            progress: How far training is.
            loader: State of the reader of each lane that this rank answers for.

        Raises:
            RuntimeError: A rank's files could not be written, now or in the background before;
                the checkpoint before is untouched.
        """
        if self._last == progress.iteration:
            return
        self.finish()
        start, root = time.perf_counter(), self._config.root
        logger.info(
            "saving checkpoint at iteration %7d to %s in torch_dist format",
            progress.iteration,
            root,
        )
        parts = self._what()
        contents = Contents(
            parts=self._copied(parts) if self._config.in_background else parts,
            common=self._common(progress) if dist.get_rank() == 0 else b"",
            lanes=pickle.dumps(loader),
        )
        target = Target(
            root,
            progress.iteration,
            self._config.keep_last,
            None if self._readers is None else self._readers.root,
        )
        saving = partial(write_checkpoint, contents, target, self._writer, self._group)
        self._running = _Running(progress.iteration, start, Future())
        self._last = progress.iteration
        if self._config.in_background:
            run = partial(_settle, self._running.removed, saving)
            # A daemon: a rank that ends with an error does not wait for others to end theirs.
            threading.Thread(target=run, name="checkpoint", daemon=True).start()
        else:
            _settle(self._running.removed, saving)
            self.finish()

    @property
    def is_saving(self) -> bool:
        """Whether a save in the background has not been announced yet."""
        return self._running is not None

    def poll(self) -> None:
        """Announce a save in the background that has been published.

        Ranks hear of it each in its own time: nothing here waits.

        Raises:
            RuntimeError: As `finish`.
        """
        if self._running is not None and self._running.removed.done():
            self.finish()

    def finish(self) -> None:
        """Wait for a save in the background, if there is one, and announce it.

        Raises:
            RuntimeError: A rank's files could not be written; the checkpoint before is untouched.
        """
        running, self._running = self._running, None
        if running is None:
            return
        try:
            removed = running.removed.result()
        except BaseException:
            self._last = None
            raise
        for folder in removed:
            logger.info("removed %s", folder)
        logger.info(
            "successfully saved checkpoint from iteration %7d to %s [ %.1f s ]",
            running.iteration,
            self._config.root,
            time.perf_counter() - running.start,
        )
        if self._readers is not None:
            logger.info(
                "saved the position of the data at iteration %7d to %s",
                running.iteration,
                self._readers.root,
            )

    def close(self) -> None:
        """Let another run save there."""
        for lock in self._locks:
            lock.release()

    def _take_lock(self) -> None:
        self._locks.append(folders.take(self._config.root))
        if self._readers is not None:
            self._locks.append(folders.take(self._readers.root, flag="--dataloader-save"))

    def _copied(self, parts: Sequence[Stored]) -> list[Stored]:
        """Parts whose tensors training does not change; objects are made for each save."""
        tensors = [part for part in parts if isinstance(part, ShardedTensor)]
        copies = iter(self._copy.take([part.data for part in tensors]))
        return [
            replace(part, data=next(copies)) if isinstance(part, ShardedTensor) else part
            for part in parts
        ]

    def _common(self, progress: Progress) -> bytes:
        common: dict[str, Any] = {
            "args": Namespace(
                **self._flags,
                iteration=progress.iteration,
                consumed_train_samples=progress.consumed_samples,
            ),
            "checkpoint_version": VERSION,
            "iteration": progress.iteration,
            "consumed_train_samples": progress.consumed_samples,
            "opt_param_scheduler": self._parts.scheduler.state_dict(),
            "grids": {grid.name: asdict(grid) for grid in self._parts.topology.layout.grids},
        }
        if self._config.optimizer:
            common["optimizer"] = {
                "step": self._parts.optimizer.num_updates,
                "grad_scaler": self._parts.optimizer.scaler_state,
            }
        return stored_bytes(common)

    def _what(self) -> list[Stored]:
        states = self._parts.optimizer.param_states()
        found: list[Stored] = []
        for replica in self._parts.model.replicas:
            found += writes(replica, states)
            if self._config.optimizer:
                found += optimizer_tensors(replica, states, reading=False)
            if self._config.rng:
                found.append(_rng(replica.groups.spec, dist.get_rank(), rng_state()))
        return found


def _settle(outcome: Future[list[Path]], saving: Callable[[], list[Path]]) -> None:
    """Do it; what comes of it is the outcome."""
    try:
        outcome.set_result(saving())
    except BaseException as error:
        outcome.set_exception(error)


def load(parts: TrainedParts, config: LoadConfig) -> Loaded | None:
    """Bring a run back from the newest checkpoint of a folder. Collective over the world.

    Every file is checked, and every name and shape, before a weight changes.

    Returns:
        None when nothing has been saved there yet.

    Raises:
        ValueError: The checkpoint is damaged (names the files) or does not hold what this model
            asks for (lists it).
    """
    control, root, rank = parts.topology.control, config.root, dist.get_rank()
    iteration = on_first_rank(control, lambda: folders.latest_iteration(root))
    if iteration is None:
        logger.warning(
            "WARNING: could not find the metadata file %s; will not load any checkpoints and will "
            "start from random",
            root / folders.TRACKER,
        )
        return None
    start, folder = time.perf_counter(), folders.iteration_folder(root, iteration)
    logger.info("loading distributed checkpoint from %s at iteration %d", root, iteration)
    check_whole(folder, control)
    common = stored_value(folder / folders.COMMON)
    tensors, objects = stored_tensors(folder)
    with_optimizer = config.optimizer and not config.finetune
    states = parts.optimizer.param_states()
    wanted: list[ShardedTensor] = []
    for replica in parts.model.replicas:
        wanted += reads(replica)
        if with_optimizer:
            wanted += optimizer_tensors(replica, states, reading=True)
    _require(wanted, tensors, folder, control, with_optimizer=with_optimizer)
    generators = []
    if config.rng and not config.finetune:
        generators = [
            asked
            for replica in parts.model.replicas
            if (asked := _rng(replica.groups.spec, rank, None)).unique_key in objects
        ]
        if len(generators) < len(parts.model.replicas):
            logger.warning(
                "the checkpoint has no random state for this layout: streams start from --seed"
            )
    found = read([*wanted, *generators], folder)
    for state in found[len(wanted) :]:
        set_rng_state(state)
    if config.finetune:
        parts.optimizer.refresh_main_params()
        logger.info("loaded the weights of iteration %d for finetuning", iteration)
        return Loaded(Progress(0, 0), None)
    if with_optimizer:
        parts.optimizer.num_updates = common["optimizer"]["step"]
        parts.optimizer.scaler_state = common["optimizer"]["grad_scaler"]
    else:
        parts.optimizer.refresh_main_params()
    if config.scheduler:
        parts.scheduler.num_steps = common["opt_param_scheduler"]["num_steps"]
        parts.scheduler.step(0)
    dist.barrier(group=control)
    logger.info(
        "successfully loaded checkpoint from %s at iteration %d [ %.1f s ]",
        root,
        iteration,
        time.perf_counter() - start,
    )
    return Loaded(
        Progress(iteration, common["consumed_train_samples"]),
        stored_value(folder / folders.LOADER),
    )


def _require(
    wanted: Sequence[ShardedTensor],
    stored: Mapping[str, StoredTensor],
    folder: Path,
    control: dist.ProcessGroup,
    *,
    with_optimizer: bool,
) -> None:
    """Refuse a checkpoint that lacks something; tell what nobody asked for.

    Raises:
        ValueError: Lists what is missing or has another shape.
    """
    faults, known = compare(wanted, stored, control)
    if faults:
        raise ValueError(
            f"{folder} does not hold what this model asks for: {listed(faults, '; ')}. Check "
            f"--model-provider and what is frozen; --finetune or --no-load-optim load the weights "
            f"alone"
        )
    unexpected = sorted(
        key
        for key in set(stored) - known
        if with_optimizer or not key.startswith("optimizer.state.")
    )
    if unexpected:
        logger.warning(
            "%d tensors of the checkpoint are not of this model: %s",
            len(unexpected),
            listed(unexpected, ", "),
        )


def _rng(spec: Any, rank: int, state: Any) -> ShardedObject:
    """A rank's random state, by its place on a module's grid."""
    place = rank - spec.offset
    return ShardedObject(f"rng_state.{spec.name}", state, (spec.size,), (place,), replica_id=0)
