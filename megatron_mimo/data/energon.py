"""Samples from a dataset on disk, read with megatron-energon, one stream per lane.

A lane is one *rank* in energon's words: `WorkerConfig(rank=lane, world_size=num_lanes)`. Whoever
reads a lane, on whichever process, builds the same config and so gets the same samples in the same
order; no process group takes part.
"""

import gc
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.energon import WorkerConfig, get_train_dataset, get_val_dataset
from megatron.energon.epathlib import EPath
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import EnergonDatasetType, get_dataset_type
from megatron.energon.savable_loader import SavableDataLoader

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.sample import Draw, Outcome, draw
from megatron_mimo.data.task_encoder import MimoTaskEncoder
from megatron_mimo.data.tokenizer import Tokenizer


def train_stream(
    config: DataConfig, lane: int, num_lanes: int, tokenizer: Tokenizer, *, with_patches: bool
) -> "EnergonStream":
    """Endless, shuffled outcomes of a lane's share of the train split.

    Args:
        config: Dataset, seed, shuffling and reader processes.
        lane: Whose samples.
        num_lanes: Among how many lanes the split is shared.
        tokenizer: Of the texts.
        with_patches: Keep the pixels.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no train split.
    """
    worker_config = _worker_config(config, lane, num_lanes, config.num_workers)
    path = _checked_path(config)
    try:
        dataset: Any = get_train_dataset(
            path,
            worker_config=worker_config,
            batch_size=None,
            shuffle_buffer_size=config.shuffle_buffer_size or None,
            max_samples_per_sequence=config.max_samples_per_sequence,
            task_encoder=MimoTaskEncoder(config, tokenizer, with_patches=with_patches),
        )
    except _BUILD_ERRORS as error:
        raise _unreadable(path, "train", error) from error
    return EnergonStream(dataset, config)


def eval_stream(
    config: DataConfig, lane: int, num_lanes: int, tokenizer: Tokenizer, *, with_patches: bool
) -> "EnergonStream":
    """Outcomes of a lane's share of the val split, in stored order, from its start; endless.

    Read in this process whatever `num_workers` says: evaluations are short, and their samples then
    do not depend on the number of workers.

    Args:
        config: Dataset.
        lane: Whose samples.
        num_lanes: Among how many lanes the split is shared.
        tokenizer: Of the texts.
        with_patches: Keep the pixels.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no val split.
    """
    path = _checked_path(config)
    try:
        dataset: Any = get_val_dataset(
            path,
            worker_config=_worker_config(config, lane, num_lanes, num_workers=0),
            # Single samples, although energon's own hint asks for a size.
            batch_size=None,
            task_encoder=MimoTaskEncoder(config, tokenizer, with_patches=with_patches),
        )
    except _BUILD_ERRORS as error:
        raise _unreadable(path, "val", error) from error
    return EnergonStream(dataset, config)


def _worker_config(config: DataConfig, lane: int, num_lanes: int, num_workers: int) -> WorkerConfig:
    return WorkerConfig(
        rank=lane,
        world_size=num_lanes,
        num_workers=num_workers,
        seed_offset=config.seed,
        # Errors of a sample travel as outcomes; any other would leave samples out unseen.
        global_error_handler=reraise_exception,
    )


