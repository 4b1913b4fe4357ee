"""`megatron-mimo checkpoint inspect`: what a checkpoint holds, without loading it."""

import io
import math
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.settings import Switch
from megatron_mimo.topology import ModuleGridSpec
from megatron_mimo.weights.pickled import NamesCodeError
from megatron_mimo.weights.torch_dist import METADATA, Description, describe

_MODULES = ("vision_model", "vision_projection", "language_model")
# As megatron-core names it, with several optimizers or one.
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.(?:state\.([^.]+)\.)?")
_COMMON_STATE = "common_state/"
_AXES = ("tp", "cp", "pp", "dp", "ep", "expt_tp")
# Megatron's names of them, and of all ranks.
_THEIR_AXES = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "dp": "data_parallel_size",
    "ep": "expert_model_parallel_size",
    "expt_tp": "expert_tensor_parallel_size",
    "ranks": "world_size",
}


class Damaged(RuntimeError):
    """A checkpoint is incomplete or changed; the message names the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Show what a checkpoint holds, without loading it.

    PATH is a folder of checkpoints, of which the newest is shown, or the folder of one.

    Attributes:
        verify: Read every file and compare it with its checksum.
        tensors: List every tensor, with its shape and dtype.
    """

    verify: Switch = False
    tensors: Switch = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEntry:
    """A tensor of a checkpoint.

    Attributes:
        key: Name of the tensor in the checkpoint.
        kind: Kind of the optimizer's state, "" where it has no kind; None for a weight or buffer.
        module: Module that the tensor belongs to.
        shape: Shape of the whole tensor.
        dtype: Dtype of the elements.
    """

    key: str
    kind: str | None
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the elements in bytes."""
        return self.numel * self.dtype.itemsize


def run_inspect(path: str, config: InspectConfig) -> int:
    """Print what a checkpoint holds.

    Args:
        path: Path to a folder of checkpoints, or to the folder of one.
        config: Settings of what to print.

    Returns:
        0, or 1 for a checkpoint that is damaged.

    Raises:
        ValueError: There is no checkpoint, or `--verify` finds no checksums.
    """
    try:
        _inspect(Path(path), config)
    except Damaged as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def locate(path: Path) -> Path:
    """Folder of one checkpoint: `path` itself, or the newest one in it.

    Raises:
        ValueError: `path` is not a folder, or holds no checkpoint.
        Damaged: The tracker names no checkpoint that exists.
    """
    if not path.is_dir():
        raise ValueError(
            f"{path} is {'a file' if path.exists() else 'not there'}: expected a folder of "
            f"checkpoints, or the folder of one, iter_*"
        )
    if (path / METADATA).exists():
        return path
    if folders.is_iteration(path):
        raise Damaged(f"{path / METADATA} is missing: the checkpoint is damaged or incomplete")
    try:
        found = folders.find(path, flag="PATH", release=True)
    except ValueError as error:
        raise Damaged(str(error).removeprefix("PATH ")) from error
    if found is None:
        raise ValueError(
            f"{path} holds neither {folders.TRACKER} nor {METADATA}: expected a folder of "
            f"torch_dist checkpoints, or the folder of one, iter_*"
        )
    return found


def read_metadata(folder: Path) -> Description:
    """Read the list of a checkpoint's tensors and their places in its files.

    Raises:
        Damaged: The list cannot be read.
    """
    path = folder / METADATA
    try:
        return describe(folder)
    except FileNotFoundError:
        raise Damaged(
            f"{path} is missing: the checkpoint is damaged, incomplete or of another format than "
            f"torch_dist"
        ) from None
    except NamesCodeError as error:
        raise Damaged(str(error)) from error
    except ValueError as error:
        raise Damaged(f"{error}: the checkpoint is damaged") from error


def entries_of(metadata: Description) -> list[StoredEntry]:
    """Every tensor of a checkpoint, by key."""
    found = []
    for key, tensor in sorted(metadata.tensors.items()):
        optimizer = _OPTIMIZER.match(key)
        name = key[optimizer.end() :] if optimizer else key
        found.append(
            StoredEntry(
                key=key,
                kind=(optimizer[1] or "") if optimizer else None,
                module=name.partition(".")[0],
                shape=tensor.shape,
                dtype=tensor.dtype,
            )
        )
    return found


def check_sizes(folder: Path, metadata: Description) -> None:
    """Refuse a checkpoint with missing files or files of another size; no file is read.

    Raises:
        Damaged: Files are missing or have another size; the message names them.
    """
    sizes = _sizes(folder)
    wrong = {
        name: f"{folder / name} has {sizes[name]} bytes, {end} at least were saved"
        if name in sizes
        else f"{folder / name} is missing"
        for name, end in sorted(metadata.ends.items())
        if sizes.get(name, -1) < end
    }
    for name, saved in _checksums(folder).items():
        if name not in sizes:
            wrong[name] = f"{folder / name} is missing"
        elif sizes[name] != saved.size:
            wrong[name] = f"{folder / name} has {sizes[name]} bytes, {saved.size} were saved"
    if wrong:
        raise Damaged(f"{'; '.join(wrong.values())}: the checkpoint is damaged")


def verify(folder: Path) -> None:
    """Read every file and compare it with its checksum.

    Raises:
        ValueError: The checkpoint has no checksums.
        Damaged: Files differ from their checksums; the message names them.
    """
    expected = _checksums(folder)
    if not expected:
        raise ValueError(
            f"--verify: {folder / folders.CHECKSUMS} is not there, so there is nothing to compare "
            f"with; leave --verify out to check names and sizes"
        )
    wrong = folders.check_files(folder, expected, expected)
    if wrong:
        raise Damaged(f"{'; '.join(wrong)}: the checkpoint is damaged")


class _Unknown:
    """Replacement for objects of other programs in a file, so that none of their code runs."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "_Unknown":
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def read_common(folder: Path, metadata: Description) -> Mapping[str, Any] | None:
    """State of the run in a checkpoint; None where there is none, or only foreign objects.

    The state is in common.pt; megatron-core 0.19 puts it among the tensors.

    Raises:
        Damaged: The state cannot be read.
    """
    path, start, length = folder / folders.COMMON, 0, -1
    if not path.exists():
        among = [place for key, place in metadata.objects.items() if key.startswith(_COMMON_STATE)]
        if not among:
            return None
        path, start, length = folder / among[0].file, among[0].start, among[0].length
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            file = io.BytesIO(stream.read(length))
        unknown = set(get_unsafe_globals_in_checkpoint(file)) - {"argparse.Namespace"}
        file.seek(0)
        with safe_globals([Namespace, *((_Unknown, name) for name in sorted(unknown))]):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        return None
    except Exception as error:
        raise _unreadable(path, error) from error
    if isinstance(found, list) and len(found) == 1:
        (found,) = found  # As objects among tensors lie.
    return found if isinstance(found, dict) else None


