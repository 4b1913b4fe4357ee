"""How a language model is computed: recomputation, grouping and fusing, without its results."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_mimo.kernels.specs import has_fused_layers
from megatron_mimo.modules.language.config import ExecutionConfig

FUSED_PARTS = ("layernorm", "moe_act")
"""Parts that megatron-core recomputes only with Transformer Engine."""


def execution_settings(
    execution: ExecutionConfig, *, params_dtype: torch.dtype, has_experts: bool
) -> Mapping[str, Any]:
    """Fields of megatron-core's TransformerConfig.

    Args:
        execution: Settings that the flags ask for.
        params_dtype: Dtype of parameters and activations.
        has_experts: Whether the model has MoE layers.

    Raises:
        ValueError: A setting needs Transformer Engine, which is not installed.
    """
    fused = has_fused_layers()
    if execution.moe_grouped_gemm and not fused:
        raise ValueError(
            "--moe-grouped-gemm needs a GPU and Transformer Engine, which are absent: leave it out"
        )
    lost = [part for part in execution.recompute_modules if part in FUSED_PARTS and not fused]
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
