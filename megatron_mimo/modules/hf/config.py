"""Architectures of models of transformers: the contents of their config.json, and how it is cut."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_mimo.modules.hf.family import Family, family_of


@dataclass(frozen=True, kw_only=True, slots=True)
class HfTowerConfig:
    """A part of a model's encoder.

    Attributes:
        description: Contents of the model's config.json, as JSON.
        wide: Names of the weights that the folder stores in float32 although it is in another
            dtype; they stay so.
    """

    description: str
    wide: tuple[str, ...] = ()

    @property
    def fields(self) -> Mapping[str, Any]:
        """The section of the encoder in config.json."""
        section: Mapping[str, Any] = whole_config(self.description).vision_config.to_dict()
        return section

    @property
    def hidden_size(self) -> int:
        """Width of a token of the encoder."""
        return int(self.fields["hidden_size"])

    @property
    def num_layers(self) -> int:
        """Number of layers of the encoder."""
        return int(self.fields.get("num_hidden_layers") or self.fields["depth"])

    @property
    def num_attention_heads(self) -> int:
        """Number of attention heads of a layer."""
        return int(self.fields.get("num_attention_heads") or self.fields["num_heads"])

    @property
    def num_key_value_heads(self) -> int:
        """Number of heads of keys and values of a layer."""
        return int(self.fields.get("num_key_value_heads") or self.num_attention_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class HfEncoderConfig:
    """The encoder of a model of transformers, and what maps its output to rows.

    Attributes:
        vision: The vision encoder.
        projector: What maps its output to the width of the language model.
        folder: Path to the folder of the model, whose processor makes pixels of images.
    """

    vision: HfTowerConfig
    projector: HfTowerConfig
    folder: str

    @property
    def family(self) -> Family:
        """Record of the model's family."""
        return family_from(self.vision.description)


@dataclass(frozen=True, kw_only=True, slots=True)
class HfLanguageConfig:
    """The language model of a model of transformers.

    Attributes:
        description: Contents of the model's config.json, as JSON.
        wide: Names of the weights that the folder stores in float32 although it is in another
            dtype; they stay so.
        stage_layers: Number of layers of each pipeline stage; empty to balance them by their work.
    """

    description: str
    wide: tuple[str, ...] = ()
    stage_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.stage_layers and (
            min(self.stage_layers) < 1 or sum(self.stage_layers) != self.num_layers
        ):
            raise ValueError(
                f"stage_layers {','.join(map(str, self.stage_layers))}: expected numbers from 1 "
                f"that sum to {self.num_layers}, the number of layers"
            )

    @property
    def family(self) -> Family:
        """Record of the model's family."""
        return family_from(self.description)

    @property
    def text(self) -> Any:
        """Transformers' configuration of the language model."""
        return whole_config(self.description).get_text_config()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return int(self.text.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of a token's embedding."""
        return int(self.text.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary, V."""
        return int(self.text.vocab_size)

    @property
    def num_attention_heads(self) -> int:
        """Number of attention heads of a layer."""
        return int(self.text.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Smallest number of heads of keys and values of a layer."""
        return min(
            int(layer.num_key_value_heads or layer.num_attention_heads)
            for layer in self.text.per_layer_config
        )

    @property
    def num_experts(self) -> int:
        """Number of experts of a layer; 0 without any."""
        return int(getattr(self.text, "num_experts", None) or 0)

    @property
    def row_parts(self) -> int:
        """Number of vectors of the language model's width that a row consists of."""
        return self.family.row_parts(whole_config(self.description).to_dict())


def describe(config: Mapping[str, Any]) -> str:
    """The contents of a config.json in the form that configs here hold."""
    return json.dumps(config, sort_keys=True)


@cache
def family_from(description: str) -> Family:
    """The family of a model, from the contents of its config.json."""
    return family_of(json.loads(description).get("model_type"))


@cache
def whole_config(description: str) -> Any:
    """Transformers' configuration of a whole model; do not change it.

    Raises:
        ValueError: transformers does not accept the contents.
    """
    from transformers import AutoConfig

    fields = json.loads(description)
    try:
        return AutoConfig.for_model(**fields)
    except Exception as error:  # Checks of transformers raise many types.
        raise ValueError(
            f"config.json: transformers does not accept it: {' '.join(str(error).split())}"
        ) from error
