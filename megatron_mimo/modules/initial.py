"""Distributions of the initial weights of a transformer, for every family that has one."""

import math
import re

from megatron_mimo.weights.initial import Draw, Normal

_RESIDUAL_PROJECTION = re.compile(
    r"decoder\.layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)\.weight$"
)


def transformer_initial(name: str, std: float, num_layers: int) -> Draw | None:
    """Distribution of a transformer's initial weight, from the parameter's name.

    Biases, scales and norms stay as built. Projections back into the residual stream start smaller
    by sqrt(2 * layers), as in megatron-core's `scaled_init_method_normal` (GPT-2, Radford et al.
    2019).
    """
    if name.endswith((".bias", ".scale")) or "norm" in name:
        return None
    scaled = std / math.sqrt(2 * num_layers) if _RESIDUAL_PROJECTION.search(name) else std
    return Normal(scaled)
