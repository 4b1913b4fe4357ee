"""Adapters of whole models by the names of transformers' modules."""

from collections.abc import Mapping

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.model.hf.lora import hf_tables
from megatron_mimo.model.omni.config import require_exportable, require_hybrid
from megatron_mimo.model.omni.parts import audio_projector_table, cut, projector_table
from megatron_mimo.modules.hf.adapter import HfLanguageAdapter
from megatron_mimo.modules.hybrid.weights import name_table as language_table
from megatron_mimo.modules.language.adapter import PART
from megatron_mimo.modules.lora.config import Lora, layer_name
from megatron_mimo.modules.parakeet.config import ParakeetModuleConfig
from megatron_mimo.modules.parakeet.weights import name_table as audio_table
from megatron_mimo.modules.radio.config import RadioModuleConfig
from megatron_mimo.modules.radio.weights import MODULES, layer_scales, names_of
from megatron_mimo.modules.radio.weights import name_table as vision_table
from megatron_mimo.weights.folder import WeightFolder
from megatron_mimo.weights.table import Entry, Tables

# Beginnings of names in files -> those of transformers' modules.
_LANGUAGE = {"backbone.": "model."}
_PROJECTOR = {"1.": "linear_1.", "3.": "linear_2."}
_AUDIO_PROJECTOR = {"norm.": "layer_norm.", "linear1.": "linear_1.", "linear2.": "linear_2."}


def peft_tables(architecture: ModelConfig, *, text_alone: bool) -> Mapping[str, Tables]:
    """Module -> names of its weights as transformers' modules have them.

    Args:
        architecture: Architecture of every module.
        text_alone: Whether the model is a `NemotronHForCausalLM` and no
            `NemotronH_Omni_Reasoning_V3`.

    Raises:
        ValueError: transformers has no such model; the message names the field.
    """
    language = HfLanguageAdapter().own(architecture.target)
    if language is not None:
        return {
            **{source: {} for source in architecture.sources},
            architecture.target_name: hf_tables(language),
        }
    hybrid = require_hybrid(architecture) if text_alone else require_exportable(architecture)
    root = "" if text_alone else "language_model."
    found = {
        architecture.target_name: {
            PART: [_renamed(entry, root, _LANGUAGE) for entry in language_table(hybrid)]
        }
    }
    if text_alone:
        return found
    for source, config in architecture.sources.items():
        match config:
            case RadioModuleConfig():
                vision, projector = vision_table(config.vision, MODULES), projector_table()
                found[source] = {
                    "vision": [_renamed(entry, "vision_model.", {}) for entry in vision],
                    "projector": [
                        _renamed(entry, "multi_modal_projector.", _PROJECTOR) for entry in projector
                    ],
                }
            case ParakeetModuleConfig():
                audio = audio_table(config.audio)
                projector = audio_projector_table(config.audio_projector)
                found[source] = {
                    "audio": [_renamed(entry, "audio_tower.", {}) for entry in audio],
                    "audio_projector": [
                        _renamed(entry, "embed_audio.", _AUDIO_PROJECTOR) for entry in projector
                    ],
                }
    return found


def peft_layers(architecture: ModelConfig, lora: Lora, tables: Mapping[str, Tables]) -> set[str]:
    """Paths in transformers' model of all layers that have adapters.

    Args:
        architecture: Architecture of every module.
        lora: Adapters of the model.
        tables: Result of `peft_tables`.
    """
    return {
        name.removesuffix(".weight")
        for module, of_module in tables.items()
        for part, layers in architecture.of_module(module, lora.targets).items()
        for entry in of_module[part]
        if entry.ours.endswith(".weight")
        and layer_name(entry.ours.removesuffix(".weight")) in layers
        for name in entry.theirs
    }


def require_plain_scales(folder: WeightFolder, architecture: ModelConfig, lora: Lora) -> None:
    """Refuse a folder whose vision encoder scales the outputs of layers; ours has them in weights.

    Args:
        folder: Folder of the whole model.
        architecture: Architecture of every module.
        lora: Adapters of the model.

    Raises:
        ValueError: A scale behind a layer with adapters is not one; the message names it.
    """
    if not {"linear_proj", "linear_fc2"} & lora.targets.get("vision", frozenset()):
        return
    vision = cut(folder).vision
    for name in sorted(set(layer_scales(architecture.part("vision"), names_of(vision)).values())):
        if name in vision.names and not bool((vision.tensor(name) == 1).all()):
            raise ValueError(
                f"{folder.path}: {vision.full_name(name)} is not one, so that adapters of "
                f"vision.linear_proj and vision.linear_fc2 differ from peft's: leave them out of "
                f"--lora-targets, or do without peft's format"
            )


def _renamed(entry: Entry, root: str, beginnings: Mapping[str, str]) -> Entry:
    def name(theirs: str) -> str:
        for before, after in beginnings.items():
            if theirs.startswith(before):
                return root + after + theirs.removeprefix(before)
        return root + theirs

    return Entry(entry.ours, tuple(map(name, entry.theirs)), entry.join, entry.split, entry.blocks)
