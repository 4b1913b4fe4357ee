"""Tensors that many ranks write into and read from one folder: megatron-core's torch_dist format.

Nothing here communicates. Each rank writes one file and finds out what lies where in it; one rank
writes the list of them all. Any thread may do so: a save in the background is one.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

_FORMAT = CheckpointingConfig("torch_dist", 1)

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


@dataclass(frozen=True, slots=True)
class Written:
    """A rank's file.

    Attributes:
        names: Of the file; none where there was nothing to store.
        plan: What it holds; None when that is what was `agreed` on.
        results: Where in the file each part lies.
    """

    names: tuple[str, ...]
    plan: SavePlan | None
    results: list[WriteResult]


class ShardedWriter:
    """Writes this rank's files, one folder after the other.

    What a rank stores is the same from save to save, and so is the list of it that rank 0 makes:
    both are kept.

    Args:
        rank: Of this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._plan: SavePlan | None = None
        self._agreed: SavePlan | None = None
        self._plans: list[SavePlan] = []
        self._metadata = Metadata({})

    def write(self, parts: Sequence[Stored], folder: Path) -> Written:
        """Write this rank's file and sync it.

        Args:
            parts: What this rank holds; copies that another rank stores are left out.
            folder: Is there; the same for all ranks.

        Raises:
            OSError: The file could not be written.
        """
        data = _Data([part for part in parts if is_main_replica(part.replica_id)])
        self._plan = SavePlan(data.items)
        results: list[WriteResult] = []
        if data.items:
            # Copying ahead from a device would choose the device by itself.
            files = FileSystemWriter(folder, per_thread_copy_ahead=0)
            files.set_up_storage_writer(False, rank=self._rank, use_collectives=False)
            named = files.prepare_local_plan(self._plan)
            results = _complete(lambda: files.write_data(named, data).wait())  # type: ignore[arg-type]
        return Written(
            names=tuple(sorted({result.storage_data.relative_path for result in results})),
            plan=None if self._plan == self._agreed else self._plan,
            results=results,
        )

    def describe(self, written: Sequence[Written], folder: Path) -> None:
        """Write what describes the files of all ranks; one rank does.

        Args:
            written: Of every rank, by rank.
            folder: Where they were written.

        Raises:
            OSError: The description could not be written.
            ValueError: Ranks store overlapping parts of a tensor, or not all of it.
        """
        if any(rank.plan is not None for rank in written):
            plans = [
                rank.plan if rank.plan is not None else self._plans[index]
                for index, rank in enumerate(written)
            ]
            _, self._metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(
                plans
            )
            self._plans = plans
        FileSystemWriter(folder).finish(self._metadata, [rank.results for rank in written])
        save_config(_FORMAT, folder)

    def agreed(self) -> None:
        """Keep what the last file holds: `describe` has it, on the rank that describes."""
        self._agreed = self._plan


def read(parts: Sequence[Stored], folder: Path) -> list[Any]:
    """Fill tensors from a folder, in place, and fetch objects. Not collective.

    Args:
        parts: What this rank asks for; everything must be there (`stored_tensors`).
        folder: As `ShardedWriter` left it.

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


class _Data:
    """Parts by their place in a folder, as torch's writer asks for them."""

    def __init__(self, parts: Sequence[Stored]) -> None:
        self.items: list[WriteItem] = []
        self._tensors: dict[MetadataIndex, Tensor] = {}
        self._objects: dict[str, ShardedObject] = {}
        for part in parts:
            if isinstance(part, ShardedTensor):
                assert part.data is not None
                # megatron-core's axes in front, such as that of layers, are not the data's.
                tensor = part.data.detach().view(*(1,) * part.prepend_axis_num, *part.local_shape)
                item = _tensor_item(part, tensor)
                self._tensors[item.index] = tensor
            else:
                index = MetadataIndex(part.unique_key)
                item = WriteItem(index, WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(0))
                self._objects[part.unique_key] = part
            self.items.append(item)

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        """What to write."""
        if item.type != WriteItemType.BYTE_IO:
            return self._tensors[item.index]
        content = io.BytesIO()
        # megatron-core stores a list of those that share a key.
        torch.save([self._objects[item.index.fqn].data], content)
        return content


def _tensor_item(part: ShardedTensor, data: Tensor) -> WriteItem:
    offset = torch.Size(part.global_offset)
    return WriteItem(
        MetadataIndex(part.key, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offset, data.shape),
            properties=TensorProperties(dtype=data.dtype),
            size=torch.Size(part.global_shape),
        ),
    )


def _complete[T](write: Callable[[], T]) -> T:
    """What it returns.

    Raises:
        OSError: It failed.
    """
    try:
        return write()
    except Exception as raised:
        error = _first(raised)
    # The frames of the failure hold torch's half-done writer, which must not be left to the garbage
    # collector: it calls back into what is gone by then, and crashes. Here they are gone.
    raise error


def _first(raised: BaseException) -> OSError:
    """Where a chain of errors began, without its frames: a full disk comes up under other names."""
    while raised.__context__ is not None:
        raised = raised.__context__
    if isinstance(raised, OSError) and raised.errno is not None:
        return OSError(raised.errno, raised.strerror)
    return OSError(f"{type(raised).__name__}: {raised}")
