"""Folders of torch.distributed.checkpoint, as megatron-core writes them: what they hold, and where.

Such a folder is described by a pickle, `.metadata`, in which only the names below are known; each
tensor is read by torch's weights-only loading. So nothing that a folder names is run.
"""

import io
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_mimo.weights.pickled import Name, Record, read_pickle, refuse, unreadable

METADATA = ".metadata"
_DTYPES = {
    name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)
}
_OF_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX, _INFO = (_OF_METADATA, "MetadataIndex"), "_StorageInfo"
_KINDS: Mapping[Name, type] = {
    **{
        (_OF_METADATA, name): Record
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    },
    # Plans of the writer, which megatron-core keeps there for later saves.
    **{
        ("torch.distributed.checkpoint.planner", name): Record
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    },
    ("torch.distributed.checkpoint.filesystem", _INFO): Record,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): Record,
    ("torch", "Size"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("pathlib", "PosixPath"): Record,
    ("pathlib", "PurePosixPath"): Record,
    ("pathlib._local", "PosixPath"): Record,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "ChainMap"): Record,
}
# How torch names what it does not load, in files of old versions.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_CONSTANTS: Mapping[Name, Any] = {("torch", name): value for name, value in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a folder something is stored.

    Attributes:
        file: Name of the file.
        start: Offset in bytes.
        length: Length in bytes.
    """

    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a stored tensor, which is stored in one piece.

    Attributes:
        offset: Offset of the box in the tensor, in elements of each dimension.
        shape: Shape of the box.
        place: Place of its elements.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Description of a tensor in a folder.

    Attributes:
        shape: Shape of the whole tensor.
        dtype: Dtype of its elements.
        chunks: Boxes that make up the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a folder holds.

    Attributes:
        folder: Path to the folder.
        tensors: Tensors by key.
        objects: Places of other objects by key.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Place]

    @cached_property
    def ends(self) -> Mapping[str, int]:
        """Least size in bytes of each file."""
        found: dict[str, int] = {}
        chunks = (chunk.place for tensor in self.tensors.values() for chunk in tensor.chunks)
        for place in (*chunks, *self.objects.values()):
            found[place.file] = max(place.start + place.length, found.get(place.file, 0))
        return found


def describe(folder: Path, *, trust: bool = False) -> Description:
    """Read what a folder holds.

    Args:
        folder: Path to the folder.
        trust: Whether `.metadata` may run code.

    Raises:
        FileNotFoundError: The folder has no `.metadata`.
        ValueError: `.metadata` is damaged, or names code; the message names it.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(str(path), error) from error
    return parse(content, folder, trust=trust)


def parse(content: bytes, folder: Path, *, trust: bool = False) -> Description:
    """Description of a folder from the bytes of its `.metadata`.

    Raises:
        ValueError: They are damaged, or name code.
    """
    where = str(folder / METADATA)
    found = read_pickle(content, _KINDS, _CONSTANTS, where=where, trust=trust)
    try:
        return _description(found, folder)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise unreadable(where, error) from error


def load_tensor(folder: Path, place: Place, *, trust: bool = False) -> Tensor:
    """A stored tensor [...], on the host.

    Raises:
        ValueError: It is damaged, or names code; the message names the file.
    """
    found = _load(folder, place, trust=trust)
    if not isinstance(found, Tensor):
        raise ValueError(f"{folder / place.file} holds a {type(found).__name__}: expected a tensor")
    return found


def load_object(folder: Path, place: Place, *, trust: bool = False) -> Any:
    """A stored object of plain values, tensors and arrays.

    Raises:
        ValueError: It is damaged, or names code; the message names the file.
    """
    found = _load(folder, place, trust=trust)
    # megatron-core stores a list of those that share a key.
    return found[0] if isinstance(found, list) and len(found) == 1 else found


def load_plain(source: Any, where: str, *, more: tuple[Any, ...] = (), trust: bool = False) -> Any:
    """Value that `torch.save` stored, by weights-only loading.

    Args:
        source: File, open for reading.
        where: Its name, for error messages.
        more: Types that are accepted beside tensors, arrays and plain values.
        trust: Whether the file may run code.

    Raises:
        ValueError: It is damaged, or names code.
    """
    start = source.tell()
    with warnings.catch_warnings(), safe_globals([*_arrays(), *more]):
        warnings.simplefilter("ignore")
        try:
            return torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            source.seek(start)
            unknown = _unknown(source) or set(_REFUSED.findall(str(error)))
            if not unknown:
                raise unreadable(where, error) from error
            if not trust:
                refuse(where, unknown)
        source.seek(start)
        try:
            return torch.load(source, map_location="cpu", weights_only=False)
        except Exception as error:
            raise unreadable(where, error) from error