def _inspect(path: Path, config: InspectConfig) -> None:
    folder = locate(path)
    metadata = read_metadata(folder)
    check_sizes(folder, metadata)
    if config.verify:
        verify(folder)
    common = read_common(folder, metadata)
    entries = entries_of(metadata)
    console = Console(
        width=None if sys.stdout.isatty() else 120, markup=False, highlight=False, emoji=False
    )
    objects = sum(not key.startswith(_COMMON_STATE) for key in metadata.objects)
    for name, value in _facts(folder, common or {}, objects).items():
        # Not through the console, which would break a long path.
        sys.stdout.write(f"{name:<18}{value}\n")
    sys.stdout.write("\n")
    sys.stdout.flush()
    grids = _grid_rows(folder, common or {})
    if grids:
        console.print(_table("saved on", ("module", "ranks", *_AXES), grids))
    console.print(_file_table(folder, verified=config.verify))
    weights = [entry for entry in entries if entry.kind is None]
    console.print(_module_table("weights", weights, kinds=False))
    state = [entry for entry in entries if entry.kind is not None]
    if state:
        console.print(_module_table("optimizer's state", state, kinds=True))
    if config.tensors:
        width = max((len(entry.key) for entry in entries), default=0)
        for entry in entries:
            sys.stdout.write(f"{entry.key:<{width}}  {_dtype(entry)}  {list(entry.shape)}\n")


