"""A small model that sees, hears and watches, for demos and tests on a laptop."""

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.modules.parakeet.config import ParakeetConfig, ParakeetModuleConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio.config import (
    RadioConfig,
    RadioModuleConfig,
    VideoEmbeddingConfig,
)

# At width 128 the usual deviations give activations too small to learn from (docs/decisions.md).
_INIT_STD = 0.06


def omni_tiny() -> ModelConfig:
    """RADIO with videos, Parakeet, and a dense decoder, each of two layers of width 128."""
    projector = ProjectorConfig(
        normalization="LayerNorm",
        activation="gelu",
        ffn_hidden_size=256,
        bias=True,
        init_method_std=_INIT_STD,
    )
    return ModelConfig(
        modules={
            "encoder": RadioModuleConfig(
                vision=RadioConfig(
                    num_layers=2,
                    hidden_size=128,
                    num_attention_heads=4,
                    ffn_hidden_size=256,
                    patch_dim=8,
                    class_token_len=2,
                    num_registers=1,
                    position_grid=16,
                    init_method_std=_INIT_STD,
                    position_init_std=0.3,
                ),
                projector=projector,
                video=VideoEmbeddingConfig(frames=2, init_method_std=_INIT_STD),
            ),
            "audio": ParakeetModuleConfig(
                audio=ParakeetConfig(
                    num_layers=2,
                    hidden_size=128,
                    num_attention_heads=4,
                    ffn_hidden_size=256,
                    conv_kernel_size=5,
                    subsampling_conv_channels=32,
                    init_method_std=_INIT_STD,
                    convolution_init_std=0.3,
                ),
                audio_projector=projector,
            ),
            "llm": GptConfig(
                num_layers=2,
                hidden_size=128,
                num_attention_heads=4,
                num_query_groups=2,
                ffn_hidden_size=512,
                init_method_std=_INIT_STD,
            ),
        }
    )
