"""The parts of a folder: those of each module, and those that belong to none."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio.weights import MODULES, PUBLISHED
from megatron_mimo.weights.folder import WeightFolder
from megatron_mimo.weights.table import Entry

VISION, PROJECTOR, LANGUAGE = "vision_model.", "mlp1.", "language_model."
AUDIO, AUDIO_PROJECTOR = "sound_encoder.encoder.", "sound_projection."
VIDEO = "vision_model.radio_model.model.patch_generator.video_embedder."
# As the modules of transformers' `RadioModel` are called.
_VIDEO_MODULE = "vision_model.embeddings.video_patch_projection."
NORM = "vision_final_layernorm"
"""The norm after the vision encoder, which is not one of its own weights in transformers."""
type Optional = Literal["audio", "video"]
"""A part that a folder may have and a run may leave out."""
# Starts of the names of its weights.
_OPTIONAL: Mapping[Optional, tuple[str, ...]] = {
    "audio": ("sound_encoder.", "sound_projection."),
    "video": (VIDEO, _VIDEO_MODULE),
}
ALL = frozenset(_OPTIONAL)
"""All optional parts."""
# Mel filters and a window, which transformers does not read either: its processor has its own.
_UNUSED = f"{AUDIO}feature_extractor."
# Names of fields before transformers 5; either is read.
_OLDER = {
    "image_token_id": "img_context_token_id",
    "video_token_id": "video_context_token_id",
    "audio_token_id": "sound_context_token_id",
    "text_config": "llm_config",
    "audio_config": "sound_config",
    "vision_hidden_size": "vit_hidden_size",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniParts:
    """A folder, divided into its parts.

    Attributes:
        vision: Folder of RADIO, as if it were stored alone.
        projector: Folder of the projector, as if it were stored alone; its config is that of the
            whole model.
        language: Folder of NemotronH, as if it were stored alone.
        audio: Folder of Parakeet, as if it were stored alone.
        audio_projector: Folder of its projector, as if it were stored alone.
        video: Folder of the embedding of videos, as if it were stored alone.
        optional: Part that not every folder has -> names of its tensors in the folder; parts that
            this folder does not have are left out.
        unused: Names of tensors of no part.
    """

    vision: WeightFolder
    projector: WeightFolder
    language: WeightFolder
    audio: WeightFolder
    audio_projector: WeightFolder
    video: WeightFolder
    optional: Mapping[Optional, tuple[str, ...]]
    unused: tuple[str, ...]

    def carried(self, model: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        """Part that a model leaves out -> names of its tensors in the folder."""
        held = parts_of(model)
        return {part: names for part, names in self.optional.items() if part not in held}

    def carried_names(self, model: ModelConfig) -> tuple[str, ...]:
        """All tensors that belong to no part of a model."""
        return (*chain.from_iterable(self.carried(model).values()), *self.unused)


def parts_of(model: ModelConfig) -> frozenset[Optional]:
    """Those of the optional parts that a model has."""
    return frozenset(part for part in _OPTIONAL if part in model.parts)


def cut(folder: WeightFolder) -> OmniParts:
    """Divide a folder into the parts of its modules.

    Raises:
        ValueError: A section of config.json is missing.
    """
    found = {
        part: tuple(name for name in _starting(folder, starts) if not name.startswith(_UNUSED))
        for part, starts in _OPTIONAL.items()
    }
    video = _VIDEO_MODULE if f"{_VIDEO_MODULE}weight" in folder.names else VIDEO
    audio = field(folder.config, "audio_config") or {}
    # Vision weights say what kind they are where the section does not.
    vision = {"model_type": "radio"} | _section(folder, "vision_config")
    language = _section(folder, "text_config")
    beside: dict[str, str] = {}
    if f"{NORM}.weight" in folder.names:
        beside = {
            f"{names.final_norm}.{kind}": f"{NORM}.{kind}"
            for names in (PUBLISHED, MODULES)
            for kind in ("weight", "bias")
        }
        # It says that there is the norm; layers that it would stand for are refused by their names.
        language = language | {"num_nextn_predict_layers": 0}
    return OmniParts(
        vision=folder.part(
            VISION, section="vision_config", config=vision, without=found["video"], beside=beside
        ),
        projector=folder.part(PROJECTOR, section="projector", config=folder.config),
        language=folder.part(LANGUAGE, section="text_config", config=language),
        audio=folder.part(
            AUDIO, section="audio_config", config=audio, without=_starting(folder, (_UNUSED,))
        ),
        audio_projector=folder.part(AUDIO_PROJECTOR, section="audio_config", config=audio),
        video=folder.part(video, section="vision_config", config=vision),
        optional={part: names for part, names in found.items() if names},
        unused=tuple(_starting(folder, (_UNUSED,))),
    )


def holds_norm_of_layers(folder: WeightFolder) -> bool:
    """Whether the vision encoder itself has a norm after its layers, unlike transformers'."""
    return any(
        f"{VISION}{names.final_norm}.weight" in folder.names for names in (PUBLISHED, MODULES)
    )


def field(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A field of config.json by its name or an older one of the same field."""
    for known in (name, _OLDER.get(name, name)):
        if config.get(known, default) not in (None, default):
            return config[known]
    return default


def described_by(
    source: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a folder, with the fields of an architecture that has changed since.

    Args:
        source: Contents of config.json.
        before: Fields of the architecture that it describes, and sections of such fields.
        after: The same fields of the changed architecture.
    """
    described = dict(source)
    for name, value in after.items():
        known = name if name in source else _OLDER.get(name, name)
        if isinstance(value, dict):
            described[known] = described_by(source.get(known, {}), before[name], value)
        elif value != before[name]:
            described.pop(known, None)
            described[name] = value
    return described


def projector_table() -> tuple[Entry, ...]:
    """Every weight of the vision projector, with its names here and in the folder."""
    names = {"norm": "0", "mlp.linear_fc1": "1", "mlp.linear_fc2": "3"}
    return tuple(Entry(f"{ours}.weight", (f"{theirs}.weight",)) for ours, theirs in names.items())


def audio_projector_table(config: ProjectorConfig) -> tuple[Entry, ...]:
    """Every weight of the audio projector, with its names here and in the folder."""
    entries = [Entry("norm.weight", ("norm.weight",))]
    for ours, theirs in (("mlp.linear_fc1", "linear1"), ("mlp.linear_fc2", "linear2")):
        for kind in ("weight", "bias") if config.bias else ("weight",):
            entries.append(Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",)))
    return tuple(entries)


def video_table() -> tuple[Entry, ...]:
    """The weight of the embedding of videos, with its name here and in the folder."""
    return (Entry("projection.weight", ("weight",)),)


def _section(folder: WeightFolder, name: str) -> dict[str, Any]:
    found = field(folder.config, name)
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder.config_name} has no {name}: expected a NemotronH_Omni_Reasoning_V3"
        )
    return found


def _starting(folder: WeightFolder, starts: tuple[str, ...]) -> Iterator[str]:
    return (name for name in sorted(folder.names) if name.startswith(starts))
