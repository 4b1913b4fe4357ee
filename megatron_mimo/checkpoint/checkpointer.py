"""Saving and loading of a training run."""

import logging
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

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.base import describe_adapters, require_same
from megatron_mimo.checkpoint.collectives import check_whole, compare, listed, on_first_rank
from megatron_mimo.checkpoint.config import LoadConfig, ReaderConfig, SaveConfig
from megatron_mimo.checkpoint.loader_file import lanes_text, read_lanes
from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.checkpoint.saved_run import read_common
from megatron_mimo.checkpoint.saving import (
    Contents,
    Target,
    stored_bytes,
    write_checkpoint,
)
from megatron_mimo.checkpoint.sharded_files import ShardedWriter, Stored, read
from megatron_mimo.checkpoint.start import start_of
from megatron_mimo.checkpoint.tensors import optimizer_tensors, reads, writes
from megatron_mimo.optim.train_state import TrainState
from megatron_mimo.runtime.host_copy import HostCopy
from megatron_mimo.runtime.rng import rng_state, set_rng_state
from megatron_mimo.topology import ModuleGridSpec
from megatron_mimo.weights.torch_dist import StoredTensor, describe

logger = logging.getLogger(__name__)
VERSION = 3.0
"""`checkpoint_version` of Megatron."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """State of the run in a checkpoint.

    Attributes:
        progress: Iteration and samples from which the run continues; zeros with `finetune`.
        loader: States of the readers of all `lanes`; None when they are not used.
    """

    progress: Progress
    loader: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Running:
    """A save that is running in the background.

    Attributes:
        iteration: Iteration after which the save began.
        start: Start in seconds of `time.perf_counter`.
        removed: Older checkpoints that the save has removed; available when it is published or has
            failed.
    """

    iteration: int
    start: float
    removed: Future[list[Path]]


class Checkpointer:
    """Writes checkpoints such that the last complete one can always be loaded.

    All methods are collective.

    A save in the background is a thread, with a process group of its own. Training waits only while
    the state is copied; ranks do not wait for each other.

    Args:
        state: State of this rank to save.
        config: Folder, interval and contents of the checkpoints.
        flags: Flags of the run, stored as `args` in the checkpoint.
        readers: Settings of a folder that the positions of the readers are written to as well; None
            for no such folder.

    Raises:
        ValueError: A folder cannot be written to, or another run saves in it.
    """

    def __init__(
        self,
        state: TrainState,
        config: SaveConfig,
        flags: Mapping[str, Any],
        readers: ReaderConfig | None = None,
    ) -> None:
        self._state = state
        self._config = config
        self._readers = readers
        self._flags = dict(flags)
        self._lora: dict[str, Any] | None = None
        self._group = dist.new_group(backend="gloo", group_desc="checkpoints")
        self._writer = ShardedWriter(dist.get_rank())
        self._copy = HostCopy()
        self._running: _Running | None = None
        self._locks: list[folders.SaveLock] = []
        self._last: int | None = None
        on_first_rank(state.topology.control, self._take_lock)
        if config.in_background:
            # Memory that is new, or not there, should not hold up the first save.
            self._copied(self._what())

    def is_due(self, iteration: int) -> bool:
        """Whether a save interval ends with this iteration."""
        return self._config.interval is not None and iteration % self._config.interval == 0

    def save(self, progress: Progress, loader: Mapping[int, Any]) -> None:
        """Save after an iteration; in the background, `poll` or `finish` announces it.

        A previous save that is still running in the background is waited for.

        Args:
            progress: Progress of training.
            loader: State of the reader of each lane that this rank reports on.

        Raises:
            RuntimeError: The files of a rank could not be written, now or by the previous save in
                the background; the previous checkpoint is unchanged.
        """
        if self._last == progress.iteration:
            return
        self.finish()
        start, root = time.perf_counter(), self._config.folder
        logger.info(
            "saving checkpoint at iteration %7d to %s in torch_dist format",
            progress.iteration,
            root,
        )
        if self._lora is None:
            # Once: the weights beside adapters do not change.
            self._lora = _adapters(self._state)
        parts = self._what()
        contents = Contents(
            parts=self._copied(parts) if self._config.in_background else parts,
            common=self._common(progress) if dist.get_rank() == 0 else b"",
            lanes=lanes_text(loader),
        )
        target = Target(
            root,
            progress.iteration,
            self._config.keep_last,
            None if self._readers is None else self._readers.folder,
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

        Ranks may announce it at different times, as this function does not wait.

        Raises:
            RuntimeError: The files of a rank could not be written; the previous checkpoint is
                unchanged.
        """
        if self._running is not None and self._running.removed.done():
            self.finish()

    def finish(self) -> None:
        """Wait for a save in the background, if there is one, and announce it.

        Raises:
            RuntimeError: The files of a rank could not be written; the previous checkpoint is
                unchanged.
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
            self._config.folder,
            time.perf_counter() - running.start,
        )
        if self._readers is not None:
            logger.info(
                "saved the position of the data at iteration %7d to %s",
                running.iteration,
                self._readers.folder,
            )

    def close(self) -> None:
        """Release the folder, so that another run may save in it."""
        for lock in self._locks:
            lock.release()

    def _take_lock(self) -> None:
        self._locks.append(folders.take(self._config.folder))
        if self._readers is not None:
            self._locks.append(folders.take(self._readers.folder, flag="--dataloader-save"))

    def _copied(self, parts: Sequence[Stored]) -> list[Stored]:
        """Parts with copies of the tensors, so that training may change the originals."""
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
            "opt_param_scheduler": self._state.scheduler.state_dict(),
            "grids": {
                name: _sizes(grid) for name, grid in self._state.topology.layout.modules.items()
            },
        }
        if self._lora is not None:
            common["lora"] = self._lora
        if not self._config.without_optimizer:
            common["optimizer"] = {
                "step": self._state.optimizer.num_updates,
                "grad_scaler": self._state.optimizer.scaler_state,
            }
        return stored_bytes(common)

    def _what(self) -> list[Stored]:
        states = self._state.optimizer.param_states()
        found: list[Stored] = []
        for replica in self._state.model.replicas:
            found += writes(replica, states)
            if not self._config.without_optimizer:
                found += optimizer_tensors(replica, states, reading=False)
            if not self._config.without_rng:
                found.append(_rng(replica.groups.spec, dist.get_rank(), rng_state()))
        return found


def _settle(outcome: Future[list[Path]], saving: Callable[[], list[Path]]) -> None:
    """Run a save, and set its result or its error as the outcome."""
    try:
        outcome.set_result(saving())
    except BaseException as error:
        outcome.set_exception(error)


def load(state: TrainState, config: LoadConfig, *, trust: bool = False) -> Loaded | None:
    """Load a run from the newest checkpoint of a folder. Collective over the world.

    Every file, name and shape is checked before a weight changes.

    Args:
        state: State of this rank, freshly built.
        config: Folder, and parts to load.
        trust: Whether files may run code.

    Returns:
        State of the run; None when the folder has no checkpoint yet.

    Raises:
        ValueError: There is no checkpoint where one was named, it is damaged (the message names the
            files) or does not hold what this model requests (the message lists it).
    """
    control, root, rank = state.topology.control, config.folder, dist.get_rank()
    folder: Path | None = on_first_rank(control, lambda: start_of(config))
    if folder is None:
        logger.info("%s has no checkpoint yet: the run starts from the beginning", root)
        return None
    start = time.perf_counter()
    check_whole(folder, control)
    common = read_common(folder, trust=trust)
    require_same(common.get("lora"), _adapters(state), folder)
    progress = _progress(common, folder)
    logger.info(
        "loading distributed checkpoint from %s at iteration %d", folder.parent, progress.iteration
    )
    stored = describe(folder, trust=trust)
    tensors, objects = stored.tensors, stored.objects
    with_optimizer = not (config.without_optimizer or config.finetune)
    states = state.optimizer.param_states()
    wanted: list[ShardedTensor] = []
    for replica in state.model.replicas:
        wanted += reads(replica)
        if with_optimizer:
            wanted += optimizer_tensors(replica, states, reading=True)
    _require(wanted, tensors, folder, control, with_optimizer=with_optimizer)
    generators = []
    if not (config.without_rng or config.finetune):
        generators = [
            asked
            for replica in state.model.replicas
            if (asked := _rng(replica.groups.spec, rank, None)).unique_key in objects
        ]
        if len(generators) < len(state.model.replicas):
            logger.warning(
                "the checkpoint has no random state for this layout: streams start from --seed"
            )
    found = read([*wanted, *generators], stored, trust=trust)
    for generator in found[len(wanted) :]:
        set_rng_state(generator)
    if config.finetune:
        state.optimizer.refresh_main_params()
        logger.info("loaded the weights of iteration %d for finetuning", progress.iteration)
        return Loaded(Progress(0, 0), None)
    if with_optimizer:
        state.optimizer.num_updates = common["optimizer"]["step"]
        state.optimizer.scaler_state = common["optimizer"]["grad_scaler"]
    else:
        state.optimizer.refresh_main_params()
    if not config.without_scheduler:
        state.scheduler.num_steps = common["opt_param_scheduler"]["num_steps"]
        state.scheduler.step(0)
    dist.barrier(group=control)
    logger.info(
        "successfully loaded checkpoint from %s at iteration %d [ %.1f s ]",
        root,
        progress.iteration,
        time.perf_counter() - start,
    )
    return Loaded(progress, {"lanes": read_lanes(folder, trust=trust)})


def _adapters(state: TrainState) -> dict[str, Any] | None:
    """What a checkpoint says of the adapters of a run; None where it has none. Collective."""
    if state.model.lora is None:
        return None
    return describe_adapters(state.model.lora, state.model.replicas, state.topology.control)


def _progress(common: Mapping[str, Any], folder: Path) -> Progress:
    """Progress that a checkpoint holds.

    Raises:
        ValueError: It holds none.
    """
    match common:
        case {"iteration": int() as iteration, "consumed_train_samples": int() as samples}:
            return Progress(iteration, samples)
    raise ValueError(
        f"{folder / folders.COMMON} does not say after which iteration and sample it was saved: "
        f"expected a checkpoint of this program; --load-nemotron-checkpoint begins with weights of "
        f"others"
    )


def _require(
    wanted: Sequence[ShardedTensor],
    stored: Mapping[str, StoredTensor],
    folder: Path,
    control: dist.ProcessGroup,
    *,
    with_optimizer: bool,
) -> None:
    """Refuse a checkpoint that lacks tensors; log those that are not requested.

    Raises:
        ValueError: Tensors are missing or have another shape; the message lists them.
    """
    faults, known = compare(wanted, stored, control)
    if faults:
        raise ValueError(
            f"{folder} does not hold what this model asks for: {listed(faults, '; ')}. Check "
            f"--model-provider, --separate-video and what is frozen; --finetune or --no-load-optim "
            f"load the weights alone"
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
    """Random state of a rank, keyed by its coordinates on a module's grid."""
    place = rank - spec.offset
    return ShardedObject(f"rng_state.{spec.name}", state, (spec.size,), (place,), replica_id=0)


def _sizes(grid: ModuleGridSpec) -> dict[str, Any]:
    """Name, offset and sizes of a grid."""
    fields = asdict(grid)
    del fields["flag_form"]
    return fields
