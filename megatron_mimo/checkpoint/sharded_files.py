"""Tensors that many ranks write to and read from one folder, in megatron-core's torch_dist.

Nothing here communicates. Each rank writes one file and determines its contents; one rank writes
the list of all files. Any thread may do so, including that of a save in the background.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_mimo.weights.torch_dist import METADATA, Chunk, Description, load_object, load_tensor

_FORMAT = CheckpointingConfig("torch_dist", 1)

type Stored = ShardedTensor | ShardedObject


@dataclass(frozen=True, slots=True)
class Written:
    """Description of the file of a rank.

    Attributes:
        names: Names of the rank's files; empty where there was nothing to store.
        plan: Contents of the file; None when they are those that were `agreed` on.
        results: Place in the file of each part.
    """

    names: tuple[str, ...]
    plan: SavePlan | None
    results: list[WriteResult]


class ShardedWriter:
    """Writes the files of this rank, to one folder after the other.

    A rank stores the same tensors in every save, and so the list that rank 0 writes is the same:
    both are kept.

    Args:
        rank: Rank of this process.
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
            parts: Parts that this rank holds; copies that another rank stores are left out.
            folder: Folder that exists, the same for all ranks.

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
        """Write the description of the files of all ranks; one rank calls it.

        Args:
            written: Description from every rank, in order of rank.
            folder: Folder in which the files were written.

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
        """Keep the contents of the last file, which the describing rank now has."""
        self._agreed = self._plan


def read(parts: Sequence[Stored], stored: Description, *, trust: bool = False) -> list[Any]:
    """Fill tensors from a folder, in place, and read objects. Not collective.

    Args:
        parts: Parts that this rank requests; all of them must be in the folder.
        stored: Description of a folder that a `ShardedWriter`, or megatron-core, has written.
        trust: Whether files may run code.

    Returns:
        Tensor or object of each part.

    Raises:
        ValueError: A file is damaged, or names code; the message names it.
    """
    boxes: dict[Chunk, list[_Overlap]] = {}
    for part in parts:
        if isinstance(part, ShardedTensor):
            for chunk, overlap in _overlaps(part, stored):
                boxes.setdefault(chunk, []).append(overlap)
    # Each box is read once, and files from their beginnings to their ends.
    for chunk in sorted(boxes, key=lambda chunk: (chunk.place.file, chunk.place.start)):
        tensor = load_tensor(stored.folder, chunk.place, trust=trust)
        if tuple(tensor.shape) != chunk.shape:
            raise ValueError(
                f"{stored.folder / chunk.place.file} holds a tensor {list(tensor.shape)} where "
                f"{list(chunk.shape)} was saved: the checkpoint is damaged"
            )
        for overlap in boxes[chunk]:
            overlap.target.copy_(tensor[overlap.of_chunk])
    return [
        part.data
        if isinstance(part, ShardedTensor)
        else load_object(stored.folder, stored.objects[part.unique_key], trust=trust)
        for part in parts
    ]


@dataclass(frozen=True, slots=True)
class _Overlap:
    """What a stored box holds of a part.

    Attributes:
        target: The memory to fill, [...].
        of_chunk: The same elements in the box.
    """

    target: Tensor
    of_chunk: tuple[slice, ...]


def _overlaps(part: ShardedTensor, stored: Description) -> Iterator[tuple[Chunk, _Overlap]]:
    """The boxes that hold a part, which together are the whole of it."""
    data = _data(part)
    missing = data.numel()
    first = part.global_offset
    for chunk in stored.tensors[part.key].chunks:
        begins = tuple(map(max, first, chunk.offset))
        ends = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(first, data.shape, chunk.offset, chunk.shape, strict=True)
        )
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            continue
        here, there = (
            tuple(
                slice(begin - origin, end - origin)
                for begin, end, origin in zip(begins, ends, at, strict=True)
            )
            for at in (first, chunk.offset)
        )
        target = data[here]
        missing -= target.numel()
        yield chunk, _Overlap(target, there)
    if missing:
        raise ValueError(
            f"{stored.folder / METADATA} does not say where all of {part.key} is: the checkpoint "
            f"is damaged"
        )


def _data(part: ShardedTensor) -> Tensor:
    """Memory of a part, in the dimensions of the stored tensor."""
    assert part.data is not None
    # megatron-core's axes in front, such as that of layers, are not the data's.
    data: Tensor = part.data.detach()
    # As one argument, which a scalar needs.
    return data.view((*(1,) * part.prepend_axis_num, *part.local_shape))


class _Data:
    """Parts by their index in a folder, in the form that torch's writer requests."""

    def __init__(self, parts: Sequence[Stored]) -> None:
        self.items: list[WriteItem] = []
        self._tensors: dict[MetadataIndex, Tensor] = {}
        self._objects: dict[str, ShardedObject] = {}
        for part in parts:
            if isinstance(part, ShardedTensor):
                tensor = _data(part)
                item = _tensor_item(part, tensor)
                self._tensors[item.index] = tensor
            else:
                index = MetadataIndex(part.unique_key)
                item = WriteItem(index, WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(0))
                self._objects[part.unique_key] = part
            self.items.append(item)

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        """Data to write for an item."""
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
    """Result of a write.

    Raises:
        OSError: The write failed.
    """
    try:
        return write()
    except Exception as raised:
        error = _first(raised)
    # The frames of the failure hold torch's half-done writer, which must not be left to the garbage
    # collector: it would call freed objects and crash. At this point the frames are released.
    raise error


def _first(raised: BaseException) -> OSError:
    """First error of a chain, without its frames: a full disk shows under several names."""
    while raised.__context__ is not None:
        raised = raised.__context__
    if isinstance(raised, OSError) and raised.errno is not None:
        return OSError(raised.errno, raised.strerror)
    return OSError(f"{type(raised).__name__}: {raised}")
