"""Datasets on disk, read with megatron-energon by *virtual workers*.

What energon calls a worker is a share of the dataset and an order of it, and both follow from the
worker's number alone, its *global worker id*: lane times workers per lane, plus worker. Here a
worker is an object, which any process may hold, alone or beside others.

Nothing that works on a sample may use the global random generators, or ask energon to seed them
(`stateless(restore_seeds=True)`): workers that share a process share those.
"""

import contextlib
import io
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron.energon import WorkerConfig
from megatron.energon.errors import reraise_exception
from megatron.energon.metadataset import load_dataset

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.dataset_errors import (
    OPEN_ERRORS,
    READ_ERRORS,
    checked_path,
    unfit_state,
    unreadable_shard,
    unreadable_split,
)
from megatron_mimo.data.sample import Draw, RejectedSample, draw
from megatron_mimo.data.task_encoder import MimoTaskEncoder
from megatron_mimo.data.tokenizer import Tokenizer

SplitName = Literal["train", "val"]

# Energon keeps the active worker in a class variable: one at a time in a process, whose training
# and evaluation may read in different threads. Whoever forks holds it too, so that no process
# begins with somebody else's worker active; reentrant, as the forked thread holds it as well.
energon_lock = threading.RLock()


class _VirtualWorkerConfig(WorkerConfig):
    """A rank with one worker, which is wherever it is used."""

    __slots__ = ()

    def rank_worker_id(self) -> int:
        """Energon would ask torch which of its processes this is."""
        return 0


@dataclass(frozen=True, slots=True)
class OpenedSplit:
    """A split of which all metadata has been read: workers are built without opening more.

    Attributes:
        path: Of the dataset.
        split: Train or val.
        loaded: Energon's factories.
        config: Seed, shuffling and packing.
        encoder: Energon's task encoder.
    """

    path: str
    split: SplitName
    loaded: Any
    config: DataConfig
    encoder: MimoTaskEncoder

    @property
    def num_samples(self) -> tuple[int, ...]:
        """Samples of each dataset of a blend."""
        return tuple(len(loaded.dataset) for loaded in self.loaded.datasets)

    def build(self, worker: int, num_workers: int) -> "VirtualWorker":
        """One worker.

        Args:
            worker: Its global id.
            num_workers: Of the whole job.

        Raises:
            ValueError: Energon cannot make sense of the dataset.
        """
        worker_config = _worker_config(self.config, worker, num_workers)
        for loaded in self.loaded.datasets:
            loaded.dataset.worker_config = worker_config
        try:
            # Energon reports on standard output what each worker of a JSONL dataset reads.
            with contextlib.redirect_stdout(io.StringIO()):
                dataset = self._build(worker_config)
        except OPEN_ERRORS as error:
            raise unreadable_split(self.path, self.split, error) from error
        return VirtualWorker(dataset, self.config.max_skips_in_row, self.path)

    def _build(self, worker_config: WorkerConfig) -> Any:
        # Single samples, although energon's own hints ask for a size.
        size: Any = None
        if self.split == "val":
            return self.encoder.build_val_datasets(
                datasets=self.loaded.datasets,
                worker_config=worker_config,
                batch_size=size,
                packing_buffer_size=self.config.packing_buffer_size,
            )
        return self.encoder.build_train_datasets(
            datasets=self.loaded.datasets,
            worker_config=worker_config,
            batch_size=size,
            packing_buffer_size=self.config.packing_buffer_size,
            shuffle_buffer_size=self.config.shuffle_buffer_size or None,
            blend_mode=self.loaded.blend_mode,
        )


def open_split(
    config: DataConfig, split: SplitName, tokenizer: Tokenizer, *, with_patches: bool
) -> OpenedSplit:
    """Read a split's metadata.

    Args:
        config: The dataset.
        split: Train, which is shuffled and endless, or val, in stored order.
        tokenizer: Of the texts.
        with_patches: Keep the pixels.

    Raises:
        ValueError: The dataset is missing, not prepared, or lacks the split.
    """
    assert config.path is not None
    path = checked_path(config.path)
    encoder = MimoTaskEncoder(config, tokenizer, with_patches=with_patches)
    training = split == "train"
    # What energon takes for granted when it is not told.
    sequence = {"max_samples_per_sequence": config.max_samples_per_sequence} if training else {}
    try:
        loaded = load_dataset(path).get_datasets(
            training=training,
            split_part=split,
            # Another takes its place in each worker.
            worker_config=_worker_config(config, 0, 1),
            decoder=encoder.decoder,
            **sequence,
        )
    except OPEN_ERRORS as error:
        raise unreadable_split(path, split, error) from error
    return OpenedSplit(path, split, loaded, config, encoder)


def _worker_config(config: DataConfig, worker: int, num_workers: int) -> WorkerConfig:
    return _VirtualWorkerConfig(
        rank=worker,
        world_size=num_workers,
        num_workers=1,
        seed_offset=config.seed,
        # Errors of a sample travel as outcomes; any other would leave samples out unseen.
        global_error_handler=reraise_exception,
    )


class VirtualWorker:
    """The sequences of one global worker id, epoch after epoch.

    Args:
        dataset: Energon's, built for this worker.
        max_skips_in_row: Unreadable samples in a row that mean a broken dataset.
        path: Names the dataset in errors.
    """

    def __init__(self, dataset: Any, max_skips_in_row: int, path: str) -> None:
        self._dataset = dataset
        self._max_skips = max_skips_in_row
        self._path = path
        self._outcome_index = 0
        self._outcomes = self._passes()
        self._rejected: RejectedSample | None = None

    def draw(self) -> Draw | None:
        """The next sequence; None if there is not a single one."""
        if self._rejected is not None:
            return self._rejected
        try:
            return draw(self._outcomes, f"--data-path {self._path}", self._max_skips)
        except READ_ERRORS as error:
            self._rejected = RejectedSample(message=unreadable_shard(self._path, error))
            return self._rejected

    def snapshot(self) -> bytes:
        """Where it stands."""
        with self._active():
            return pickle.dumps((self._outcome_index, self._dataset.save_state()))

    def restore(self, snapshot: bytes) -> None:
        """Stand where another stood; if it cannot, every draw says why."""
        try:
            # Checkpoints are the user's own, and unpickled as a whole.
            self._outcome_index, state = pickle.loads(snapshot)  # noqa: S301
            self._dataset.restore_state(state)
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            self._rejected = RejectedSample(message=unfit_state(self._path, error))
        self._outcomes = self._passes()

    def _passes(self) -> Iterator[Any]:
        """Outcomes, again and again; none if the worker's share is empty."""
        with self._active():
            empty = not self._dataset.worker_has_samples()
        while not empty:
            empty = True
            outcomes = iter(self._dataset)
            while True:
                with self._active():
                    try:
                        outcome = next(outcomes)
                    except StopIteration:
                        break
                empty = False
                self._outcome_index += 1
                yield outcome

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        with energon_lock:
            worker_config = self._dataset.worker_config
            worker_config.worker_activate(self._outcome_index)
            try:
                yield
            finally:
                worker_config.worker_deactivate()
