"""Initial weights that do not depend on the layout."""

import hashlib
import math
import re
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from megatron_mimo.weights.shards import full_shape, take_shard

_RESIDUAL_PROJECTION = re.compile(
    r"decoder\.layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)\.weight$"
)

_LAYER = re.compile(r"(.*\bdecoder\.layers\.)\d+\.")


def transformer_std(name: str, std: float, num_layers: int) -> float:
    """Standard deviation of a transformer's initial weight, by the parameter's name.

    Projections back into the residual stream start smaller by sqrt(2 * layers), as in
    megatron-core's `scaled_init_method_normal` (GPT-2, Radford et al. 2019).
    """
    return std / math.sqrt(2 * num_layers) if _RESIDUAL_PROJECTION.search(name) else std


@torch.no_grad()
def initialize_topology_invariant(
    module: nn.Module,
    *,
    name: str,
    seed: int,
    initial_std: Callable[[str], float],
    initial_name: Callable[[str], str],
    tp_group: dist.ProcessGroup,
) -> None:
    """Draw every weight matrix from (seed, its name) alone, and keep this rank's shard.

    Vectors (biases, norm weights) keep the constants that they were built with. The full matrix is
    drawn on the host, so a rank needs memory for one full matrix at a time.

    Args:
        module: Built module, with this rank's shards.
        name: Prefix of the parameters' names, unique among modules.
        seed: Run seed.
        initial_std: Standard deviation of a weight, by the parameter's name within the module.
        initial_name: The name to draw a weight by, from its own; equal names get equal weights.
        tp_group: Tensor-parallel group of the module.
    """
    for parameter_name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            continue
        full = torch.empty(full_shape(parameter, tp_group.size()), dtype=torch.float32)
        drawn_by = initial_name(_global_name(module, parameter_name))
        generator = _generator(seed, f"{name}.{drawn_by}")
        full.normal_(0.0, initial_std(parameter_name), generator=generator)
        shard = take_shard(full, parameter, tp_rank=tp_group.rank(), tp_size=tp_group.size())
        parameter.copy_(shard)


def _global_name(module: nn.Module, name: str) -> str:
    """A parameter's name with its layer counted over all pipeline stages."""
    match = _LAYER.match(name)
    if match is None:
        return name
    # Counted from 1 over all stages.
    number = cast(int, module.get_submodule(match[0].removesuffix(".")).layer_number)
    return f"{match[1]}{number - 1}.{name[match.end() :]}"


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
