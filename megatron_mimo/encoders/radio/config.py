"""Architecture of the RADIO vision transformer."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_mimo.images.config import CLIP_MEAN, CLIP_STD, ImageConfig, RowOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class RadioConfig:
    """Architecture of `RadioVit`; the defaults are those of C-RADIO v4 H.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: H, width of a token.
        num_attention_heads: Attention heads.
        ffn_hidden_size: Width inside the MLP.
        activation: Inside the MLP; "fast_gelu" is the tanh approximation that Megatron trains with.
        layernorm_epsilon: Of every LayerNorm.
        final_layernorm: A LayerNorm after the last layer; whether there is one, the weights say.
        layer_scale: A trained scale per channel behind attention and MLP; without, scales of a
            checkpoint are multiplied into the weights in front of them.
        patch_dim: P, side of a square patch in pixels.
        patch_bias: A bias in the embedding of patches.
        class_token_len: c, tokens in front of an image's patches: class tokens, then registers.
        num_registers: How many of those are registers; names in checkpoints are all that depends
            on it.
        summary_tokens: Class tokens that transformers sums an image up by; kept for export.
        position_grid: Rows and columns of the table of position embeddings; 128 are 2048 pixels.
        position_crop: Train with random crops of that table, while the encoder is not frozen.
        pixel_shuffle: Merge four patches into one row.
        row_order: Which four (see `images.ImageConfig`).
        pixel_mean: Of the channels, in [0, 1]; zeros with a `pixel_std` of ones leave pixels as
            they are.
        pixel_std: Of the channels.
        init_method_std: Standard deviation of the initial weights.
        position_init_std: Of the position table; near the spread of an embedded patch, so that
            position counts from the start.
    """

    num_layers: int = 32
    hidden_size: int = 1280
    num_attention_heads: int = 16
    ffn_hidden_size: int = 5120
    activation: Literal["gelu", "fast_gelu"] = "gelu"
    layernorm_epsilon: float = 1e-6
    final_layernorm: bool = False
    layer_scale: bool = False
    patch_dim: int = 16
    patch_bias: bool = False
    class_token_len: int = 10
    num_registers: int = 7
    summary_tokens: tuple[int, ...] = (0, 1)
    position_grid: int = 128
    position_crop: bool = False
    pixel_shuffle: bool = True
    row_order: RowOrder = "nemotron"
    pixel_mean: tuple[float, float, float] = CLIP_MEAN
    pixel_std: tuple[float, float, float] = CLIP_STD
    init_method_std: float = 0.02
    position_init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.activation not in ("gelu", "fast_gelu"):
            raise ValueError(f"activation {self.activation!r}: expected 'gelu' or 'fast_gelu'")
        if not 0 <= self.num_registers <= self.class_token_len:
            raise ValueError(
                f"num_registers is {self.num_registers}: expected 0 to class_token_len, which is "
                f"{self.class_token_len}"
            )

    def image_config(self, **mode: Any) -> ImageConfig:
        """How images become what this architecture reads; `mode` has the fields it leaves open."""
        return ImageConfig(
            patch_dim=self.patch_dim,
            pixel_shuffle=self.pixel_shuffle,
            row_order=self.row_order,
            class_token_len=self.class_token_len,
            position_grid=self.position_grid,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            **mode,
        )

    @property
    def row_size(self) -> int:
        """Width of a row before the projector."""
        return self.hidden_size * (4 if self.pixel_shuffle else 1)
