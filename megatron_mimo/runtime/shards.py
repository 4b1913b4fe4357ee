"""Which part of a whole weight a tensor-parallel rank holds."""

import torch
from torch import Tensor, nn


def full_shape(parameter: nn.Parameter, tp_size: int) -> list[int]:
    """Shape of the whole weight of which `parameter` is a rank's shard."""
    shape, axis = list(parameter.shape), _axis(parameter)
    if axis is not None:
        shape[axis] *= tp_size
    return shape


def take_shard(full: Tensor, parameter: nn.Parameter, *, tp_rank: int, tp_size: int) -> Tensor:
    """A rank's shard of a whole weight; the whole where the parameter is not sharded."""
    axis = _axis(parameter)
    if axis is None:
        return full
    # With stride s (gated linear units) a rank holds s separate pieces of the full matrix.
    stride: int = parameter.partition_stride  # type: ignore[attr-defined]
    pieces = full.chunk(tp_size * stride, dim=axis)
    return torch.cat(pieces[tp_rank::tp_size], dim=axis)


def _axis(parameter: nn.Parameter) -> int | None:
    # megatron-core marks sharded parameters; the marks are absent on plain torch modules.
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    axis: int = parameter.partition_dim  # type: ignore[attr-defined]
    return axis
