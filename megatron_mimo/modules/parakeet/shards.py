"""Weights that tensor-parallel ranks share, beside those of megatron-core's layers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mimo.weights.shards import take_shard


def sharded(
    whole: Tensor, tp_group: dist.ProcessGroup, *, axis: int = 0, blocks: int = 1
) -> nn.Parameter:
    """This rank's part of a weight, with the marks that megatron-core sets.

    Args:
        whole: Whole weight [...], equal on all ranks.
        tp_group: Ranks that share it.
        axis: Axis along which it is shared out.
        blocks: Number of equal weights that it holds end to end, each of which is shared out.
    """
    marks = _marked(torch.empty(0), axis, blocks)
    shard = take_shard(whole, marks, tp_rank=tp_group.rank(), tp_size=tp_group.size())
    parameter = nn.Parameter(shard.detach().clone(memory_format=torch.contiguous_format))
    _marked(parameter, axis, blocks)
    return parameter


def _marked(tensor: Tensor, axis: int, blocks: int) -> Tensor:
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    tensor.partition_dim = axis  # type: ignore[attr-defined]
    tensor.partition_stride = blocks  # type: ignore[attr-defined]
    return tensor
