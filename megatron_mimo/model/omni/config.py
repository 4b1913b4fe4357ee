"""Architecture and image processing of a folder, to and from its JSON files."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.images import ImageConfig
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.model.config import ModelConfig, vision_language
from megatron_mimo.model.omni.fields import FAMILIES, OMNI, require_carried
from megatron_mimo.model.omni.parts import (
    OmniParts,
    Optional,
    cut,
    field,
    holds_norm_of_layers,
)
from megatron_mimo.model.omni.processor import (
    MAX_PATCHES,
    MERGE,
    MIN_PATCHES,
    read_max_patches,
    read_processing,
    write_processor,
)
from megatron_mimo.model.omni.recordings import (
    read_audio_processing,
    read_video_processing,
    write_recordings,
)
from megatron_mimo.modules.hybrid import weights as language_weights
from megatron_mimo.modules.hybrid.adapter import HybridAdapter
from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.parakeet import weights as audio_weights
from megatron_mimo.modules.parakeet.config import ParakeetModuleConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio import weights as radio_weights
from megatron_mimo.modules.radio.config import (
    RadioConfig,
    RadioModuleConfig,
    VideoEmbeddingConfig,
)
from megatron_mimo.weights.folder import WeightFolder

# The second is what folders published before transformers had the model say.
_MODEL_TYPES = ("nemotron_h_omni", "NemotronH_Nano_Omni_Reasoning_V3")
# Number of frames that transformers' embedding of videos takes at once, unless a folder says
# otherwise.
FRAMES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniConfig:
    """Description of a model, as its folder stores it.

    Attributes:
        model: Architecture; its vision part says how pixels are normalised.
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Longest sequence that the language model was made for, in tokens.
        image_token_id: Number of the token that a row of the encoder replaces.
        audio_token_id: Number of the token that a row of the audio encoder replaces; None without
            audio.
        min_patches: Smallest number of patches; an image with fewer is enlarged.
        max_patches: Largest number of patches; an image with more is shrunk; 0 is uncapped.
        videos: How a video becomes frames and patches; None without videos.
        video_pruning_rate: Fraction of the rows of a video that is left out where the model
            answers; training sees all of them.
        audio: How a clip becomes mel features; None without audio.
    """

    model: ModelConfig
    vocab_size: int
    seq_length: int
    image_token_id: int
    audio_token_id: int | None = None
    min_patches: int = MIN_PATCHES
    max_patches: int = MAX_PATCHES
    videos: VideoConfig | None = None
    audio: AudioConfig | None = None
    video_pruning_rate: float = 0.0

    def image_config(self) -> ImageConfig:
        """How images of any size become patches."""
        vision: RadioConfig = self.model.part("vision")
        return vision.image_config(
            grid_rule="nemotron-omni", min_patches=self.min_patches, max_patches=self.max_patches
        )


def is_omni(folder: WeightFolder) -> bool:
    """Whether a folder says that it holds such a model."""
    return folder.config.get("model_type") in _MODEL_TYPES


def read_omni(folder: WeightFolder, without: Collection[Optional] = ()) -> OmniConfig:
    """Read the architecture that a folder holds, and its processing of images, videos and clips.

    The normalisation of pixels is read from processor_config.json or preprocessor_config.json;
    where neither exists, from the section of the vision encoder.

    Args:
        folder: Folder of the whole model.
        without: Parts that are left out, if the folder has them.

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
    image_token_id = _token_id(found, where, "image_token_id", vocab_size)
    normalised = _normalised_by(processing, vision)
    video = None if "video" in without else _video(folder, parts)
    audio = None if "audio" in without else _audio(parts)
    return OmniConfig(
        model=vision_language(
            vision=normalised,
            projector=ProjectorConfig(ffn_hidden_size=found.get("projector_hidden_size", 4096)),
            language=language,
            video=video,
            audio=audio,
        ),
        vocab_size=vocab_size,
        seq_length=parts.language.config.get("max_position_embeddings", 4096),
        image_token_id=image_token_id,
        audio_token_id=None
        if audio is None
        else _token_id(found, where, "audio_token_id", vocab_size),
        min_patches=processing.get("min_num_patches", MIN_PATCHES),
        max_patches=read_max_patches(processing),
        videos=None if video is None else _videos(folder, video, normalised),
        audio=None if audio is None else read_audio_processing(folder.path),
        video_pruning_rate=_pruning_rate(found, where),
    )


def _pruning_rate(found: Mapping[str, Any], where: str) -> float:
    rate = found.get("video_pruning_rate") or 0.0
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(
            f"{where}: video_pruning_rate is {rate!r}, expected a fraction from 0 to below 1"
        )
    return float(rate)


def _token_id(found: Mapping[str, Any], where: str, name: str, vocab_size: int) -> int:
    number = field(found, name)
    if not isinstance(number, int) or not 0 <= number < vocab_size:
        raise ValueError(
            f"{where}: {name} is {number!r}, expected a token from 0 to {vocab_size - 1}"
        )
    return number