class EnergonStream(Iterator[Draw]):
    """Sequences of one lane's readers, again and again; they start with the first draw.

    Args:
        dataset: Of one lane.
        config: Batch sizes; names the dataset in errors.
    """

    def __init__(self, dataset: Any, config: DataConfig) -> None:
        in_process = dataset.worker_config.num_workers == 0
        self._num_workers = dataset.worker_config.num_workers
        self._loader: Any = SavableDataLoader(
            dataset,
            prefetch_factor=max(2, 2 * config.micro_batch_size),
            # energon collects garbage every few samples, and freezes what lives: right for a
            # reader process, but not for the training process.
            gc_collect_every_n_steps=0 if in_process else 100,
            watchdog_timeout_seconds=None if in_process else 60,
        )
        # Outcomes hold no tensors, so there is nothing to pin.
        self._loader.pin_memory = False
        self._where = f"--data-path {config.path}"
        self._max_skips = config.max_skips_in_row
        self._outcomes: Iterator[Outcome] | None = None

    def __next__(self) -> Draw:
        if self._outcomes is None:
            if self._num_workers:
                # Readers are forked, and collect garbage: what this process has left, process
                # groups of gloo for one, must be gone by then, as it cannot be ended elsewhere.
                gc.collect()
            self._outcomes = _passes(self._loader, self._where)
        found = draw(self._outcomes, self._where, self._max_skips)
        if found is None:
            raise StopIteration
        return found

    def state(self) -> Mapping[str, Any]:
        """Energon's own state of the readers."""
        return {"energon": self._loader.save_state_rank(), "num_workers": self._num_workers}

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Go on; energon binds what was read to its lanes and reader processes.

        Raises:
            ValueError: Their number has changed, or the checkpoint is of another kind of data.
        """
        before = lanes[lane] if lane < len(lanes) else lanes[0]
        if "energon" not in before:
            raise ValueError(
                f"{self._where}: the checkpoint's data was not read with energon; "
                f"use --finetune to begin with this dataset"
            )
        world_size = self._loader.worker_config.world_size
        if len(lanes) != world_size or before["num_workers"] != self._num_workers:
            raise ValueError(
                f"{self._where} cannot go on with --llm-dp {world_size} --num-workers "
                f"{self._num_workers}: the checkpoint's readers had --llm-dp {len(lanes)} "
                f"--num-workers {before['num_workers']}; keep them"
            )
        self._loader.restore_state_rank(before["energon"])


def _passes(loader: Any, dataset: str) -> Iterator[Outcome]:
    """Outcomes of the loader, again and again; none if a pass is empty."""
    was_empty = False
    while not was_empty:
        was_empty = True
        try:
            for outcome in iter(loader):
                was_empty = False
                yield outcome
        except _READ_ERRORS as error:
            # From a reader process comes its traceback, whose last line says what happened.
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ValueError(
                f"{dataset}: a shard cannot be read ({reason[0]}): check that every tar file of "
                f"the dataset is there and whole, and run `energon prepare` after changing one"
            ) from error


# -- the dataset's own errors ----------------------------------------------------------------------

# What reading a missing, empty or cut shard raises.
_READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)
# What energon raises when it cannot make sense of a folder.
_BUILD_ERRORS = (AssertionError, EmptyDatasetError, OSError, ValueError, KeyError, TypeError)


def _checked_path(config: DataConfig) -> str:
    """The dataset's path, after the mistakes that users make first."""
    assert config.path is not None
    path = Path(config.path)
    if not path.exists():
        raise ValueError(
            f"--data-path {path} does not exist: expected an Energon dataset; "
            f"`megatron-mimo data digits --out {path}` writes one to try"
        )
    kind = get_dataset_type(EPath(path))
    if path.is_dir() and kind is not EnergonDatasetType.WEBDATASET:
        raise ValueError(
            f"--data-path {path} is not prepared for Energon: {path / '.nv-meta' / '.info.json'} "
            f"is missing; run `energon prepare {path}` on a folder of tar files"
        )
    if path.is_file() and kind is not EnergonDatasetType.METADATASET:
        raise ValueError(
            f"--data-path {path} is a file that Energon cannot train from here: expected a "
            f"dataset folder, or a metadataset ending in .yaml"
        )
    return str(path)


def _unreadable(path: str, split: str, error: Exception) -> ValueError:
    reason = str(error) or type(error).__name__
    return ValueError(
        f"--data-path {path}: the {split} split cannot be opened ({reason}): expected .nv-meta "
        f"with split.yaml and dataset.yaml, and shards for {split}; run `energon prepare {path}` "
        f"again"
    )
