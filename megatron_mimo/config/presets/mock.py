"""A small dense ViT and a small dense GPT, for learning, tests and demos on a laptop."""

from megatron_mimo.model.config import ModelConfig, vision_language
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio.config import RadioConfig

# The usual 0.02 suits widths near 1000. At width 128 it gives activations so small that the
# language model takes hundreds of steps to use the images; 0.06 is nearer to 1 / sqrt(width).
_INIT_STD = 0.06


def mock() -> ModelConfig:
    """Two layers of width 128 on each side of a 512-wide projector."""
    return vision_language(
        vision=RadioConfig(
            num_layers=2,
            hidden_size=128,
            num_attention_heads=4,
            ffn_hidden_size=512,
            patch_dim=8,
            class_token_len=2,
            num_registers=1,
            position_grid=16,
            init_method_std=_INIT_STD,
            position_init_std=0.3,
        ),
        projector=ProjectorConfig(
            normalization="LayerNorm",
            activation="gelu",
            ffn_hidden_size=512,
            bias=True,
            init_method_std=_INIT_STD,
        ),
        language=GptConfig(
            num_layers=2,
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=512,
            init_method_std=_INIT_STD,
        ),
    )
