"""The convolution of a layer: across the rows of a clip, channel by channel."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from megatron_mimo.media.audio.packing import PackedClips
from megatron_mimo.modules.parakeet.activations import ACTIVATIONS
from megatron_mimo.modules.parakeet.batch_norm import BatchNorm
from megatron_mimo.modules.parakeet.config import ParakeetConfig
from megatron_mimo.modules.parakeet.shards import sharded


class Convolution(nn.Module):
    """A gated linear layer, a convolution over time, a batch norm, and a linear layer.

    Tensor-parallel ranks share the channels. A row without a valid frame is zero to its
    neighbours, as it is in transformers.
    """

    def __init__(
        self,
        config: ParakeetConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        width, tp = config.hidden_size, pg_collection.tp
        self.activation = ACTIVATIONS[config.activation]
        bias = config.convolution_bias

        def drawn(*shape: int, std: float = config.init_method_std) -> Tensor:
            return torch.empty(shape, dtype=params_dtype).normal_(std=std)

        def zeros(length: int) -> Tensor:
            return torch.zeros(length, dtype=params_dtype)

        # Values, then their gates: each is shared out.
        self.pointwise_in = _Linear(
            sharded(drawn(2 * width, width), tp, blocks=2),
            sharded(zeros(2 * width), tp, blocks=2) if bias else None,
        )
        self.depthwise = _Linear(
            sharded(drawn(width, config.conv_kernel_size, std=config.convolution_init_std), tp),
            sharded(zeros(width), tp) if bias else None,
        )
        self.batch_norm = BatchNorm(
            width, params_dtype, tp, pg_collection.dp if config.batch_norm == "batch" else None
        )
        self.pointwise_out = _Linear(
            sharded(drawn(width, width), tp, axis=1),
            nn.Parameter(zeros(width)) if bias else None,
        )
        self.tp_group: dist.ProcessGroup = tp

    def forward(self, x: Tensor, clips: PackedClips) -> Tensor:
        """Map normed rows [R, H] to what is added to the rows, [R, H]."""
        x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        x = F.glu(F.linear(x, self.pointwise_in.weight, self.pointwise_in.bias))
        line = _place(x, clips)
        if self.batch_norm.follows_batches:
            x = _take(_along_time(line, self.depthwise.weight, self.depthwise.bias), clips)
            x = self.batch_norm(x)
        else:
            # Running statistics are a factor and a summand, which the kernel takes in.
            factor, summand = self.batch_norm.affine()
            if self.depthwise.bias is not None:
                summand = summand + self.depthwise.bias * factor
            kernel = self.depthwise.weight * factor[:, None]
            x = _take(_along_time(line, kernel.to(x.dtype), summand.to(x.dtype)), clips)
        x, weight, bias = self.activation(x), self.pointwise_out.weight, self.pointwise_out.bias
        if self.tp_group.size() == 1:
            return F.linear(x, weight, bias)
        x = reduce_from_tensor_model_parallel_region(F.linear(x, weight), group=self.tp_group)
        return x if bias is None else x + bias


class _Linear(nn.Module):
    """Weight and bias by name; the convolution uses them."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.bias: nn.Parameter | None


def _along_time(line: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve each channel of [L, C] with its kernel [C, K]: [L-K+1, C]."""
    # As an image of one column with channels last: memory stays as it is.
    image = line[None, :, None].permute(0, 3, 1, 2)
    found = F.conv2d(image, kernel[:, None, :, None], bias, groups=line.size(1))
    return found.permute(0, 2, 3, 1)[0, :, 0]


def _place(rows: Tensor, clips: PackedClips) -> Tensor:
    line: Tensor = _Place.apply(  # type: ignore[no-untyped-call]
        rows, clips.conv_slots, clips.conv_length
    )
    return line


def _take(line: Tensor, clips: PackedClips) -> Tensor:
    rows: Tensor = _Take.apply(line, clips.conv_rows)  # type: ignore[no-untyped-call]
    return rows


class _Place(torch.autograd.Function):
    """Rows at their places of a line of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(length, rows.size(1)).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots), None, None


class _Take(torch.autograd.Function):
    """Rows of a line, none twice, so that backward only copies."""

    @staticmethod
    def forward(ctx: Any, line: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = len(line)
        return line.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        line = gradient.new_zeros(ctx.length, gradient.size(1))
        return line.index_copy_(0, places, gradient), None
