"""Models in the style of Nemotron 3: RADIO, and a hybrid of Mamba-2, experts and attention."""

from dataclasses import replace

from megatron_mimo.model.config import ModelConfig, vision_language
from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio.config import RadioConfig

_20_LAYERS = "MEMEM*EMEMEM*EMEMEM*"
_54_LAYERS = "MEMEM*EMEM*EMEM*EMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEME"

_INIT_STD = 0.0173
# At width 128 the usual deviations give activations too small to learn from (docs/decisions.md).
_TINY_INIT_STD = 0.06


def nemotron_moe_vlm_20l() -> ModelConfig:
    """RADIO-H, and a language model of 20 layers of width 2688."""
    return _large(_20_LAYERS)


def nemotron_moe_vlm_54l() -> ModelConfig:
    """RADIO-H, and a language model of 54 layers of width 2688."""
    return _large(_54_LAYERS)


def nemotron_moe_vlm_tiny() -> ModelConfig:
    """The same families of layers at a size that trains on two cores in minutes."""
    large = _large("M*EM*E")
    return large.with_parts(
        vision=replace(
            large.part("vision"),
            num_layers=2,
            hidden_size=128,
            num_attention_heads=4,
            ffn_hidden_size=512,
            patch_dim=8,
            class_token_len=2,
            num_registers=1,
            position_grid=16,
            position_crop=False,
            init_method_std=_TINY_INIT_STD,
            position_init_std=0.3,
        ),
        projector=replace(
            large.part("projector"), ffn_hidden_size=512, init_method_std=_TINY_INIT_STD
        ),
        language=HybridConfig(
            pattern="M*EM*E",
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            mamba_num_heads=8,
            mamba_head_dim=32,
            mamba_num_groups=2,
            mamba_state_dim=32,
            num_moe_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=128,
            moe_shared_expert_intermediate_size=256,
            moe_router_topk_scaling_factor=2.5,
            init_method_std=_TINY_INIT_STD,
        ),
    )


def _large(pattern: str) -> ModelConfig:
    return vision_language(
        vision=RadioConfig(
            activation="fast_gelu",
            final_layernorm=True,
            position_crop=True,
        ),
        projector=ProjectorConfig(ffn_hidden_size=20480, init_method_std=_INIT_STD),
        language=HybridConfig(
            pattern=pattern,
            hidden_size=2688,
            num_attention_heads=32,
            num_query_groups=8,
            kv_channels=128,
            mamba_num_heads=64,
            mamba_head_dim=64,
            mamba_num_groups=8,
            mamba_state_dim=128,
            num_moe_experts=128,
            moe_router_topk=6,
            moe_ffn_hidden_size=1856,
            moe_shared_expert_intermediate_size=3712,
            moe_router_topk_scaling_factor=2.5,
            moe_aux_loss_coeff=1e-4,
            init_method_std=_INIT_STD,
        ),
    )
