"""The name of a weight, whichever layers hold it and wherever they stand.

Every reader of names goes through this file: initial weights, tables of folders, checkpoints of
others.
"""

import re

from torch import nn

# Transformer Engine's layers hold the norm in front of them, or all experts of a rank.
_SEPARATE = (
    (re.compile(r"\bmixer\.in_proj\.layer_norm_"), "norm."),
    (re.compile(r"\bself_attention\.linear_qkv\.layer_norm_"), "input_layernorm."),
    (re.compile(r"\bmlp\.linear_fc1\.layer_norm_"), "pre_mlp_layernorm."),
    (
        re.compile(r"\bexperts\.(linear_fc[12])\.(weight|bias)(\d+)$"),
        r"experts.local_experts.\3.\1.\2",
    ),
)
_EXPERT = re.compile(r"\blocal_experts\.(\d+)")
_LAYER = re.compile(r"\bdecoder\.layers\.(\d+)")


def separate_name(name: str) -> str:
    """A parameter's name as layers have it that hold neither a norm nor several experts.

    Names of such layers come back unchanged.
    """
    for fused, separate in _SEPARATE:
        name = fused.sub(separate, name)
    return name


def table_name(module: nn.Module, name: str, *, first_expert: int = 0) -> str:
    """A parameter's name in the whole model: separate, layers and experts counted over all ranks.

    Args:
        module: Module that has the parameter.
        name: Name of the parameter in the module.
        first_expert: Number of the first expert that this rank holds.
    """
    layer = _LAYER.search(name)
    if layer is not None:
        # Counted from 1 over all pipeline stages.
        number = module.get_submodule(name[: layer.end()]).layer_number
        start, end = layer.span(1)
        name = f"{name[:start]}{int(number) - 1}{name[end:]}"  # type: ignore[arg-type]
    return _EXPERT.sub(
        lambda found: f"local_experts.{int(found[1]) + first_expert}", separate_name(name)
    )
