"""Architecture of the Parakeet encoder, and of a module with it and a projector."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.settings import MoreThan, Within, check_fields, check_multiple
from megatron_mimo.settings.ranges import MOST_LAYERS, MOST_WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class ParakeetConfig:
    """Architecture of `ParakeetEncoder`; the defaults are those of Nemotron Omni's encoder.

    There is no dropout, and no layer is left out at random.

    Attributes:
        num_layers: Number of layers.
        hidden_size: Width of a row, H.
        num_attention_heads: Number of attention heads.
        ffn_hidden_size: Width inside the two MLPs of a layer.
        activation: Activation inside the MLPs, and after the convolution of a layer.
        attention_bias: Whether linear layers of attention and MLPs have biases.
        convolution_bias: Whether convolutions of the layers have biases.
        conv_kernel_size: Number of rows that the convolution of a layer covers, odd.
        subsampling_factor: Number of mel frames that become one row: a power of two.
        subsampling_conv_channels: Number of channels of the convolutions before the layers.
        num_mel_bins: Number of mel features of a frame.
        scale_input: Whether rows are multiplied by the root of their width before the layers.
        batch_norm: Statistics that the batch norm of a layer uses in training: "running" keeps
            those of the weights; "batch" takes those of the clips of a microbatch, on all
            data-parallel ranks, and follows them with the running ones. With "batch" a curve
            depends on the layout, since microbatches do.
        init_method_std: Standard deviation of the initial weights of linear layers.
        convolution_init_std: Standard deviation of those of convolutions over time, and of what
            lies between the ones before the layers: a kernel has few inputs, nine in the first.
    """

    num_layers: Annotated[int, Within(1, MOST_LAYERS)] = 24
    hidden_size: Annotated[int, Within(2, MOST_WIDTH)] = 1024
    num_attention_heads: Annotated[int, Within(1, MOST_WIDTH)] = 8
    ffn_hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 4096
    activation: Literal["silu", "gelu", "relu"] = "silu"
    attention_bias: bool = False
    convolution_bias: bool = True
    conv_kernel_size: Annotated[int, Within(1, 1001)] = 9
    subsampling_factor: Annotated[int, Within(2, 64)] = 8
    subsampling_conv_channels: Annotated[int, Within(1, MOST_WIDTH)] = 256
    num_mel_bins: Annotated[int, Within(1, MOST_WIDTH)] = 80
    scale_input: bool = False
    batch_norm: Literal["running", "batch"] = "running"
    init_method_std: Annotated[float, MoreThan(0, 100)] = 0.02
    convolution_init_std: Annotated[float, MoreThan(0, 100)] = 0.02

    def __post_init__(self) -> None:
        check_fields(self)
        # Powers of two and odd kernels, for which the data side asks as well.
        self.audio_config()
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_multiple(self, "num_mel_bins", "subsampling_factor")
        if self.hidden_size % 2:
            raise ValueError(
                f"hidden_size is {self.hidden_size}: expected an even number, for sines and "
                f"cosines of relative positions"
            )

    def audio_config(self, **mode: Any) -> AudioConfig:
        """Audio processing for this architecture; `mode` has the fields that it leaves open."""
        return AudioConfig(
            num_mel_bins=self.num_mel_bins,
            subsampling_factor=self.subsampling_factor,
            conv_kernel_size=self.conv_kernel_size,
            **mode,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParakeetModuleConfig:
    """Architecture of a module of Parakeet and a projector; each field is a part.

    Attributes:
        audio: Architecture of the audio encoder.
        audio_projector: Architecture of the projector from its rows to the language model's width.
    """

    audio: ParakeetConfig = field(default_factory=ParakeetConfig)
    audio_projector: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(ffn_hidden_size=4096)
    )
