"""Batch norm over the rows of all clips of a microbatch, on all data-parallel ranks, or frozen."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mimo.modules.parakeet.shards import sharded

# As torch's `BatchNorm1d`.
_EPSILON, _MOMENTUM = 1e-5, 0.1


class BatchNorm(nn.Module):
    """Batch norm of the channels of this tp rank; weight and bias always train.

    The running statistics are those of all channels, equal on all ranks.

    Args:
        channels: Number of channels of all tp ranks, H.
        params_dtype: Dtype of weight and bias; statistics are float32.
        tp_group: Ranks that share the channels.
        dp_group: Ranks whose clips have common statistics; None keeps the running ones.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        params_dtype: torch.dtype,
        tp_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.tp_group, self.dp_group = tp_group, dp_group
        self.weight = sharded(torch.ones(channels, dtype=params_dtype), tp_group)
        self.bias = sharded(torch.zeros(channels, dtype=params_dtype), tp_group)
        self.register_buffer("running_mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(channels, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and summand of each channel by the running statistics, [C], float32 or better."""
        mean, variance = (self._own(each) for each in (self.running_mean, self.running_var))
        factor = self.weight * torch.rsqrt(variance + _EPSILON)
        return factor, self.bias - mean * factor

    @property
    def follows_batches(self) -> bool:
        """Whether statistics are those of the microbatch now; a norm that is frozen keeps its."""
        return self.training and self.dp_group is not None and self.weight.requires_grad

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise rows [R, C] by statistics of all ranks, and let the running ones follow.

        Every data-parallel rank has to call it, or `idle`.
        """
        assert self.dp_group is not None
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        number = wide.new_full((1,), len(wide))
        total = _AllReduce.apply(  # type: ignore[no-untyped-call]
            torch.cat([wide.sum(0), number]), self.dp_group
        )
        found = total[-1].detach()
        count = found.clamp(min=1)
        mean = total[:-1] / count
        centred = wide - mean
        squares = _AllReduce.apply(  # type: ignore[no-untyped-call]
            centred.square().sum(0), self.dp_group
        )
        variance = squares / count
        with torch.no_grad():
            # As torch: the running variance is that of a sample.
            of_sample = squares / (count - 1).clamp(min=1)
            self._follow(mean, of_sample, found)
        normed = centred * torch.rsqrt(variance + _EPSILON)
        return torch.addcmul(self.bias.to(normed), normed, self.weight.to(normed)).to(rows.dtype)

    def idle(self, *, backward: bool) -> None:
        """Do the part of a rank without rows in a forward or backward of the others."""
        if not self.follows_batches:
            return
        if not backward:
            with torch.no_grad():
                self(self.weight.new_zeros(0, len(self.weight)))
            return
        assert self.dp_group is not None
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        # Gradients of the squares, then those of the sums and of the number of rows.
        for values in (len(self.weight), len(self.weight) + 1):
            _summed(self.weight.new_zeros(values, dtype=wide), self.dp_group)

    def _follow(self, mean: Tensor, variance: Tensor, rows: Tensor) -> None:
        some = rows > 0
        for running, found in ((self.running_mean, mean), (self.running_var, variance)):
            whole = self._whole(found).to(running.dtype)
            running.lerp_(whole, _MOMENTUM * some.to(running.dtype))
        self.num_batches_tracked.add_(some)

    def _own(self, whole: Tensor) -> Tensor:
        """The part [C] of this rank of values of all channels [H]."""
        size = self.tp_group.size()
        return whole if size == 1 else whole.chunk(size)[self.tp_group.rank()]

    def _whole(self, own: Tensor) -> Tensor:
        """Values of all channels [H], from each rank's [C]."""
        if self.tp_group.size() == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.tp_group.size())]
        dist.all_gather(parts, own.contiguous(), group=self.tp_group)
        return torch.cat(parts)


class _AllReduce(torch.autograd.Function):
    """Sum over ranks, of values and of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
