"""The architecture that a folder of transformers holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.modules.hf.config import (
    HfEncoderConfig,
    HfLanguageConfig,
    HfTowerConfig,
    describe,
    whole_config,
)
from megatron_mimo.modules.hf.family import family_of
from megatron_mimo.weights.folder import WeightFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class HfFolder:
    """Description of a model, as its folder stores it.

    Attributes:
        path: Path to the folder, which also has the processor of images and the tokenizer.
        model_type: Name that transformers has for the kind of model, such as "gemma4".
        model: Architecture of the modules "encoder" and "llm".
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Longest sequence that the language model was made for, in tokens.
        image_token_id: Number of the token that a row of the encoder replaces.
        ends: Numbers of the tokens that end an answer in transformers; empty if it does not say.
        dtype: Name of the dtype that the folder says it is in, such as "bfloat16"; None if it does
            not say.
    """

    path: Path
    model_type: str
    model: ModelConfig
    vocab_size: int
    seq_length: int
    image_token_id: int
    ends: tuple[int, ...]
    dtype: str | None


def read_hf(folder: WeightFolder) -> HfFolder:
    """Read the architecture that a folder holds.

    Weights are looked at only for those that are stored in float32 although the folder is in
    another dtype; a folder without any, of which a run on paper is to be made, has none of them.

    Raises:
        ValueError: The folder holds another kind of model, or one with unsupported parts; the
            message names the field.
    """
    from megatron_mimo.modules.hf.cut import meta_model
    from megatron_mimo.modules.hf.weights import stored_dtype, wide_weights

    found, where = folder.config, folder.config_name
    family = family_of(found.get("model_type"), where)
    if found.get("quantization_config") is not None:
        raise ValueError(
            f"{where}: quantization_config is there, only weights that are not quantized are "
            f"supported"
        )
    text = describe(found)
    whole = whole_config(text)
    language = whole.get_text_config()
    _require_no_dropout({"text_config": language, "vision_config": whole.vision_config}, where)
    _require_no_balancing(language, where)
    image_token_id = getattr(whole, family.image_token, None)
    if not isinstance(image_token_id, int) or not 0 <= image_token_id < language.vocab_size:
        raise ValueError(
            f"{where}: {family.image_token} is {image_token_id!r}, expected a token from 0 to "
            f"{language.vocab_size - 1}"
        )
    wide = wide_weights(folder, found, meta_model(text)) if folder.has_weights else ()
    tower = HfTowerConfig(description=text, wide=wide)
    return HfFolder(
        path=folder.path,
        model_type=family.model_type,
        model=ModelConfig(
            modules={
                "encoder": HfEncoderConfig(vision=tower, projector=tower, folder=str(folder.path)),
                "llm": HfLanguageConfig(description=text, wide=wide),
            }
        ),
        vocab_size=language.vocab_size,
        seq_length=int(getattr(language, "max_position_embeddings", 4096)),
        image_token_id=image_token_id,
        ends=_ends(folder.path),
        dtype=stored_dtype(found),
    )


def _ends(folder: Path) -> tuple[int, ...]:
    """The ends of an answer that generation_config.json names."""
    path = folder / "generation_config.json"
    try:
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; take it from the model again") from error
    several = found if isinstance(found, list) else [found]
    return tuple(token for token in several if isinstance(token, int))


def _require_no_dropout(sections: Mapping[str, Any], where: str) -> None:
    """Refuse what leaves out random parts in training: no two layouts would draw the same.

    Raises:
        ValueError: A rate is above 0.
    """
    for section, config in sections.items():
        for name, rate in config.to_dict().items():
            if "drop" in name and isinstance(rate, int | float) and rate > 0:
                raise ValueError(
                    f"{where}: {section}.{name} is {rate}, which is not supported: set it to 0"
                )


def _require_no_balancing(language: Any, where: str) -> None:
    """Refuse a loss that transformers adds to that of the tokens, and a stage here does not.

    Raises:
        ValueError: Routers are to be balanced.
    """
    if getattr(language, "output_router_logits", False):
        raise ValueError(
            f"{where}: text_config.output_router_logits is true, with which transformers adds a "
            f"balancing loss of experts that is not supported: set it to false"
        )
