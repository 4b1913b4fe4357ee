"""Tensors that many ranks write into and read from one folder, over megatron-core's torch_dist.

The writer of megatron-core hands its results over through a process of its own, also when it writes
in the foreground; that child imports the program again and takes seconds. Here a file does it.
"""

import logging
import multiprocessing
import pickle
import queue
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as _torch_strategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# It warns of what is to replace this way of writing; that needs a library for GPUs.
_torch_strategy._logged_mcore_async_deprecation = True
# What it logs of a failed write is raised here.
logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)

type Stored = ShardedTensor | ShardedObject


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a folder says of a tensor.

    Attributes:
        shape: Of the whole.
        dtype: Of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class Plans:
    """What ranks have agreed on in one save, for the next ones."""

    def __init__(self) -> None:
        self.strategy = TorchDistSaveShardedStrategy(cached_metadata=True)


class Save:
    """One save of this rank; every rank of the world makes one at the same time.

    Args:
        parts: What this rank stores.
        folder: Empty, and the same for all ranks.
        digest: Called with each file that this rank has written, where it was written.
        plans: Of earlier saves with the same parts, which are used again.
    """

    def __init__(
        self,
        parts: Sequence[Stored],
        folder: Path,
        digest: Callable[[Path], Any],
        plans: "Plans | None" = None,
    ) -> None:
        self._strategy = (plans or Plans()).strategy
        self._folder = folder
        self._digest = digest
        self._results, self._digests = _ResultFile(), _ResultFile()
        original = filesystem_async.get_write_results_queue
        filesystem_async.get_write_results_queue = lambda *_args: self._results
        try:
            named = {str(index): part for index, part in enumerate(parts)}
            self._request: Any = self._strategy.async_save(named, folder, "mcore")
        finally:
            filesystem_async.get_write_results_queue = original
        self._process: Any = None

    def write(self) -> None:
        """Write this rank's files now."""
        if self._request.async_fn is not None:
            self._write(self._arguments())

    def start(self) -> None:
        """Write them in a process of their own, from memory as it is now."""
        if self._request.async_fn is None:
            return
        # Device memory is copied to the host here; host memory is kept by the fork.
        arguments = self._arguments()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=self._write, args=(arguments,), name="checkpoint writer"
        )
        self._process.start()

    @property
    def is_writing(self) -> bool:
        """Whether the process that `start` made still runs."""
        return self._process is not None and self._process.is_alive()

    def finish(self) -> dict[str, Any]:
        """Wait for this rank's files and write what describes them all. Collective over the world.

        Returns:
            This rank's files by name, with their digests.

        Raises:
            OSError: This rank's files could not be written; other ranks return.
            RuntimeError: The process that wrote them was killed.
        """
        if self._process is not None:
            self._process.join()
        digests = self._outcome()
        try:
            for function in self._request.finalize_fns:
                function()
        except CheckpointException:
            if isinstance(digests, Exception):
                raise digests from None
            return {}
        if torch.distributed.get_rank() == 0:
            save_config(
                CheckpointingConfig(self._strategy.backend, self._strategy.version), self._folder
            )
        assert isinstance(digests, dict)
        return digests

    def _outcome(self) -> dict[str, Any] | Exception:
        """What `_write` left, in whichever process."""
        if self._request.async_fn is None:
            return {}
        try:
            found: dict[str, Any] | Exception = self._digests.get_nowait()
        except queue.Empty:
            code = None if self._process is None else self._process.exitcode
            return RuntimeError(f"the process that wrote this rank's files ended with {code}")
        return found

    def _write(self, arguments: list[Any]) -> None:
        """What a process of its own may do; leaves digests, or the error."""
        failures: list[Exception] = []
        original = FileSystemWriterAsync.write_preloaded_data

        def write(*args: Any, **kwargs: Any) -> Any:
            # megatron-core keeps an error's type alone.
            outcome = original(*args, **kwargs)
            for part in outcome:
                if isinstance(part, Exception):
                    # Its frames hold torch's half-done writer, which must not be left to the
                    # garbage collector: it calls back into what is gone by then, and crashes.
                    failures.append(part.with_traceback(None))
            return outcome

        FileSystemWriterAsync.write_preloaded_data = write
        try:
            self._request.async_fn(*arguments)
        finally:
            FileSystemWriterAsync.write_preloaded_data = staticmethod(original)
        names = [name for _, name, _ in arguments[1]]
        self._digests.put(
            failures[0] if failures else {name: self._digest(self._folder / name) for name in names}
        )

    def _arguments(self) -> list[Any]:
        arguments = list(self._request.async_fn_args)
        if self._request.preload_fn is not None:
            arguments[1] = self._request.preload_fn()
        return arguments


def read(parts: Sequence[Stored], folder: Path) -> list[Any]:
    """Fill tensors from a folder, in place, and fetch objects. Not collective.

    Args:
        parts: What this rank asks for; everything must be there (`stored_tensors`).
        folder: As `Save` left it.

    Returns:
        For each part its tensor, or its object.
    """
    named = {str(index): part for index, part in enumerate(parts)}
    with warnings.catch_warnings():
        # That no group takes part, which is meant, and an order of arguments, megatron-core's.
        warnings.simplefilter("ignore", UserWarning)
        found: Any = TorchDistLoadShardedStrategy().load(named, folder)
    return [found[str(index)] for index in range(len(parts))]


def stored_tensors(folder: Path) -> tuple[Mapping[str, StoredTensor], frozenset[str]]:
    """Every tensor of a folder by key, and the keys of its objects.

    Raises:
        ValueError: The folder's `.metadata` is missing or damaged.
    """
    try:
        metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(
            f"{folder / '.metadata'} cannot be read ({type(error).__name__}: {error})"
        ) from error
    tensors = {
        key: StoredTensor(tuple(entry.size), entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return tensors, frozenset(metadata) - frozenset(tensors)


class _ResultFile:
    """What the writer found out, from its process to this one; takes the place of a queue."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="checkpoint-results-")

    def put(self, results: Any) -> None:
        """Of the writer."""
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Of the reader.

        Raises:
            queue.Empty: The writer ended without a result.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # noqa: S301 (of our own child)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
