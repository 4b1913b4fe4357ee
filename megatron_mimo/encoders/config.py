"""Architectures of the vision encoder and the projector."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class VitConfig:
    """Architecture of `PackedVit`.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: H, width of a patch's embedding.
        num_attention_heads: Attention heads.
        ffn_hidden_size: Width inside the MLP.
        patch_dim: P, side of a square patch in pixels.
        max_grid: Longest side of an image in patches; sizes the position tables.
        pixel_shuffle: Merge each 2 x 2 square of patches into one row.
        layernorm_epsilon: Of every LayerNorm.
        init_method_std: Standard deviation of the initial weights.
        position_init_std: Of the position tables; near the spread of an embedded patch, so that
            position counts from the start.
    """

    num_layers: int = 2
    hidden_size: int = 128
    num_attention_heads: int = 4
    ffn_hidden_size: int = 512
    patch_dim: int = 8
    max_grid: int = 64
    pixel_shuffle: bool = True
    layernorm_epsilon: float = 1e-6
    init_method_std: float = 0.02
    position_init_std: float = 0.3

    @property
    def row_size(self) -> int:
        """Width of a row before the projector."""
        return self.hidden_size * (4 if self.pixel_shuffle else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """Architecture of `Projector`.

    Attributes:
        ffn_hidden_size: Width inside the MLP.
        layernorm_epsilon: Of the LayerNorm in front.
        init_method_std: Standard deviation of the initial weights.
    """

    ffn_hidden_size: int = 512
    layernorm_epsilon: float = 1e-6
    init_method_std: float = 0.02
