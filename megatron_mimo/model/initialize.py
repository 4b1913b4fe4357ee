"""Initial weights that do not depend on the layout."""

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from megatron_mimo.weights.initial import Draw
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


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
