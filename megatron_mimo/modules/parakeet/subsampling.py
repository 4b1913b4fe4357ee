"""From mel frames to rows: strided convolutions over time and mel bins, without leaks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mimo.media.audio.packing import PackedClips
from megatron_mimo.modules.parakeet.config import ParakeetConfig

# Along time and bins.
_KERNEL, _STRIDE = 3, 2


class Subsampling(nn.Module):
    """Rows [R, H] of packed clips.

    Each level halves time and bins: the first with a full convolution, the others with one by
    channel and a linear layer across channels. Channels are last in memory, so that the linear
    layers and those of the rows take what they are given. Every tp rank holds the whole.
    """

    def __init__(self, config: ParakeetConfig, params_dtype: torch.dtype) -> None:
        super().__init__()
        channels = config.subsampling_conv_channels
        self.bins = config.num_mel_bins // config.subsampling_factor
        self.first = _conv(channels, params_dtype)
        others = range(config.subsampling_factor.bit_length() - 2)
        self.depthwise = nn.ModuleList(_conv(channels, params_dtype) for _ in others)
        self.pointwise = nn.ModuleList(
            nn.Linear(channels, channels, dtype=params_dtype) for _ in others
        )
        self.linear = nn.Linear(self.bins * channels, config.hidden_size, dtype=params_dtype)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                is_last = name.startswith("linear")
                std = config.init_method_std if is_last else config.convolution_init_std
                nn.init.normal_(parameter, std=std)

    def forward(self, clips: PackedClips) -> Tensor:
        """Rows [R, H] in the dtype of parameters, the shortest clip first."""
        features = clips.features.to(self.linear.weight.dtype)
        channels = self.first.weight.size(0)
        # Strides of one channel say how many would lie, and so where the result's will.
        x = features[None, :, :, None].permute(0, 3, 1, 2)
        kernel = self.first.weight.view(channels, _KERNEL, _KERNEL, 1).permute(0, 3, 1, 2)
        x = F.conv2d(x, kernel, self.first.bias, stride=_STRIDE, padding=_KERNEL // 2)
        x = _activated(x, clips.gaps[0])
        for depthwise, pointwise, gaps in zip(
            self.depthwise, self.pointwise, clips.gaps[1:], strict=True
        ):
            # What stands in gaps now is zero after the linear layer: nothing reads it before.
            x = depthwise(x)
            x = pointwise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = _activated(x, gaps)
        rows = x.permute(0, 2, 3, 1)[0].index_select(0, clips.row_slots)
        found: Tensor = self.linear(rows.flatten(1))
        return found


def _conv(channels: int, dtype: torch.dtype) -> nn.Conv2d:
    """A convolution of one channel to all, or of each by itself: both have weights [C, 1, 3, 3]."""
    return nn.Conv2d(
        channels,
        channels,
        kernel_size=_KERNEL,
        stride=_STRIDE,
        padding=_KERNEL // 2,
        groups=channels,
        dtype=dtype,
    )


def _activated(x: Tensor, gaps: Tensor) -> Tensor:
    """ReLU of [1, C, T, F], with zeros at positions `gaps` along T, in place."""
    activated: Tensor = _Activate.apply(x, gaps)  # type: ignore[no-untyped-call]
    return activated


class _Activate(torch.autograd.Function):
    """A value that is zero has no gradient, so that gaps need nothing in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gaps: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.index_fill_(2, gaps, 0)
        x.relu_()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, x, 0), None
