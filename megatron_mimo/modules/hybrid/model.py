"""The hybrid decoder over megatron-core: Mamba-2, experts, attention, MLP by a pattern."""

import math
import re
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker

from megatron_mimo.kernels.hybrid import hybrid_stack_spec
from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.language.config import ExecutionConfig
from megatron_mimo.modules.language.execution import execution_settings
from megatron_mimo.runtime.megatron_core import is_first_stage, is_last_stage, transformer_config
from megatron_mimo.weights.initial import Draw, LogOfUniform, Normal, StepBias, Uniform

_CONV_WIDTH = 4
_RESIDUAL_PROJECTION = re.compile(
    r"\.(mixer\.out_proj|self_attention\.linear_proj|linear_fc2)\.weight$"
)


def build_hybrid(
    config: HybridConfig,
    *,
    vocab_size: int,
    seq_length: int,
    pg_collection: ProcessGroupCollection,
    params_dtype: torch.dtype,
    sequence_parallel: bool,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
    **engine: Any,
) -> HybridModel:
    """Build this rank's shard of its pipeline stage.

    Args:
        config: Architecture of the module.
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Number of positions of a sequence, S.
        pg_collection: Groups of the language model's grid.
        params_dtype: Dtype of the parameters and activations.
        sequence_parallel: Whether to shard activations along the sequence between tp regions.
        execution: Recomputation, grouping and fusing of layers.
        engine: Further fields of megatron-core's TransformerConfig.

    Raises:
        ValueError: The pattern does not fit the pipeline, or a size its parallel size.
    """
    tp, pp = pg_collection.tp.size(), pg_collection.pp.size()
    for name, size in (
        ("vocabulary", vocab_size),
        ("language.mamba_num_groups", config.mamba_num_groups),
    ):
        if size % tp:
            raise ValueError(f"{name} of {size} does not divide by --llm-tp {tp}: change one")
    stages = config.stages(pp)
    # The engine's one tracker of balance losses has as many places as its first model has layers.
    set_moe_metrics_tracker(MoEMetricsTracker())
    moe = _moe(config) if "E" in config.layers else {}
    settings = transformer_config(
        pg_collection,
        params_dtype=params_dtype,
        sequence_parallel=sequence_parallel,
        num_layers=config.num_layers,
        is_hybrid_model=True,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        ffn_hidden_size=config.ffn_hidden_size,
        activation_func=squared_relu,
        normalization="RMSNorm",
        layernorm_epsilon=config.layernorm_epsilon,
        add_bias_linear=False,
        init_method_std=config.init_method_std,
        mamba_num_heads=config.mamba_num_heads,
        mamba_head_dim=config.mamba_head_dim,
        mamba_num_groups=config.mamba_num_groups,
        mamba_state_dim=config.mamba_state_dim,
        **moe,
        **execution_settings(execution, params_dtype=params_dtype, has_experts=bool(moe)),
        **engine,
    )
    model = HybridModel(
        config=settings,
        hybrid_stack_spec=hybrid_stack_spec(settings, step_floor=config.mamba_step_floor),
        vocab_size=vocab_size,
        max_sequence_length=seq_length,
        hybrid_layer_pattern="|".join(stages),
        position_embedding_type="none",
        pre_process=is_first_stage(pg_collection),
        post_process=is_last_stage(pg_collection),
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        pg_collection=pg_collection,
    )
    for layer in model.decoder.layers:
        if hasattr(layer, "mixer"):
            # The engine builds this norm with 1e-5 whatever the configuration says.
            layer.mixer.norm.eps = config.layernorm_epsilon
    return model


def hybrid_initial(name: str, config: HybridConfig) -> Draw | None:
    """Distribution of an initial weight, from the parameter's name; None for norms and skips.

    As megatron-core draws them (`MambaMixer`, and `scaled_init_method_normal` with one residual
    branch a layer).
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("conv1d_weight", "conv1d_bias"):
        bound = 1 / math.sqrt(_CONV_WIDTH)
        return Uniform(-bound, bound)
    if leaf == "dt_bias":
        return StepBias(1e-3, 1e-1)
    if leaf == "A_log":
        return LogOfUniform(1, 16)
    if leaf == "D" or "norm" in name:
        return None
    scaled = _RESIDUAL_PROJECTION.search(name) is not None
    return Normal(config.init_method_std / (math.sqrt(config.num_layers) if scaled else 1))


def _moe(config: HybridConfig) -> dict[str, Any]:
    """Fields of TransformerConfig for E layers, as Nemotron trains them."""
    return {
        "num_moe_experts": config.num_moe_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_router_topk_scaling_factor": config.moe_router_topk_scaling_factor,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_force_load_balancing": config.moe_router_force_load_balancing,
        "moe_router_bias_update_rate": config.moe_router_bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": config.moe_aux_loss_coeff,
        # Probabilities in full precision: another order of sums changes which experts are chosen.
        "moe_router_dtype": "fp32",
        "moe_router_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
    }
