"""Architecture of the RADIO vision transformer, and of a module with it and a projector."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_mimo.media.images.config import (
    CLIP_MEAN,
    CLIP_STD,
    ImageConfig,
    PixelMean,
    PixelStd,
    RowOrder,
)
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.settings import MoreThan, Within, check_fields, check_multiple
from megatron_mimo.settings.ranges import (
    MOST_CLASS_TOKENS,
    MOST_FRAMES,
    MOST_LAYERS,
    MOST_PATCH,
    MOST_PIXELS,
    MOST_WIDTH,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RadioConfig:
    """Architecture of `RadioVit`; the defaults are those of C-RADIO v4 H.

    Attributes:
        num_layers: Number of transformer layers.
        hidden_size: Width of a token, H.
        num_attention_heads: Number of attention heads.
        ffn_hidden_size: Width inside the MLP.
        activation: Activation inside the MLP; "fast_gelu" is the tanh approximation that Megatron
            trains with.
        layernorm_epsilon: Epsilon of every LayerNorm.
        final_layernorm: Whether there is a LayerNorm after the last layer; the weights say so.
        layer_scale: Whether there is a trained scale per channel after attention and MLP; without,
            scales of a checkpoint are multiplied into the preceding weights.
        patch_dim: Side of a square patch in pixels, P.
        patch_bias: Whether the embedding of patches has a bias.
        class_token_len: Number of tokens before an image's patches, c: class tokens, then
            registers.
        num_registers: Number of these tokens that are registers; only names in checkpoints depend
            on it.
        summary_tokens: Indices of the class tokens that transformers uses as the summary of an
            image; kept for export.
        position_grid: Number of rows, and of columns, of the table of position embeddings; 128
            cover 2048 pixels.
        position_crop: Whether training uses random crops of that table, while the encoder is not
            frozen.
        pixel_shuffle: Whether four patches are merged into one row.
        row_order: Order in which four patches are merged (see `images.ImageConfig`).
        pixel_mean: Mean of each channel, in [0, 1]; zeros, with ones in `pixel_std`, leave pixels
            unchanged.
        pixel_std: Standard deviation of each channel.
        init_method_std: Standard deviation of the initial weights.
        position_init_std: Standard deviation of the initial position table; near the spread of an
            embedded patch, so that position counts from the start.
    """

    num_layers: Annotated[int, Within(1, MOST_LAYERS)] = 32
    hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 1280
    num_attention_heads: Annotated[int, Within(1, MOST_WIDTH)] = 16
    ffn_hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 5120
    activation: Literal["gelu", "fast_gelu"] = "gelu"
    layernorm_epsilon: Annotated[float, Within(1e-20, 1)] = 1e-6
    final_layernorm: bool = False
    layer_scale: bool = False
    patch_dim: Annotated[int, Within(1, MOST_PATCH)] = 16
    patch_bias: bool = False
    class_token_len: Annotated[int, Within(0, MOST_CLASS_TOKENS)] = 10
    num_registers: Annotated[int, Within(0, MOST_CLASS_TOKENS)] = 7
    summary_tokens: Annotated[tuple[int, ...], Within(0, MOST_CLASS_TOKENS)] = (0, 1)
    position_grid: Annotated[int, Within(1, MOST_PIXELS)] = 128
    position_crop: bool = False
    pixel_shuffle: bool = True
    row_order: RowOrder = "nemotron"
    pixel_mean: PixelMean = CLIP_MEAN
    pixel_std: PixelStd = CLIP_STD
    init_method_std: Annotated[float, MoreThan(0, 100)] = 0.02
    position_init_std: Annotated[float, Within(0, 100)] = 0.02

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(self, "hidden_size", "num_attention_heads")
        if self.num_registers > self.class_token_len:
            raise ValueError(
                f"num_registers is {self.num_registers}: expected 0 to class_token_len, which is "
                f"{self.class_token_len}"
            )

    def image_config(self, **mode: Any) -> ImageConfig:
        """Image processing for this architecture; `mode` has the fields that it leaves open."""
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
        """Width of a row before the projector, number of elements."""
        return self.hidden_size * (4 if self.pixel_shuffle else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoEmbeddingConfig:
    """Embedding of videos: patches of several frames at once, in place of those of an image.

    Attributes:
        frames: Number of frames that are embedded together, F.
        init_method_std: Standard deviation of the initial weights.
    """

    frames: Annotated[int, Within(2, MOST_FRAMES)] = 2
    init_method_std: Annotated[float, MoreThan(0, 100)] = 0.02

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RadioModuleConfig:
    """Architecture of a module of RADIO and a projector; each field is a part.

    Attributes:
        vision: Architecture of the vision encoder.
        projector: Architecture of the projector from its rows to the language model's width.
        video: Embedding of videos, whose tokens the vision encoder takes like those of images; None
            where the module takes images alone.
        images: Whether the module takes images; otherwise it takes videos alone.
    """

    vision: RadioConfig = field(default_factory=RadioConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    video: VideoEmbeddingConfig | None = None
    images: bool = True

    def __post_init__(self) -> None:
        if self.video is None and not self.images:
            raise ValueError("a vision module without images or videos: expected one of them")