def _facts(folder: Path, common: Mapping[str, Any], objects: int) -> dict[str, Any]:
    """Facts about the checkpoint as a whole, as text."""
    arguments = common.get("args")
    iteration = common.get("iteration")
    consumed = common.get(
        "consumed_train_samples", getattr(arguments, "consumed_train_samples", None)
    )
    facts = {
        "checkpoint": folder,
        "iteration": "unknown" if iteration is None else iteration,
        "consumed samples": "unknown" if consumed is None else consumed,
    }
    if common.get("grids") is not None:
        named = (getattr(arguments, name, None) for name in ("model_provider", "load_hf"))
        facts["model"] = " ".join(str(name) for name in named if name is not None) or "unknown"
    optimizer = common.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("step"), int):
        facts["updates"] = optimizer["step"]
    if objects:
        facts["other objects"] = objects
    return facts


def _grid_rows(folder: Path, common: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table rows of each grid, or of Megatron's one grid; none where it is not known."""
    grids, arguments = common.get("grids"), common.get("args")
    if grids is not None:
        try:
            specs = [ModuleGridSpec(**grid) for grid in grids.values()]
        except (AttributeError, TypeError, ValueError) as error:
            raise _unreadable(folder / folders.COMMON, error) from error
        return [
            (spec.name, spec.span, *(str(getattr(spec, axis)) for axis in _AXES)) for spec in specs
        ]
    if not hasattr(arguments, _THEIR_AXES["tp"]):
        return []
    sizes = {axis: getattr(arguments, name, None) for axis, name in _THEIR_AXES.items()}
    shown = {axis: "" if size is None else str(size) for axis, size in sizes.items()}
    return [("all", shown["ranks"], *(shown[axis] for axis in _AXES))]


def _file_table(folder: Path, *, verified: bool) -> Table:
    sizes, saved = _sizes(folder), _checksums(folder)
    rows = [
        (name, _size(size), ("matches" if verified else "saved") if name in saved else "none")
        for name, size in sizes.items()
    ]
    return _table(
        f"files: {len(sizes)}, {_size(sum(sizes.values()))}", ("file", "size", "checksum"), rows
    )


def _module_table(title: str, entries: list[StoredEntry], *, kinds: bool) -> Table:
    by_module: dict[str, list[StoredEntry]] = {}
    for entry in entries:
        by_module.setdefault(entry.module, []).append(entry)
    rows = []
    for module in (*_MODULES, *sorted(set(by_module) - set(_MODULES))):
        held = by_module.pop(module, None)
        if held is not None:
            rows.append(_module_row(module, held, kinds=kinds))
    if len(rows) > 1:
        rows.append(_module_row("in all", entries, kinds=kinds))
    columns = ("module", "tensors", "elements" if kinds else "parameters", "size", "dtypes")
    return _table(title, (*columns, "kinds") if kinds else columns, rows)


def _module_row(name: str, entries: list[StoredEntry], *, kinds: bool) -> tuple[str, ...]:
    row = (
        name,
        f"{len(entries):,}",
        f"{sum(entry.numel for entry in entries):,}",
        _size(sum(entry.bytes for entry in entries)),
        ", ".join(sorted({_dtype(entry) for entry in entries})),
    )
    return (*row, ", ".join(sorted({entry.kind or "" for entry in entries}))) if kinds else row


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        text = column in ("module", "file", "dtypes", "kinds", "checksum", "ranks")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, by name."""
    return {name: (folder / name).stat().st_size for name in folders.files_of(folder)}


def _checksums(folder: Path) -> Mapping[str, folders.Checksum]:
    """Checksums by file; empty where none were saved."""
    if not (folder / folders.CHECKSUMS).exists():
        return {}
    try:
        return folders.read_checksums(folder)
    except ValueError as error:
        raise Damaged(str(error)) from error


def _unreadable(path: Path, error: Exception) -> Damaged:
    # What torch says of it may be many lines long.
    first = str(error).strip().partition("\n")[0]
    return Damaged(
        f"{path} cannot be read ({type(error).__name__}: {first}): the checkpoint is damaged"
    )


def _dtype(entry: StoredEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _size(number: int) -> str:
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{number} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"
