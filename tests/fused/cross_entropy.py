"""Transformer Engine's cross entropy over a sharded vocabulary, in the place of Triton kernels.

The two functions have the arguments of those in `transformer_engine.pytorch.triton.cross_entropy`;
what autograd saves and returns stays the package's own code. Shapes: logits [B, S, V / tp].
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    reduce_loss: bool,
    group: dist.ProcessGroup | None,
    ignore_idx: int,
    *overwrite_input: bool,
) -> Any:
    """The loss [B, S], and what backward needs, which differs between versions.

    Until 2.11 that is the gradient itself, written over the logits; later ones, which are told
    whether they may overwrite their input, keep logits and statistics.
    """
    assert label_smoothing == 0.0 and not reduce_loss
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    with torch.no_grad():
        local = logits.float()
        local_target = target.reshape(logits.shape[:-1]) - rank * logits.size(-1)
        inside = (local_target >= 0) & (local_target < logits.size(-1))
        chosen = local.gather(-1, local_target.clamp(0, logits.size(-1) - 1)[..., None])[..., 0]
        chosen = chosen.where(inside, torch.zeros(()))
        largest = local.amax(-1)
        if size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        total = (local - largest[..., None]).exp().sum(-1)
        if size > 1:
            dist.all_reduce(total, group=group)
            dist.all_reduce(chosen, group=group)
        log_total = largest + total.log()
        used = (target != ignore_idx).reshape(logits.shape[:-1])
        loss = (log_total - chosen) * used
        gradient = (local - log_total[..., None]).exp()
        one = torch.zeros_like(gradient).scatter_(
            -1, local_target.clamp(0, logits.size(-1) - 1)[..., None], inside.float()[..., None]
        )
        gradient = (gradient - one) * used[..., None]
        if not overwrite_input:
            return loss, logits.detach().copy_(gradient)
        # The statistics are ours: backward finds the gradient in them.
        return loss, logits.detach().clone(), gradient, target, None, rank, size


def cross_entropy_backward(saved: Tensor, *rest: Any) -> Tensor:
    """The gradient of the logits, in their dtype."""
    with torch.no_grad():
        if len(rest) <= 2:
            return saved.mul_(rest[0].reshape(saved.shape[:-1])[..., None])
        statistics, _target, _number, gradient = rest[:4]
        return saved.copy_(statistics * gradient.reshape(saved.shape[:-1])[..., None])
