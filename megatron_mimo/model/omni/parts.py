"""The parts of a folder: those of each module, and those that are not trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron_mimo.modules.radio.weights import MODULES, PUBLISHED
from megatron_mimo.weights.folder import WeightFolder
from megatron_mimo.weights.table import Entry

VISION, PROJECTOR, LANGUAGE = "vision_model.", "mlp1.", "language_model."
VIDEO_EMBEDDER = "vision_model.radio_model.model.patch_generator.video_embedder.weight"
NORM = "vision_final_layernorm"
"""The norm after the vision encoder, which is not one of its own weights in transformers."""
# Weights of parts that are not trained here, by the start of their names.
_CARRIED: Mapping[str, tuple[str, ...]] = {
    "audio": ("sound_encoder.", "sound_projection."),
    "video": (VIDEO_EMBEDDER, "vision_model.embeddings.video_patch_projection."),
}
# Names of fields before transformers 5; either is read.
_OLDER = {
    "image_token_id": "img_context_token_id",
    "text_config": "llm_config",
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
        carried: Part that is not trained -> names of its tensors in the folder; parts that the
            folder does not have are left out.
    """

    vision: WeightFolder
    projector: WeightFolder
    language: WeightFolder
    carried: Mapping[str, tuple[str, ...]]

    @property
    def carried_names(self) -> tuple[str, ...]:
        """All tensors that are not trained."""
        return tuple(chain.from_iterable(self.carried.values()))


def cut(folder: WeightFolder) -> OmniParts:
    """Divide a folder into the parts of its modules.

    Raises:
        ValueError: A section of config.json is missing.
    """
    found = {part: tuple(_starting(folder, starts)) for part, starts in _CARRIED.items()}
    carried = {part: names for part, names in found.items() if names}
    without = tuple(chain.from_iterable(found.values()))
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
            VISION, section="vision_config", config=vision, without=without, beside=beside
        ),
        projector=folder.part(PROJECTOR, section="projector", config=folder.config),
        language=folder.part(LANGUAGE, section="text_config", config=language),
        carried=carried,
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
    """Every weight of a projector, with its names here and in the folder."""
    names = {"norm": "0", "mlp.linear_fc1": "1", "mlp.linear_fc2": "3"}
    return tuple(Entry(f"{ours}.weight", (f"{theirs}.weight",)) for ours, theirs in names.items())


def _section(folder: WeightFolder, name: str) -> dict[str, Any]:
    found = field(folder.config, name)
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder.config_name} has no {name}: expected a NemotronH_Omni_Reasoning_V3"
        )
    return found


def _starting(folder: WeightFolder, starts: tuple[str, ...]) -> Iterator[str]:
    return (name for name in sorted(folder.names) if name.startswith(starts))