def _video(folder: WeightFolder, parts: OmniParts) -> VideoEmbeddingConfig | None:
    """The embedding of videos that a folder has weights of."""
    if "video" not in parts.optional:
        return None
    where, given = folder.config_name, folder.config.get("video_temporal_patch_size", FRAMES)
    if not isinstance(given, int) or given < 2:
        raise ValueError(
            f"{where}: video_temporal_patch_size is {given!r}, expected two frames or more"
        )
    return VideoEmbeddingConfig(frames=given)


def _videos(folder: WeightFolder, video: VideoEmbeddingConfig, vision: RadioConfig) -> VideoConfig:
    """How a video becomes frames, which have to become patches as images do."""
    of_images = VideoConfig(
        temporal_patch=video.frames,
        patch_dim=vision.patch_dim,
        pixel_mean=vision.pixel_mean,
        pixel_std=vision.pixel_std,
    )
    videos = read_video_processing(folder.path, of_images)
    for name, attribute in (
        ("norm_mean", "pixel_mean"),
        ("norm_std", "pixel_std"),
        ("patch_size", "patch_dim"),
        ("video_temporal_patch_dim", "temporal_patch"),
    ):
        found, wanted = getattr(videos, attribute), getattr(of_images, attribute)
        if found != wanted:
            raise ValueError(
                f"{folder.path}: the video processor's {name} is {found}, the model and its images "
                f"have {wanted}: expected the same; --load-hf-without video leaves videos out"
            )
    return videos


def _audio(parts: OmniParts) -> ParakeetModuleConfig | None:
    """The audio encoder that a folder has weights of, and its projector."""
    if "audio" not in parts.optional:
        return None
    section, where = parts.audio.config, parts.audio.config_name
    width = section.get("projection_hidden_size")
    if not isinstance(width, int):
        raise ValueError(
            f"{where}: projection_hidden_size is {width!r}, expected the width of the projector"
        )
    return ParakeetModuleConfig(
        audio=audio_weights.read_config(section, where),
        audio_projector=ProjectorConfig(
            ffn_hidden_size=width, bias=bool(section.get("projection_bias", False))
        ),
    )


def write_omni(config: OmniConfig) -> dict[str, Any]:
    """Contents of config.json for an architecture.

    Raises:
        ValueError: transformers' model has no such part; the message names it.
    """
    language, vision = require_exportable(config.model), config.model.part("vision")
    video = config.model.parts.get("video")
    frames = FRAMES if video is None else video.frames
    audio = None if "audio" not in config.model.parts else _write_audio(config.model)
    described = {
        "architectures": ["NemotronH_Omni_Reasoning_V3"],
        "model_type": _MODEL_TYPES[0],
        "vision_config": radio_weights.write_config(vision) | {"video_temporal_patch_size": frames},
        "text_config": language_weights.write_config(language, config.vocab_size)
        | {
            "max_position_embeddings": config.seq_length,
            # megatron-core ends every block with a norm where the language model predicts several
            # tokens, so transformers has one after the vision encoder then. It has no layers for
            # such predictions.
            "num_nextn_predict_layers": int(vision.final_layernorm),
        },
        "audio_config": audio,
        "downsample_ratio": MERGE,
        "projector_hidden_size": config.model.part("projector").ffn_hidden_size,
        "vision_hidden_size": vision.hidden_size,
        "video_temporal_patch_size": frames,
        "image_token_id": config.image_token_id,
    }
    if config.audio_token_id is not None:
        described["audio_token_id"] = config.audio_token_id
    return described


def _write_audio(model: ModelConfig) -> dict[str, Any]:
    projector: ProjectorConfig = model.part("audio_projector")
    return audio_weights.write_config(model.part("audio")) | {
        "projection_hidden_size": projector.ffn_hidden_size,
        "projection_bias": projector.bias,
    }


def save_processor(folder: Path, config: OmniConfig) -> None:
    """Write how transformers processes images, videos and clips, into a folder.

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
    write_recordings(folder, video=config.videos, audio=config.audio)


def is_hybrid(model: ModelConfig) -> bool:
    """Whether a model's language model is of the kind that transformers' class has."""
    return HybridAdapter().own(model.target) is not None


def require_exportable(model: ModelConfig) -> HybridConfig:
    """Refuse what transformers' model does not have; returns the language model's architecture.

    Raises:
        ValueError: transformers' model has no such field or value; the message names the field.
    """
    language = require_hybrid(model)
    found = [type(source) for source in model.sources.values()]
    if found not in ([RadioModuleConfig], [RadioModuleConfig, ParakeetModuleConfig]):
        raise ValueError(
            f"the model has the modules {', '.join(model.modules)}: {OMNI} has one vision encoder, "
            f"RADIO, a language model, and between them at most one audio encoder, Parakeet"
        )
    parts = model.parts
    for name in ("vision", "projector", "video", "audio"):
        if name in parts:
            require_carried(name, parts[name])
    if "audio_projector" in parts:
        require_carried("audio_projector", parts["audio_projector"], more=("bias",))
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
