"""Initial weights that do not depend on the layout."""

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from megatron_mimo.modules.lora.apply import lora_adapters
from megatron_mimo.weights.initial import Draw, Uniform
from megatron_mimo.weights.names import separate_name, table_name
from megatron_mimo.weights.shards import full_shape, is_expert, take_shard


@torch.no_grad()
def initialize_topology_invariant(
    module: nn.Module,
    *,
    name: str,
    seed: int,
    initial: Callable[[str], Draw | None],
    initial_name: Callable[[str], str],
    tp_group: dist.ProcessGroup,
    expt_tp_group: dist.ProcessGroup,
    first_expert: int = 0,
) -> None:
    """Draw every weight from (seed, its name) alone, and keep this rank's shard.

    The full weight is drawn on the host, so a rank needs memory for one full weight at a time.

    Args:
        module: Module with this rank's shards.
        name: Prefix of the parameters' names, unique among modules.
        seed: Seed of the run.
        initial: Function that returns the distribution of a weight from its name within the
            module, as separate layers have it; None keeps the constant that it was built with.
        initial_name: Function that returns the name to draw a weight by from its name in the whole
            model; equal names get equal weights.
        tp_group: Tensor-parallel group of the module.
        expt_tp_group: Tensor-parallel group of its experts.
        first_expert: Number of the first expert that this rank holds.
    """
    for parameter_name, parameter in module.named_parameters():
        draw = initial(separate_name(parameter_name))
        if draw is None:
            continue
        group = expt_tp_group if is_expert(parameter) else tp_group
        full = torch.empty(full_shape(parameter, group.size()), dtype=torch.float32)
        drawn_by = initial_name(table_name(module, parameter_name, first_expert=first_expert))
        draw.fill(full, _generator(seed, f"{name}.{drawn_by}"))
        shard = take_shard(full, parameter, tp_rank=group.rank(), tp_size=group.size())
        parameter.copy_(shard)


@torch.no_grad()
def initialize_lora(
    module: nn.Module, *, name: str, seed: int, tp_group: dist.ProcessGroup
) -> None:
    """Draw each adapter's first factor from (seed, its name) alone; the second stays zero.

    As peft draws it: `kaiming_uniform_(a=sqrt(5))`, between the roots of one over the inputs.

    Args:
        module: Module with adapters.
        name: Prefix of the adapters' names, unique among modules.
        seed: Seed of the run.
        tp_group: Tensor-parallel group of the module.
    """
    for path, adapter in lora_adapters(module):
        first, size = adapter.lora_A, tp_group.size()
        full = torch.empty(full_shape(first, size), dtype=torch.float32)
        bound = adapter.fan_in**-0.5
        Uniform(-bound, bound).fill(full, _generator(seed, f"{name}.lora.{path}"))
        first.copy_(take_shard(full, first, tp_rank=tp_group.rank(), tp_size=size))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
