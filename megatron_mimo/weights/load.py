"""Filling a module with weights from a folder, by a table of names."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megatron_mimo.weights.folder import WeightFolder, require_names
from megatron_mimo.weights.shards import full_shape, is_expert, shard_spans, sharded_axis
from megatron_mimo.weights.table import Entry

# A rank, and how many there are.
Place = tuple[int, int]


@torch.no_grad()
def fill_module(
    module: nn.Module,
    table: Iterable[Entry],
    folder: WeightFolder,
    *,
    table_name: Callable[[str], str],
    tp: Place,
    expt_tp: Place,
    change: Callable[[str, Tensor], Tensor] | None = None,
    optional: Iterable[str] = (),
) -> None:
    """Copy this rank's shard of each weight from a folder; nothing else is read.

    Args:
        module: Module whose parameters, and buffers that are in the table, are overwritten.
        table: Entries for every weight of the whole model.
        folder: Folder with the weights.
        table_name: Function that maps a parameter's name in the module to its name in the table.
        tp: Rank and size of the group that shares a dense weight.
        expt_tp: Rank and size of the group that shares an expert's weight.
        change: Function that maps a name, and the tensor [...] that the rank has read, to the
            tensor that is copied, of the same shape; the identity by default.
        optional: Names of tensors that the folder may hold beside those of the table.

    Raises:
        ValueError: A weight is missing, unexpected or of another shape; the message lists them.
    """
    entries = {entry.ours: entry for entry in table}
    require_table(folder, entries.values(), optional)
    for name, tensor in _tensors(module, entries, table_name):
        entry = entries[name]
        rank, size = expt_tp if isinstance(tensor, nn.Parameter) and is_expert(tensor) else tp
        _require_shape(folder, entry, full_shape(tensor, size))
        parts = [_read(folder, theirs, tensor, entry.blocks, rank, size) for theirs in entry.theirs]
        if change is not None:
            parts = [change(*named) for named in zip(entry.theirs, parts, strict=True)]
        tensor.copy_(entry.join(parts))


def require_table(
    folder: WeightFolder, table: Iterable[Entry], optional: Iterable[str] = ()
) -> None:
    """Refuse a folder whose weights are not those of a table.

    Args:
        folder: Folder with the weights.
        table: Entries for every weight that the folder has to hold.
        optional: Names of tensors that the folder may hold as well.

    Raises:
        ValueError: Weights are missing or unexpected; the message lists them.
    """
    wanted = (name for entry in table for name in entry.theirs)
    names = [map(folder.full_name, group) for group in (wanted, folder.names, optional)]
    require_names(folder.path, *names)


def _require_shape(folder: WeightFolder, entry: Entry, wanted: list[int]) -> None:
    stored = [folder.shape(name) for name in entry.theirs]
    try:
        # Shapes alone go through the join.
        found = list(entry.join([torch.empty(shape, device="meta") for shape in stored]).shape)
    except (RuntimeError, ValueError):
        found = stored[0] if len(stored) == 1 else []
    if found != wanted:
        names = " + ".join(folder.full_name(name) for name in entry.theirs)
        shape = found or " + ".join(str(shape) for shape in stored)
        raise ValueError(
            f"{folder.path}: {names} has shape {shape}, but the architecture of its config.json "
            f"gives {entry.ours} the shape {wanted}"
        )


def _read(
    folder: WeightFolder, name: str, shard: Tensor, blocks: int, rank: int, size: int
) -> Tensor:
    """The part of a stored tensor that a rank's shard consists of."""
    axis = sharded_axis(shard)
    if axis is None or size == 1:
        return folder.tensor(name)
    length = folder.shape(name)[axis]
    spans = shard_spans(length, shard, tp_rank=rank, tp_size=size, blocks=blocks)
    pieces = [folder.span(name, axis, *span) for span in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def as_stored(exported: Mapping[str, Tensor], folder: WeightFolder) -> Iterator[tuple[str, Tensor]]:
    """Exported weights in the form of the folder that they were read from.

    A weight that has not changed since it was read comes out bit for bit as it is stored, even
    where the module holds it in a shorter dtype; any other weight comes out in its stored dtype.

    Args:
        exported: Whole tensors [...] by name.
        folder: Folder that the module was filled from; it has every name.

    Yields:
        Name and tensor [...], in the dtype of the folder.
    """
    for name, tensor in exported.items():
        stored = folder.tensor(name)
        same = stored.to(tensor.dtype).equal(tensor.cpu())
        yield name, stored if same else tensor.to(stored.dtype)


def export_module(
    module: nn.Module, table: Iterable[Entry], *, table_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """Whole weights [...] of a module that is not sharded, by the names that the table gives."""
    entries = {entry.ours: entry for entry in table}
    exported: dict[str, Tensor] = {}
    for name, tensor in _tensors(module, entries, table_name):
        entry = entries[name]
        exported |= dict(zip(entry.theirs, entry.split(tensor.detach()), strict=True))
    return exported


def _tensors(
    module: nn.Module, entries: Mapping[str, Entry], table_name: Callable[[str], str]
) -> list[tuple[str, Tensor]]:
    """Parameters, and buffers that the table has, by their names there."""
    found: list[tuple[str, Tensor]] = [
        (table_name(name), parameter) for name, parameter in module.named_parameters()
    ]
    buffers = ((table_name(name), buffer) for name, buffer in module.named_buffers())
    return found + [(name, buffer) for name, buffer in buffers if name in entries]
