"""The optimizer's own tensors, by weight: what a checkpoint stores of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class ParamState:
    """What this data-parallel rank owns of one weight.

    Attributes:
        start: First element that it owns, of the flattened local weight.
        stop: Behind the last.
        tensors: "fp32_param", "exp_avg" and "exp_avg_sq" -> float32 [stop - start], the optimizer's
            own memory.
    """

    start: int
    stop: int
    tensors: dict[str, Tensor]


def param_states(optimizer: MegatronOptimizer) -> dict[int, ParamState]:
    """The state of each weight of which this rank owns something, by the weight's address.

    Moments that do not exist yet, before the first step, are made: zeros.

    Args:
        optimizer: Of one module.
    """
    found = {}
    for part in _parts(optimizer):
        _allocate(part)
        for param, main in _pairs(part):
            owned = part._get_model_param_range_map(param)["param"]
            state = part.optimizer.state[main]
            tensors = {"fp32_param": main.detach()} | {name: state[name] for name in _MOMENTS}
            found[param.data_ptr()] = ParamState(
                owned.start, owned.end, {name: tensor.view(-1) for name, tensor in tensors.items()}
            )
    return found


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set what the bias correction counts from."""
    for part in _parts(optimizer):
        _allocate(part)
        for state in part.optimizer.state.values():
            if "step" in state:
                # Each its own tensor: AdamW counts in place.
                state["step"] = torch.full_like(state["step"], step)
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = step


def _parts(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """Of dense weights, and of expert weights where they are shared out."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        assert isinstance(part, DistributedOptimizer)
        yield part


def _pairs(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight with what this rank updates of it.

    Not by megatron-core's `model_param_group_index_map`: that counts weights as the gradient
    buffers hold them, the optimizer's groups hold float32 ones first, and Mamba layers have both.
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
            for name in _MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(main, dtype=torch.float32)
            if isinstance(inner, torch.optim.Adam) and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