def _load(folder: Path, place: Place, *, trust: bool) -> Any:
    path = folder / place.file
    try:
        with path.open("rb") as file:
            return load_plain(_Piece(file, place), str(path), trust=trust)
    except OSError as error:
        raise unreadable(str(path), error) from error


def _unknown(source: Any) -> set[str]:
    """Names in a file that weights-only loading does not know; none where they cannot be told."""
    try:
        return {ascii(name[:100])[1:-1] for name in get_unsafe_globals_in_checkpoint(source)}
    except Exception:
        return set()


def _arrays() -> list[Any]:
    """Types that arrays of numpy are stored with."""
    import numpy as np
    from numpy._core.multiarray import _reconstruct, scalar

    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"}
    return [_reconstruct, scalar, np.ndarray, np.dtype, *kinds]


class _Piece(io.RawIOBase):
    """A part of a file, as a file by itself."""

    def __init__(self, file: Any, place: Place) -> None:
        self._file, self._start, self._length = file, place.start, place.length
        self._at = 0

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether any place of it can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another place."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def tell(self) -> int:
        """Place at which it is read next."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into a buffer."""
        left = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(memoryview(buffer)[:left])
        self._at += count
        return count


# -- from records ----------------------------------------------------------------------------------


def _description(found: Any, folder: Path) -> Description:
    state = _state(found, "Metadata")
    places = {
        (key, offset): place for key, offset, place in _places(state["storage_data"] or {}, folder)
    }
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Place] = {}
    for key, entry in _pairs(state["state_dict_metadata"], "state_dict_metadata"):
        if not isinstance(key, str):
            raise TypeError(f"a key is a {type(key).__name__}")
        if type(entry).__name__ != "Record":
            raise TypeError(f"{key} is a {type(entry).__name__}")
        if entry.state is None or "chunks" not in entry.state:
            if (key, None) in places:
                objects[key] = places[key, None]
            continue
        tensors[key] = _tensor(key, entry, places)
    return Description(folder, tensors, objects)


def _tensor(
    key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...] | None], Place]
) -> StoredTensor:
    shape = _sizes(entry.state["size"], key)
    dtype = entry.state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"the dtype of {key} is a {type(dtype).__name__}")
    chunks = []
    for chunk in entry.state["chunks"]:
        offset, size = _sizes(chunk.state["offsets"], key), _sizes(chunk.state["sizes"], key)
        inside = len(offset) == len(size) == len(shape) and all(
            start + count <= whole for start, count, whole in zip(offset, size, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"{key} has a part outside of its shape")
        place = places.get((key, offset))
        if place is None:
            raise ValueError(f"{key} has a part that is in no file")
        chunks.append(Chunk(offset, size, place))
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"the parts of {key} are not the whole of it")
    return StoredTensor(shape, dtype, tuple(chunks))


def _places(stored: Any, folder: Path) -> Iterator[tuple[str, tuple[int, ...] | None, Place]]:
    for index, info in _pairs(stored, "storage_data"):
        at = _state(index, "MetadataIndex")
        key, offset = at["fqn"], at.get("offset")
        if not isinstance(key, str):
            raise TypeError(f"a key is a {type(key).__name__}")
        of_file = _state(info, _INFO)
        if of_file.get("transform_descriptors"):
            raise ValueError(f"{key} is compressed, which is not supported")
        name, start, length = (of_file[field] for field in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{key} is in {name!r}: expected a file of the folder")
        start, length = _sizes((start, length), key)
        yield key, None if offset is None else _sizes(offset, key), Place(name, start, length)


def _state(found: Any, what: str) -> dict[Any, Any]:
    state = getattr(found, "state", None)
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(found).__name__} where a {what} is expected")
    return state


def _pairs(found: Any, what: str) -> Iterator[tuple[Any, Any]]:
    if not isinstance(found, dict):
        raise TypeError(f"{what} is a {type(found).__name__}")
    yield from found.items()


def _sizes(found: Any, key: str) -> tuple[int, ...]:
    """Numbers of a shape, an offset or a place."""
    if isinstance(found, Record):
        (found,) = found.args
    sizes = tuple(found)
    if any(type(size) is not int or not 0 <= size < 2**62 for size in sizes):
        raise ValueError(f"{key} has sizes {sizes!r:.80}")
    return sizes
