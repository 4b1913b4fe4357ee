"""The architecture of a multimodal model, module by module."""

from dataclasses import dataclass, field

from megatron_mimo.encoders.config import ProjectorConfig
from megatron_mimo.encoders.radio.config import RadioConfig
from megatron_mimo.language.config import GptConfig, LanguageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of every module.

    Attributes:
        vision: The vision encoder.
        projector: From the encoder's rows into the language model's width.
        language: The language model.
    """

    vision: RadioConfig = field(default_factory=RadioConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=GptConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceConfig:
    """When data-parallel ranks of the language model exchange gradients and weights.

    The encoder's exchange theirs behind the last backward: which of its ranks have images in a
    microbatch differs, so no bucket of gradients is ready everywhere at the same time before.

    Attributes:
        overlap_grads: Reduce a bucket's gradients while the last backward still runs.
        overlap_params: Gather updated weights while the next forward already runs.
        num_buckets: Buckets of about equal size; None: by `bucket_size`.
        bucket_size: Least size of a bucket, in weights; None: 40 million, or a million for each
            rank.
        pad_buckets: Pad buckets to sizes at which NCCL is fastest.
    """

    overlap_grads: bool = False
    overlap_params: bool = False
    num_buckets: int | None = None
    bucket_size: int | None = None
    pad_buckets: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeConfig:
    """Which parts of the model are frozen.

    Attributes:
        vision: The vision encoder.
        projector: The projector.
        language: The language model.
    """

    vision: bool = False
    projector: bool = False
    language: bool = False

    @property
    def encoder_trains(self) -> bool:
        """Whether anything on the encoder's grid trains, so that gradients cross the bridge."""
        return not (self.vision and self.projector)
