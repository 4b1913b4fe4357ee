"""Adapters of a stage from and to those of the layers of transformers' model."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mimo.modules.lora.apply import lora_adapters
from megatron_mimo.weights.shards import full_shape, take_shard
from megatron_mimo.weights.table import Entry, Tables

type Factors = tuple[Tensor, Tensor]


def layers_of(path: str, tables: Tables) -> tuple[str, ...]:
    """Paths in transformers' model of the layers that a layer of a stage consists of.

    Args:
        path: Part and path of the layer, as `lora_adapters` gives them.
        tables: Names of every weight of the module's parts.
    """
    return tuple(name.removesuffix(".weight") for name in _entry(path, tables).theirs)


def export_adapters(stage: nn.Module, tables: Tables) -> Iterator[tuple[str, Factors]]:
    """The factors A [r, in] and B [out, r] of each layer of transformers' model.

    Args:
        stage: Module with adapters that is whole in this process.
        tables: Names of every weight of the module's parts.
    """
    for path, adapter in lora_adapters(stage):
        entry = _entry(path, tables)
        firsts = adapter.lora_A.detach().chunk(adapter.num_parts)
        seconds = entry.split(adapter.lora_B.detach())
        yield from zip(layers_of(path, tables), zip(firsts, seconds, strict=True), strict=True)


@torch.no_grad()
def fill_lora(
    stage: nn.Module, tables: Tables, found: Mapping[str, Factors], tp_group: dist.ProcessGroup
) -> None:
    """Fill this rank's shards of adapters.

    Args:
        stage: Module with adapters.
        tables: Names of every weight of the module's parts.
        found: Path of a layer in transformers' model -> its factors A [r, in] and B [out, r].
        tp_group: Tensor-parallel group of the module.

    Raises:
        ValueError: A layer's factors are missing, or have another shape.
    """
    rank, size = tp_group.rank(), tp_group.size()
    for path, adapter in lora_adapters(stage):
        layers = layers_of(path, tables)
        if missing := [layer for layer in layers if layer not in found]:
            raise ValueError(f"there is no adapter of {', '.join(missing)}")
        firsts, seconds = ([found[layer][which] for layer in layers] for which in (0, 1))
        for weight, factors, join in (
            (adapter.lora_A, firsts, torch.cat),
            (adapter.lora_B, seconds, _entry(path, tables).join),
        ):
            whole = _joined(join, factors)
            wanted = full_shape(weight, size)
            if whole is None or list(whole.shape) != wanted:
                shapes = " and ".join(str(list(factor.shape)) for factor in factors)
                raise ValueError(
                    f"{' and '.join(layers)} have factors {shapes}, the model's layer needs "
                    f"{wanted}"
                )
            weight.copy_(take_shard(whole.to(weight), weight, tp_rank=rank, tp_size=size))


def _joined(join: Callable[[list[Tensor]], Tensor], factors: list[Tensor]) -> Tensor | None:
    """The factors as one; None where their shapes do not fit each other."""
    try:
        return join(factors)
    except (RuntimeError, ValueError):
        return None


def _entry(path: str, tables: Tables) -> Entry:
    part, _, layer = path.partition(".")
    (entry,) = (entry for entry in tables[part] if entry.ours == f"{layer}.weight")
    return entry
