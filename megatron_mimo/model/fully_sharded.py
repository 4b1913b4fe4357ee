"""A module whose data-parallel ranks divide weights, gradients and optimizer state among them.

It is torch's FSDP2 (`fully_shard`). A rank holds a part of each weight, in float32, from which
the optimizer updates it; before a layer computes, the ranks gather its weights in the dtype that it
computes in, and afterwards they free them. Gradients are summed in float32 and never divided: the
loss of a step is a sum over target tokens, which is divided once.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.runtime import Device
from megatron_mimo.weights.shards import Held


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """What a rank holds of one weight.

    Attributes:
        name: Name in the module.
        parameter: The module's parameter between steps, float32; its gradient is here.
        main: Its elements on this rank, float32 [...], in the parameter's memory.
        values: The same in the dtype that the module computes in, as folders and checkpoints have
            it; `main` itself where that is float32.
        dimensions: Number of dimensions of the weight.
        owned: Whether this rank updates it; others of which every rank has a copy get the result.
    """

    name: str
    parameter: nn.Parameter
    main: Tensor
    values: Tensor
    dimensions: int
    owned: bool

    @property
    def gradient(self) -> Tensor | None:
        """Sum of the gradients so far, float32 [...]; None before the first."""
        gradient = self.parameter.grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient


class FullySharded:
    """Divides a stage over its data-parallel ranks, and gives it memory.

    Weights that are float32 where the others are shorter share no layer's message with them, whose
    dtype is one: each rank has a copy of them, and one rank updates it. They are few: decays of
    linear attention, some norms.

    Args:
        module: Stage without memory, a `ShardableStage`.
        group: Group of its data-parallel ranks.
        device: Device of the memory.

    Raises:
        ValueError: A weight has no rows.
    """

    def __init__(self, module: ModuleStage, group: dist.ProcessGroup, device: Device) -> None:
        self.module = module
        self._group = group
        dtype = module.config.params_dtype
        dtypes = {name: weight.dtype for name, weight in module.named_parameters()}
        copied = set()
        for name, weight in module.named_parameters():
            if not weight.dim():
                raise ValueError(
                    f"--sharding fsdp2: {name} is a single number, which has no rows to divide; "
                    f"leave --sharding out"
                )
            if _is_copied(weight, dtype):
                copied.add(weight)
            weight.data = weight.data.float()
        _shard(module, group, device, dtype, copied)
        module.materialise(device.torch)
        # Shards get the padding that messages need, and with it their last place in memory.
        module.load_state_dict({}, strict=False)
        self.weights = tuple(
            self._held(name, weight, dtypes[name]) for name, weight in module.named_parameters()
        )

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the stage's forward; shapes and dtypes are those of `ModuleStage`."""
        return self.module(*args, **named)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self.module.train(mode)
        # After a forward without a backward the outermost weights are still gathered.
        assert isinstance(self.module, FSDPModule)
        self.module.reshard()

    def zero_grad_buffer(self) -> None:
        """Clear the gradients for the next step."""
        for weight in self.weights:
            weight.parameter.grad = None

    def reduce_gradients(self) -> None:
        """Sum the gradients of weights of which every rank has a copy; the others are summed."""
        copies = [one for one in self.weights if not isinstance(one.parameter, DTensor)]
        if not copies:
            return
        found = [torch.zeros_like(w.main) if w.gradient is None else w.gradient for w in copies]
        flat = torch.cat([gradient.flatten() for gradient in found])
        dist.all_reduce(flat, group=self._group)
        parts = flat.split([gradient.numel() for gradient in found])
        for weight, part in zip(copies, parts, strict=True):
            weight.parameter.grad = part.view_as(weight.main)

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient."""
        torch._foreach_mul_([g for w in self.weights if (g := w.gradient) is not None], factor)

    @torch.no_grad()
    def publish(self) -> None:
        """After an update: send weights that one rank updates to all, and fill `values`."""
        copies = [one for one in self.weights if not isinstance(one.parameter, DTensor)]
        if copies:
            flat = torch.cat([weight.main.flatten() for weight in copies])
            dist.broadcast(flat, group=self._group, group_src=0)
            parts = flat.split([weight.main.numel() for weight in copies])
            for weight, part in zip(copies, parts, strict=True):
                weight.main.copy_(part.view_as(weight.main))
        for weight in self.weights:
            if weight.values is not weight.main:
                weight.values.copy_(weight.main)

    @torch.no_grad()
    def take_values(self) -> None:
        """After loading: set the float32 weights to `values`."""
        for weight in self.weights:
            if weight.values is not weight.main:
                weight.main.copy_(weight.values)

    def _held(self, name: str, weight: nn.Parameter, dtype: torch.dtype) -> HeldWeight:
        """Take note of what this rank has of a weight, and mark the parameter with it."""
        rank, size = self._group.rank(), self._group.size()
        if not isinstance(weight, DTensor):
            main = weight.detach()
            return HeldWeight(name, weight, main, main, weight.dim(), owned=rank == 0)
        main = weight.to_local().detach()
        values = main if dtype == torch.float32 else torch.empty_like(main, dtype=dtype)
        axis = _axis(weight, size)
        # As `Tensor.chunk` divides: the last ranks may have fewer rows, or none.
        first = min(rank * math.ceil(weight.size(axis) / size), weight.size(axis))
        weight.held_part = Held(values, axis, first)  # type: ignore[attr-defined]
        return HeldWeight(name, weight, main, values, weight.dim(), owned=main.numel() > 0)


def most_held(weight: Tensor, ranks: int, dtype: torch.dtype) -> int:
    """Largest number of elements of a weight that one of its ranks holds.

    Args:
        weight: Whole weight [...] in the dtype that it is computed with.
        ranks: Number of ranks that divide it.
        dtype: Dtype of the run.
    """
    if _is_copied(weight, dtype):
        return weight.numel()
    length = weight.size(_axis(weight, ranks))
    return weight.numel() // length * math.ceil(length / ranks)


def _is_copied(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether every rank has a copy of a weight, in a run that computes with a dtype."""
    return weight.dtype != dtype


def _axis(weight: Tensor, ranks: int) -> int:
    """Axis along which ranks divide a weight [...].

    Rows, but the last axis of stacked experts, which are few, where it divides more evenly.
    """
    uneven = weight.dim() == 3 and weight.size(0) % ranks
    return 2 if uneven and weight.size(2) % ranks == 0 else 0


def _shard(
    module: ModuleStage,
    group: dist.ProcessGroup,
    device: Device,
    dtype: torch.dtype,
    copied: set[nn.Parameter],
) -> None:
    """Divide each unit of a stage, and the rest of it together."""
    mesh = DeviceMesh.from_group(group, device.type)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        # The model's own forward decides what is float32, such as rotary frequencies.
        cast_forward_inputs=False,
    )
    every: list[nn.Module] = [*module.units, module]
    for unit in every:
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=copied,
            shard_placement_fn=lambda weight: Shard(_axis(weight, group.size())),
        )
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            # A plain sum, which gloo has too.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
