"""The optimizer's tensors by weight, as a checkpoint stores them."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_mimo.optim.param_state import MOMENTS, ParamState
from megatron_mimo.optim.sharded_adam import ShardedAdam

__all__ = ["ParamState", "param_states", "set_step", "state_tensors"]


def param_states(optimizer: MegatronOptimizer | ShardedAdam) -> dict[int, ParamState]:
    """The state of each weight of which this rank owns a part, by the weight's address.

    Moments that do not exist before the first step are created as zeros.

    Args:
        optimizer: Optimizer of one module.
    """
    if isinstance(optimizer, ShardedAdam):
        return optimizer.param_states()
    found = {}
    for part in _parts(optimizer):
        _allocate(part)
        for param, main in _pairs(part):
            owned = part._get_model_param_range_map(param)["param"]
            state = part.optimizer.state[main]
            tensors = {"fp32_param": main.detach()} | {name: state[name] for name in MOMENTS}
            found[param.data_ptr()] = ParamState(
                owned.start, owned.end, {name: tensor.view(-1) for name, tensor in tensors.items()}
            )
    return found


def state_tensors(optimizer: MegatronOptimizer | ShardedAdam) -> Iterator[Tensor]:
    """Moments, float32 [n], and main weights that are copies, float32 [n], that this rank owns.

    Main weights of float32 models are those of the model. Before the first step there are no
    moments.

    Args:
        optimizer: Optimizer of one module.
    """
    if isinstance(optimizer, ShardedAdam):
        yield from optimizer.state_tensors()
        return
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            yield from (value for name, value in state.items() if name in MOMENTS)
        for group in part.shard_fp32_from_float16_groups:
            yield from group


def set_step(optimizer: MegatronOptimizer | ShardedAdam, step: int) -> None:
    """Set the number of updates that the bias correction counts from."""
    if isinstance(optimizer, ShardedAdam):
        optimizer.set_step(step)
        return
    for part in _parts(optimizer):
        _allocate(part)
        inner: Any = part.optimizer
        if not _counts_by_weight(inner):
            # Fused ones count in their groups, which have no count before their first update.
            for group in inner.param_groups:
                group["step"] = step
        for state in inner.state.values():
            if "step" in state:
                # A separate tensor for each: AdamW counts in place.
                state["step"] = torch.full_like(state["step"], step)


def _parts(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """Optimizers of the dense weights, and of expert weights where these are distributed."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        assert isinstance(part, DistributedOptimizer)
        yield part


def _pairs(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight with the part of it that this rank updates.

    megatron-core's `model_param_group_index_map` is not used: it numbers weights as the gradient
    buffers hold them, while the optimizer's groups hold float32 weights first, and Mamba layers
    have both kinds.
    """
    for weights, mains in (
        (part.model_fp32_groups, part.shard_fp32_groups),
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
    ):
        for of_group, main_of_group in zip(weights, mains, strict=True):
            yield from zip(of_group, main_of_group, strict=True)


def _allocate(part: DistributedOptimizer) -> None:
    inner: Any = part.optimizer
    for group in inner.param_groups:
        for main in group["params"]:
            state = inner.state[main]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(main, dtype=torch.float32)
            if _counts_by_weight(inner) and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)


def _counts_by_weight(inner: Any) -> bool:
    """Whether an optimizer counts its updates for each weight, as torch's does."""
    return isinstance(inner, torch.optim.Adam)
