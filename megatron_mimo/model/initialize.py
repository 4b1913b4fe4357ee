"""Initial weights that do not depend on the layout."""

import hashlib
import math
import re
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from megatron_mimo.weights.initial import Draw, Normal
from megatron_mimo.weights.shards import full_shape, is_expert, take_shard

_RESIDUAL_PROJECTION = re.compile(
    r"decoder\.layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)\.weight$"
)

_EXPERT = re.compile(r"local_experts\.(\d+)\.")
_LAYER = re.compile(r"(.*\bdecoder\.layers\.)\d+\.")


def transformer_initial(name: str, std: float, num_layers: int) -> Draw | None:
    """What a transformer's weight is drawn from, by the parameter's name.

    Biases, scales and norms stay as built. Projections back into the residual stream start smaller
    by sqrt(2 * layers), as in megatron-core's `scaled_init_method_normal` (GPT-2, Radford et al.
    2019).
    """
    if name.endswith((".bias", ".scale")) or "norm" in name:
        return None
    scaled = std / math.sqrt(2 * num_layers) if _RESIDUAL_PROJECTION.search(name) else std
    return Normal(scaled)


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
        module: Built module, with this rank's shards.
        name: Prefix of the parameters' names, unique among modules.
        seed: Run seed.
        initial: What a weight is drawn from, by the parameter's name within the module; None
            leaves the constant that it was built with.
        initial_name: The name to draw a weight by, from its own; equal names get equal weights.
        tp_group: Tensor-parallel group of the module.
        expt_tp_group: Tensor-parallel group of its experts.
        first_expert: Number of the first expert that this rank holds.
    """
    for parameter_name, parameter in module.named_parameters():
        draw = initial(parameter_name)
        if draw is None:
            continue
        group = expt_tp_group if is_expert(parameter) else tp_group
        full = torch.empty(full_shape(parameter, group.size()), dtype=torch.float32)
        drawn_by = initial_name(_global_name(module, parameter_name, first_expert))
        draw.fill(full, _generator(seed, f"{name}.{drawn_by}"))
        shard = take_shard(full, parameter, tp_rank=group.rank(), tp_size=group.size())
        parameter.copy_(shard)


def _global_name(module: nn.Module, name: str, first_expert: int) -> str:
    """A parameter's name, layers counted over all pipeline stages and experts over all ranks."""
    name = _EXPERT.sub(lambda found: f"local_experts.{int(found[1]) + first_expert}.", name)
    match = _LAYER.match(name)
    if match is None:
        return name
    # Counted from 1 over all stages.
    number = cast(int, module.get_submodule(match[0].removesuffix(".")).layer_number)
    return f"{match[1]}{number - 1}.{name[match.end() :]}"


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
