"""Which part of a whole weight a tensor-parallel rank holds."""

from itertools import accumulate

import torch
from torch import Tensor, nn


def full_shape(parameter: Tensor, tp_size: int) -> list[int]:
    """Shape of the whole weight of which `parameter` is a rank's shard."""
    shape, axis = list(parameter.shape), _axis(parameter)
    if axis is not None:
        shape[axis] *= tp_size
    return shape


def take_shard(full: Tensor, parameter: Tensor, *, tp_rank: int, tp_size: int) -> Tensor:
    """A rank's shard of a whole weight; the whole where the parameter is not sharded."""
    axis = _axis(parameter)
    if axis is None:
        return full
    blocks = [part.chunk(tp_size, dim=axis)[tp_rank] for part in _parts(full, parameter, axis)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=axis)


def _parts(full: Tensor, parameter: Tensor, axis: int) -> tuple[Tensor, ...]:
    """The weights that a packed one holds end to end; each is sharded by itself."""
    # megatron-core says it in two ways: sizes of a rank's parts where they differ (Mamba's
    # projection into gate, channels and steps), a number of equal ones (gated linear units).
    sizes: list[int] | None = getattr(parameter, "partition_sizes", None)
    if sizes is None:
        return full.chunk(getattr(parameter, "partition_stride", 1), dim=axis)
    ranks = full.size(axis) // sum(sizes)
    ends = list(accumulate(size * ranks for size in sizes))
    return full.tensor_split(ends[:-1], dim=axis)


def _axis(parameter: Tensor) -> int | None:
    # megatron-core marks sharded parameters; the marks are absent on plain torch modules.
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    axis: int = parameter.partition_dim  # type: ignore[attr-defined]
    return axis


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether a parameter belongs to an expert, whose tensor-parallel ranks are others."""
    # megatron-core's mark of what is not reduced over the dense data-parallel group.
    return not getattr(parameter, "allreduce", True)
