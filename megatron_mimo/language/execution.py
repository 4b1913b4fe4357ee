"""How a language model is computed: what is recomputed, grouped and fused. Not what it computes."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_mimo.language.config import ExecutionConfig
from megatron_mimo.runtime.specs import has_fused_layers

# megatron-core recomputes these with Transformer Engine's means only.
_FUSED_PARTS = ("layernorm", "moe_act")


def execution_settings(
    execution: ExecutionConfig, *, params_dtype: torch.dtype, has_experts: bool
) -> Mapping[str, Any]:
    """Fields of megatron-core's TransformerConfig.

    Args:
        execution: As asked for.
        params_dtype: Dtype of parameters and activations.
        has_experts: Whether the model has MoE layers.

    Raises:
        ValueError: Something is asked for that Transformer Engine has, and it is absent.
    """
    fused = has_fused_layers()
    if execution.moe_grouped_gemm and not fused:
        raise ValueError(
            "--moe-grouped-gemm needs a GPU and Transformer Engine, which are absent: leave it out"
        )
    lost = [part for part in execution.recompute_modules if part in _FUSED_PARTS and not fused]
    if lost:
        raise ValueError(
            f"--recompute-modules {lost[0]} needs a GPU and Transformer Engine, which are absent: "
            "leave it out, or use --recompute-granularity full"
        )
    settings: dict[str, Any] = {
        # Its gradients are bfloat16, whatever the logits are.
        "cross_entropy_loss_fusion": params_dtype == torch.bfloat16,
        "cross_entropy_fusion_impl": "te" if fused else "native",
    }
    if has_experts:
        grouped = execution.moe_grouped_gemm
        settings["moe_grouped_gemm"] = fused if grouped is None else grouped
    if execution.recompute_granularity is not None:
        settings["recompute_granularity"] = execution.recompute_granularity
    if execution.recompute_granularity == "selective":
        settings["recompute_modules"] = list(execution.recompute_modules)
    if execution.recompute_granularity == "full":
        # Keeps the input of each layer, nothing inside it.
        settings |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return settings
