"""Which part of a whole weight a rank holds."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Held:
    """What a data-parallel rank holds of a whole weight, where replicas divide weights.

    Attributes:
        values: Its part [...] of the weight, in the dtype that the module computes in.
        axis: Axis along which the weight is divided.
        first: Index along that axis of the part's first element in the whole weight.
    """

    values: Tensor
    axis: int
    first: int

    @property
    def last(self) -> int:
        """Index along the axis after the part's last element."""
        return self.first + self.values.size(self.axis)


def held_part(parameter: Tensor) -> Held | None:
    """What this rank holds of a parameter [...]; None where it holds all of it."""
    found: Held | None = getattr(parameter, "held_part", None)
    return found


def shard_spans(
    length: int, parameter: Tensor, *, tp_rank: int, tp_size: int, blocks: int = 1
) -> list[tuple[int, int]]:
    """Intervals of the sharded axis of a whole weight that a rank's shard consists of.

    Args:
        length: Length of the whole weight along that axis.
        parameter: Shard [...] of the rank, of any dtype, with the marks that megatron-core sets.
        tp_rank: Rank in the group that shares the weight.
        tp_size: Size of that group.
        blocks: Number of equal weights that the whole one holds end to end, in addition to what the
            parameter states.

    Returns:
        Half-open intervals, in the order in which they lie in the shard.
    """
    sizes: list[int] | None = getattr(parameter, "partition_sizes", None)
    if sizes is None:
        blocks *= getattr(parameter, "partition_stride", 1)
        sizes = [length // (blocks * tp_size)] * blocks
    ends = list(accumulate(size * tp_size for size in sizes))
    starts = [end - size * tp_size + tp_rank * size for end, size in zip(ends, sizes, strict=True)]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def full_shape(parameter: Tensor, tp_size: int) -> list[int]:
    """Shape of the whole weight of which `parameter` [...] is a rank's shard."""
    shape, axis = list(parameter.shape), sharded_axis(parameter)
    if axis is not None:
        shape[axis] *= tp_size
    return shape


def take_shard(full: Tensor, parameter: Tensor, *, tp_rank: int, tp_size: int) -> Tensor:
    """A rank's shard [...] of a whole weight [...] of the same dtype; a view where possible.

    The whole weight is returned where the parameter is not sharded.

    Args:
        full: Whole weight [...].
        parameter: Parameter [...] that the shard is for, with the marks that megatron-core sets.
        tp_rank: Rank in the group that shares the weight.
        tp_size: Size of that group.
    """
    axis = sharded_axis(parameter)
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


def sharded_axis(parameter: Tensor) -> int | None:
    """Axis along which tensor-parallel ranks shard a parameter [...]; None if they do not."""
    # megatron-core marks sharded parameters; the marks are absent on plain torch modules.
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    axis: int = parameter.partition_dim  # type: ignore[attr-defined]
    return axis


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether a parameter belongs to an expert, which has tensor-parallel groups of its own."""
    # megatron-core's mark of what is not reduced over the dense data-parallel group.
    return not getattr(parameter, "allreduce", True)
