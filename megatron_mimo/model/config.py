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
