"""Datasets on disk, read with megatron-energon by *virtual workers*.

A worker of energon is a share of the dataset and an order of it; both follow only from the worker's
number, its *global worker id*: lane times workers per lane, plus worker. Here a worker is an
object, which any process may hold, one or several of them.

Nothing that works on a sample may use the global random generators, or ask energon to seed them
(`stateless(restore_seeds=True)`): workers that share a process share those.
"""

import contextlib
import io
import tarfile
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron.energon import WorkerConfig
from megatron.energon.errors import reraise_exception
from megatron.energon.metadataset import load_dataset

from megatron_mimo.border import border, show_traceback
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.dataset_code import only_energons
from megatron_mimo.data.reading.dataset_errors import (
    checked_path,
    unfit_state,
    unreadable_shard,
    unreadable_split,
)
from megatron_mimo.data.reading.snapshot import read_snapshot, write_snapshot
from megatron_mimo.data.reading.task_encoder import MimoTaskEncoder
from megatron_mimo.data.samples.media import check_roots
from megatron_mimo.data.samples.sample import Draw, RejectedSample, draw
from megatron_mimo.data.text.tokenizer import Tokenizer

SplitName = Literal["train", "val"]

# Energon keeps the active worker in a class variable: one at a time in a process, whose training
# and evaluation may read in different threads. It is also locked while forking, so that no process
# begins with a worker of another thread active; reentrant, as the forked thread holds it as well.
energon_lock = threading.RLock()


class _VirtualWorkerConfig(WorkerConfig):
    """A rank with one worker, which is independent of its process."""

    __slots__ = ()

    def rank_worker_id(self) -> int:
        """Number of the worker, for which energon would otherwise ask torch."""
        return 0


@dataclass(frozen=True, slots=True)
class OpenedSplit:
    """A split of which all metadata has been read: workers are built without opening more.

    Attributes:
        path: Path to the dataset.
        split: Name of the split, train or val.
        loaded: Factories of energon.
        config: Seed, shuffling and packing.
        encoder: Task encoder for energon.
    """

    path: str
    split: SplitName
    loaded: Any
    config: DataConfig
    encoder: MimoTaskEncoder

    @property
    def num_samples(self) -> tuple[int, ...]:
        """Number of samples of each dataset of a blend."""
        return tuple(len(loaded.dataset) for loaded in self.loaded.datasets)

    def build(self, worker: int, num_workers: int) -> "VirtualWorker":
        """One worker.

        Args:
            worker: Global id of the worker.
            num_workers: Number of workers of the whole job.

        Raises:
            ValueError: Energon cannot read the dataset.
        """
        worker_config = _worker_config(self.config, worker, num_workers)
        for loaded in self.loaded.datasets:
            loaded.dataset.worker_config = worker_config
        # Energon reports on standard output what each worker of a JSONL dataset reads.
        with _opening(self.path, self.split), contextlib.redirect_stdout(io.StringIO()):
            dataset = self._build(worker_config)
        return VirtualWorker(dataset, self.config.max_skips_in_row, self.path)

    def _build(self, worker_config: WorkerConfig) -> Any:
        # Single samples, although energon's type hints require a size.
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
    config: DataConfig,
    split: SplitName,
    tokenizer: Tokenizer,
    *,
    content: Collection[str],
    encoder: MimoTaskEncoder | None = None,
) -> OpenedSplit:
    """Read a split's metadata.

    Args:
        config: Settings of the data, with the dataset's path.
        split: Name of the split: train, shuffled and endless, or val, in stored order.
        tokenizer: Tokenizer of the texts.
        content: Names of the modules whose items are decoded.
        encoder: Task encoder of these settings; None for that of training.

    Raises:
        ValueError: The dataset is missing, not prepared, or lacks the split.
    """
    assert config.path is not None
    path = checked_path(config.path)
    check_roots(config.media_root)
    encoder = encoder or MimoTaskEncoder(config, tokenizer, content=content)
    training = split == "train"
    # Settings that energon would otherwise assume.
    sequence = {"max_samples_per_sequence": config.max_samples_per_sequence} if training else {}
    with only_energons(path, trust=config.trust_dataset_code), _opening(path, split):
        loaded = load_dataset(path).get_datasets(
            training=training,
            split_part=split,
            # Each worker replaces it by its own.
            worker_config=_worker_config(config, 0, 1),
            decoder=encoder.decoder,
            **sequence,
        )
    return OpenedSplit(path, split, loaded, config, encoder)


def _opening(path: str, split: str) -> contextlib.AbstractContextManager[None]:
    return border(lambda why: unreadable_split(path, split, why))


def _worker_config(config: DataConfig, worker: int, num_workers: int) -> WorkerConfig:
    return _VirtualWorkerConfig(
        rank=worker,
        world_size=num_workers,
        num_workers=1,
        seed_offset=config.seed,
        # Errors of a sample are outcomes; any other error would skip samples silently.
        global_error_handler=reraise_exception,
    )


class VirtualWorker:
    """The sequences of one global worker id, epoch after epoch.

    Args:
        dataset: Dataset of energon, built for this worker.
        max_skips_in_row: Number of unreadable samples in a row that means a broken dataset.
        path: Path to the dataset, for error messages.
    """

    def __init__(self, dataset: Any, max_skips_in_row: int, path: str) -> None:
        self._dataset = dataset
        self._max_skips = max_skips_in_row
        self._path = path
        self._outcome_index = 0
        self._outcomes = self._passes()
        self._rejected: RejectedSample | None = None
        # Whether nothing was drawn since a state was restored.
        self._restored = False

    def draw(self) -> Draw | None:
        """The next sequence; None if there is not a single one."""
        if self._rejected is not None:
            return self._rejected
        restored, self._restored = self._restored, False
        try:
            return draw(self._outcomes, f"--data-path {self._path}", self._max_skips)
        # Outcomes are values: whatever is raised comes from energon over the dataset's files.
        except Exception as error:
            show_traceback(error)
            # Energon uses a restored state from the first sample after it on.
            unfit = restored and not isinstance(error, OSError | tarfile.TarError)
            reason = unfit_state if unfit else unreadable_shard
            self._rejected = RejectedSample(message=reason(self._path, error))
            return self._rejected

    def snapshot(self) -> str:
        """State of the worker, for `restore`."""
        with self._active():
            return write_snapshot(self._outcome_index, self._dataset.save_state())

    def restore(self, snapshot: str) -> None:
        """Continue from a snapshot; if this is impossible, every draw gives the reason."""
        try:
            self._outcome_index, state = read_snapshot(snapshot)
            self._dataset.restore_state(state)
        # Energon trusts the state, and raises anything where it does not fit.
        except Exception as error:
            self._rejected = RejectedSample(message=unfit_state(self._path, error))
        self._outcomes = self._passes()
        self._restored = True

    def _passes(self) -> Iterator[Any]:
        """Outcomes, epoch after epoch; none if the worker's share is empty."""
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
