"""Experts of a model of transformers divided over the ranks of an expert-parallel group.

Every rank of the group gathers the tokens of all, computes its own experts on those that chose
them, and the results are summed back to where the tokens came from: as much traffic as there are
ranks, in two collectives whose sizes everyone knows.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    # Layers are counted with the flags, before megatron-core may be imported.
    from megatron.core.process_groups_config import ProcessGroupCollection


def divide_experts(language: nn.Module, pg: "ProcessGroupCollection") -> None:
    """Keep this rank's experts of every MoE layer of a model without memory.

    Args:
        language: Language model with shapes alone.
        pg: Groups of its grid.
    """
    if pg.ep.size() == 1:
        return
    assert pg.expt_tp.size() == pg.tp.size(), "the adapter refuses other sizes"
    for _, experts in expert_layers(language):
        number: Any = experts.num_experts
        own = number // pg.ep.size()
        for weight, parameter in list(experts.named_parameters(recurse=False)):
            piece = nn.Parameter(parameter.data[:own], requires_grad=parameter.requires_grad)
            experts._parameters[weight] = piece
        experts.num_experts = own
        # transformers then takes numbers from `num_experts` on for experts of other ranks.
        experts._is_expert_parallel = True  # type: ignore[assignment]
        _mark(experts)
        experts.forward = _Dispatched(experts.forward, own, pg.ep)


def expert_layers(language: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold the weights of all experts of a layer in one tensor each."""
    return [
        (name, module)
        for name, module in language.named_modules()
        if hasattr(module, "num_experts") and hasattr(module, "gate_up_proj")
    ]


def _mark(experts: nn.Module) -> None:
    """Marks of megatron-core: these weights have data-parallel groups of their own."""
    for parameter in experts.parameters(recurse=False):
        parameter.allreduce = False  # type: ignore[attr-defined]
        # The axis of experts, for checkpoints and folders.
        parameter.expert_axis = 0  # type: ignore[attr-defined]


class _Dispatched:
    """Forward of the experts of a rank on the tokens of all ranks of a group."""

    def __init__(self, forward: Any, own: int, group: dist.ProcessGroup) -> None:
        self._forward, self._own, self._group = forward, own, group

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As transformers' experts: hidden [T, H], chosen int64 [T, k] and weights [T, k]."""
        from megatron.core.tensor_parallel.mappings import (
            gather_from_sequence_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        group = self._group
        tokens = gather_from_sequence_parallel_region(hidden, group=group)
        shares = gather_from_sequence_parallel_region(weights, group=group)
        numbers = chosen.new_empty(chosen.size(0) * group.size(), chosen.size(1))
        dist.all_gather_into_tensor(numbers, chosen.contiguous(), group=group)
        first = group.rank() * self._own
        local = numbers - first
        mine = (local >= 0) & (local < self._own)
        local = torch.where(mine, local, self._own)
        found = self._forward(tokens, local, shares * mine)
        result: Tensor = reduce_scatter_to_sequence_parallel_region(found, group=group)
        return result
