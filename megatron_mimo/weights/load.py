"""Filling a module from a folder of weights, by a table of names."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from megatron_mimo.weights.folder import WeightFolder, require_names
from megatron_mimo.weights.shards import full_shape, is_expert, take_shard
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
    read: Callable[[str], Tensor] | None = None,
    optional: Iterable[str] = (),
) -> None:
    """Copy this rank's shard of each weight from a folder; one whole weight is in memory at a time.

    Args:
        module: What is filled: its parameters, and those of its buffers that the table has.
        table: Every weight of the whole model.
        folder: The weights.
        table_name: A parameter's name in the table, from its name in the module.
        tp: This rank's place among those that share a dense weight.
        expt_tp: Its place among those that share an expert's.
        read: Reads a tensor by name; by default from the folder as it is.
        optional: Tensors that the folder may hold beside the table's.

    Raises:
        ValueError: A weight is missing, unexpected or of another shape; lists them.
    """
    entries = {entry.ours: entry for entry in table}
    wanted = {name for entry in entries.values() for name in entry.theirs}
    require_names(folder.path, wanted, folder.names, optional)
    for name, tensor in _tensors(module, entries, table_name):
        entry = entries[name]
        rank, size = expt_tp if isinstance(tensor, nn.Parameter) and is_expert(tensor) else tp
        full = entry.join([(read or folder.tensor)(theirs) for theirs in entry.theirs])
        shape = full_shape(tensor, size)
        if list(full.shape) != shape:
            raise ValueError(
                f"{folder.path}: {' + '.join(entry.theirs)} has shape {list(full.shape)}, but the "
                f"architecture of its config.json gives {entry.ours} the shape {shape}"
            )
        tensor.copy_(take_shard(full, tensor, tp_rank=rank, tp_size=size))


def export_module(
    module: nn.Module, table: Iterable[Entry], *, table_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """The weights of a whole module, one rank's all, by their names elsewhere."""
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
