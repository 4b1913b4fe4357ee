"""Architecture and image processing of a folder, to and from its JSON files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mimo.media.images import ImageConfig
from megatron_mimo.model.config import ModelConfig, vision_language
from megatron_mimo.model.omni.fields import FAMILIES, OMNI, require_carried
from megatron_mimo.model.omni.parts import cut, field, holds_norm_of_layers
from megatron_mimo.model.omni.processor import (
    MAX_PATCHES,
    MERGE,
    MIN_PATCHES,
    read_max_patches,
    read_processing,
    write_processor,
)
from megatron_mimo.modules.hybrid import weights as language_weights
from megatron_mimo.modules.hybrid.adapter import HybridAdapter
from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio import weights as radio_weights
from megatron_mimo.modules.radio.adapter import RadioAdapter
from megatron_mimo.modules.radio.config import RadioConfig
from megatron_mimo.weights.folder import WeightFolder

# The second is what folders published before transformers had the model say.
_MODEL_TYPES = ("nemotron_h_omni", "NemotronH_Nano_Omni_Reasoning_V3")
# Number of frames that transformers' embedding of video takes at once.
FRAMES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniConfig:
    """Description of a model, as its folder stores it.

    Attributes:
        model: Architecture; its vision part says how pixels are normalised.
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Longest sequence that the language model was made for, in tokens.
        image_token_id: Number of the token that a row of the encoder replaces.
        min_patches: Smallest number of patches; an image with fewer is enlarged.
        max_patches: Largest number of patches; an image with more is shrunk; 0 is uncapped.
    """

    model: ModelConfig
    vocab_size: int
    seq_length: int
    image_token_id: int
    min_patches: int = MIN_PATCHES
    max_patches: int = MAX_PATCHES

    def image_config(self) -> ImageConfig:
        """How images of any size become patches."""
        vision: RadioConfig = self.model.part("vision")
        return vision.image_config(
            grid_rule="nemotron-omni", min_patches=self.min_patches, max_patches=self.max_patches
        )


def is_omni(folder: WeightFolder) -> bool:
    """Whether a folder says that it holds such a model."""
    return folder.config.get("model_type") in _MODEL_TYPES


def read_omni(folder: WeightFolder) -> OmniConfig:
    """Read the architecture that a folder holds, and its image processing.

    The normalisation of pixels is read from processor_config.json or preprocessor_config.json;
    where neither exists, from the section of the vision encoder.

    Raises:
        ValueError: The folder holds another kind of model, or one with unsupported parts; the
            message names the field.
    """
    found, where = folder.config, folder.config_name
    if not is_omni(folder):
        raise ValueError(
            f"{where} describes a model of type {found.get('model_type')!r}: expected "
            f"'{_MODEL_TYPES[0]}', transformers' NemotronH_Omni_Reasoning_V3"
        )
    parts = cut(folder)
    for section in (found, parts.vision.config, parts.language.config):
        if section.get("quantization_config") is not None:
            raise ValueError(
                f"{where}: quantization_config is there, only weights that are not quantized are "
                f"supported"
            )
    vision = radio_weights.read_config(parts.vision)
    # transformers trains them.
    vision = replace(vision, layer_scale=radio_weights.has_layer_scales(parts.vision))
    if holds_norm_of_layers(folder):
        raise ValueError(
            f"the weights in {folder.path} have a norm after the vision encoder, which "
            f"transformers' NemotronH_Omni_Reasoning_V3 has not"
        )
    language, vocab_size = language_weights.read_config(parts.language)
    _require(where, "downsample_ratio", found.get("downsample_ratio", MERGE), MERGE)
    _require(
        where, "vision_hidden_size", field(found, "vision_hidden_size", 1280), vision.hidden_size
    )
    processing = read_processing(folder.path)
    _require(
        f"{folder.path}: image processor",
        "patch_size",
        processing.get("patch_size", 16),
        vision.patch_dim,
        asked=bool(processing),
    )
    image_token_id = field(found, "image_token_id")
    if not isinstance(image_token_id, int) or not 0 <= image_token_id < vocab_size:
        raise ValueError(
            f"{where}: image_token_id is {image_token_id!r}, expected a token from 0 to "
            f"{vocab_size - 1}"
        )
    return OmniConfig(
        model=vision_language(
            vision=_normalised_by(processing, vision),
            projector=ProjectorConfig(ffn_hidden_size=found.get("projector_hidden_size", 4096)),
            language=language,
        ),
        vocab_size=vocab_size,
        seq_length=parts.language.config.get("max_position_embeddings", 4096),
        image_token_id=image_token_id,
        min_patches=processing.get("min_num_patches", MIN_PATCHES),
        max_patches=read_max_patches(processing),
    )


def write_omni(config: OmniConfig) -> dict[str, Any]:
    """Contents of config.json for an architecture, without audio.

    Raises:
        ValueError: transformers' model has no such part; the message names it.
    """
    language, vision = require_exportable(config.model), config.model.part("vision")
    return {
        "architectures": ["NemotronH_Omni_Reasoning_V3"],
        "model_type": _MODEL_TYPES[0],
        "vision_config": radio_weights.write_config(vision) | {"video_temporal_patch_size": FRAMES},
        "text_config": language_weights.write_config(language, config.vocab_size)
        | {
            "max_position_embeddings": config.seq_length,
            # megatron-core ends every block with a norm where the language model predicts several
            # tokens, so transformers has one after the vision encoder then. It has no layers for
            # such predictions.
            "num_nextn_predict_layers": int(vision.final_layernorm),
        },
        "audio_config": None,
        "downsample_ratio": MERGE,
        "projector_hidden_size": config.model.part("projector").ffn_hidden_size,
        "vision_hidden_size": vision.hidden_size,
        "video_temporal_patch_size": FRAMES,
        "image_token_id": config.image_token_id,
    }


def save_processor(folder: Path, config: OmniConfig) -> None:
    """Write how transformers makes patches of images, into a folder.

    Raises:
        ValueError: A file of the folder is not JSON.
    """
    vision: RadioConfig = config.model.part("vision")
    write_processor(
        folder,
        patch_dim=vision.patch_dim,
        pixel_mean=vision.pixel_mean,
        pixel_std=vision.pixel_std,
        min_patches=config.min_patches,
        max_patches=config.max_patches,
        frames=FRAMES,
    )


def is_hybrid(model: ModelConfig) -> bool:
    """Whether a model's language model is of the kind that transformers' class has."""
    return HybridAdapter().own(model.target) is not None


def require_exportable(model: ModelConfig) -> HybridConfig:
    """Refuse what transformers' model does not have; returns the language model's architecture.

    Raises:
        ValueError: transformers' model has no such field or value; the message names the field.
    """
    language = require_hybrid(model)
    sources = model.sources
    if len(sources) != 1 or RadioAdapter().own(next(iter(sources.values()))) is None:
        raise ValueError(
            f"the model has the modules {', '.join(model.modules)}: {OMNI} has one vision encoder, "
            f"RADIO, and a language model"
        )
    require_carried("vision", model.part("vision"))
    require_carried("projector", model.part("projector"))
    return language


def require_hybrid(model: ModelConfig) -> HybridConfig:
    """Refuse a language model that transformers does not have; returns its architecture.

    Raises:
        ValueError: It is of another family, or has a field of another value; the message names it.
    """
    language = HybridAdapter().own(model.target)
    if language is None:
        needs = FAMILIES.get(type(model.target)) or "such a language model"
        raise ValueError(
            f"{model.target_name} of the model is a {type(model.target).__name__}: {OMNI} would "
            f"need {needs}"
        )
    require_carried("language", language)
    return language


def _require(where: str, name: str, value: Any, supported: Any, *, asked: bool = True) -> None:
    if asked and value != supported:
        raise ValueError(f"{where}: {name} is {value!r}, only {supported!r} is supported")


def _normalised_by(processing: Mapping[str, Any], vision: RadioConfig) -> RadioConfig:
    """The vision encoder, with pixels normalised as the image processor says, where it does."""
    if not processing.get("do_normalize", True):
        return replace(vision, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))
    # The first are names of before transformers had the model.
    mean = processing.get("norm_mean", processing.get("image_mean"))
    std = processing.get("norm_std", processing.get("image_std"))
    return replace(
        vision,
        pixel_mean=vision.pixel_mean if mean is None else _three(mean),
        pixel_std=vision.pixel_std if std is None else _three(std),
    )


def _three(value: Any) -> tuple[float, float, float]:
    red, green, blue = value if isinstance(value, list) else [value] * 3
    return float(red), float(green), float(blue)
