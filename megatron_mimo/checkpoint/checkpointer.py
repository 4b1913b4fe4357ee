"""Saves a training run and brings it back."""

import logging
import pickle
import time
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.agreement import (
    broadcast,
    check_whole,
    compare,
    gather,
    listed,
    on_first_rank,
    together,
)
from megatron_mimo.checkpoint.config import LoadConfig, SaveConfig
from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.checkpoint.tensors import optimizer_tensors, reads, writes
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.optim.mimo_optimizer import MimoOptimizer
from megatron_mimo.runtime.rng import rng_state, set_rng_state
from megatron_mimo.runtime.sharded_files import Plans, Save, StoredTensor, read, stored_tensors
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


@dataclass(slots=True)
class _Pending:
    """A save in the background."""

    save: Save
    staged: Path
    progress: Progress
    start: float


class Checkpointer:
    """Writes checkpoints so that the last whole one can always be loaded. Collective throughout.

    Args:
        parts: What is saved.
        config: Where and how.
        flags: Of the run, for `args` in the checkpoint.

    Raises:
        ValueError: The folder cannot be written, or another run saves there.
    """

    def __init__(self, parts: TrainedParts, config: SaveConfig, flags: Mapping[str, Any]) -> None:
        self._parts = parts
        self._config = config
        self._flags = dict(flags)
        self._control = parts.topology.control
        self._pending: _Pending | None = None
        self._lock: folders.SaveLock | None = None
        self._saved: int | None = None
        self._plans = Plans()
        on_first_rank(self._control, self._take_lock)

    def is_due(self, iteration: int) -> bool:
        """Whether the interval ends with an iteration."""
        return self._config.interval is not None and iteration % self._config.interval == 0

    def save(self, progress: Progress, loader: Mapping[int, Any]) -> None:
        """Save after an iteration; in the background, `poll` finishes it.

        Args:
            progress: How far training is.
            loader: State of the reader of each lane that this rank answers for.

        Raises:
            RuntimeError: A rank's files could not be written; the checkpoint before is untouched.
        """
        if self._saved == progress.iteration:
            return
        self.finish()
        start, root = time.perf_counter(), self._config.root
        logger.info(
            "saving checkpoint at iteration %7d to %s in torch_dist format",
            progress.iteration,
            root,
        )
        token = broadcast(uuid.uuid4().hex[:8], self._control)
        staged = folders.staging_folder(root, progress.iteration, token)
        lanes = gather(loader, self._control)

        def prepare() -> None:
            folders.prune(root, None)
            staged.mkdir()
            _write_object(staged / folders.COMMON, self._common(progress))
            merged = {lane: state for part in lanes for lane, state in part.items()}
            _write_object(staged / folders.LOADER, {"lanes": merged, "num_lanes": len(merged)})

        on_first_rank(self._control, prepare, self._explain(progress))
        save = Save(self._what(), staged, folders.checksum, self._plans)
        self._pending = _Pending(save, staged, progress, start)
        if self._config.in_background:
            save.start()
        else:
            save.write()
            self.finish()

    def poll(self) -> None:
        """Publish a checkpoint whose files are all written. Collective; cheap without one."""
        if self._pending is not None and not any(
            gather(self._pending.save.is_writing, self._control)
        ):
            self.finish()

    def finish(self) -> None:
        """Wait for a save in the background, if there is one, and publish it.

        Raises:
            RuntimeError: A rank's files could not be written; the checkpoint before is untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        explain = self._explain(pending.progress)
        written = together(self._control, pending.save.finish, explain)
        root, iteration = self._config.root, pending.progress.iteration

        def publish() -> None:
            folders.seal(pending.staged, {name: c for part in written for name, c in part.items()})
            folders.publish(pending.staged, root, iteration)
            for removed in folders.prune(root, self._config.keep_last):
                logger.info("removed %s", removed)

        on_first_rank(self._control, publish, explain)
        self._saved = iteration
        logger.info(
            "successfully saved checkpoint from iteration %7d to %s [ %.1f s ]",
            iteration,
            root,
            time.perf_counter() - pending.start,
        )

    def close(self) -> None:
        """Let another run save there."""
        if self._lock is not None:
            self._lock.release()

    def _take_lock(self) -> None:
        self._lock = folders.SaveLock(self._config.root)
        folders.put_back(self._config.root)

    def _explain(self, progress: Progress) -> str:
        return (
            f"--save {self._config.root}: the checkpoint of iteration {progress.iteration} could "
            f"not be written; what was saved before is whole"
        )

    def _common(self, progress: Progress) -> dict[str, Any]:
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
        return common

    def _what(self) -> list[ShardedTensor | ShardedObject]:
        states = self._parts.optimizer.param_states()
        found: list[ShardedTensor | ShardedObject] = []
        for replica in self._parts.model.replicas:
            found += writes(replica, states)
            if self._config.optimizer:
                found += optimizer_tensors(replica, states, reading=False)
            if self._config.rng:
                found.append(_rng(replica.groups.spec, dist.get_rank(), rng_state()))
        return found


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
    common = _read_object(folder / folders.COMMON)
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
        _read_object(folder / folders.LOADER),
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


# -- small files -----------------------------------------------------------------------------------


def _write_object(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        torch.save(value, file)


def _read_object(path: Path) -> Any:
    try:
        # Its checksum was compared: it is what a run of ours has written.
        return torch.load(path, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
