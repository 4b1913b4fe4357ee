"""Weights of whole models: each rank reads its shard, one process writes whole tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.model.omni.config import (
    FRAMES,
    OmniConfig,
    read_omni,
    require_exportable,
    save_processor,
    write_omni,
)
from megatron_mimo.model.omni.parts import (
    LANGUAGE,
    NORM,
    PROJECTOR,
    VIDEO_EMBEDDER,
    VISION,
    OmniParts,
    cut,
    described_by,
    projector_table,
)
from megatron_mimo.modules.adapter import ModuleConfig
from megatron_mimo.modules.hybrid import weights as language_weights
from megatron_mimo.modules.radio import weights as radio_weights
from megatron_mimo.modules.radio.config import RadioModuleConfig
from megatron_mimo.weights.folder import WeightFolder, copy_beside, require_names, write_folder
from megatron_mimo.weights.load import Place, as_stored, export_module, fill_module

_EMBEDDING = f"{LANGUAGE}backbone.embeddings.weight"


class Encoder(Protocol):
    """A stage of vision encoder and projector, such as `modules.radio.module.RadioModule`."""

    @property
    def architecture(self) -> RadioModuleConfig:
        """Architecture of both parts."""

    @property
    def vision(self) -> nn.Module:
        """A `RadioVit`."""

    @property
    def projector(self) -> nn.Module | None:
        """A `Projector`; None before the last stage."""


class Language(Protocol):
    """A stage of the language model, such as `modules.language.module.LanguageModule`."""

    @property
    def architecture(self) -> ModuleConfig:
        """Architecture of the language model."""

    @property
    def model(self) -> nn.Module:
        """A `HybridModel`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Positions of a rank among those that share weights with it.

    Attributes:
        tp: Position among the ranks that share a dense weight.
        expt_tp: Position among the ranks that share a weight of an expert.
        first_expert: Number of the first expert that the rank holds.
    """

    tp: Place = (0, 1)
    expt_tp: Place = (0, 1)
    first_expert: int = 0


def load_omni(
    folder: WeightFolder,
    *,
    encoder: Encoder | None,
    language: Language | None,
    encoder_place: Places = Places(),
    language_place: Places = Places(),
) -> Mapping[str, tuple[str, ...]]:
    """Fill the modules that this rank holds; it reads only its own shards of the weights.

    Not collective. An optimizer that keeps copies of the weights is made after it.

    Args:
        folder: Folder of the whole model.
        encoder: Stage of the encoder on this rank; None outside the encoder's grid.
        language: Stage of the language model on this rank; None outside its grid.
        encoder_place: Positions of this rank in the encoder's grid.
        language_place: Positions of this rank in the language model's grid.

    Returns:
        Part that is not trained -> names of its tensors, which one rank reports
        (`describe_carried`). They stay in the folder, from which `save_omni` carries them over.

    Raises:
        ValueError: The architecture is not supported, or weights are missing, unexpected or of
            another shape; the message lists them.
    """
    model, parts = read_omni(folder).model, cut(folder)
    if encoder is not None:
        model = model.with_parts(
            vision=encoder.architecture.vision, projector=encoder.architecture.projector
        )
    if language is not None:
        model = model.with_parts(language=language.architecture)
    _require_all(folder, parts, model)
    if encoder is not None:
        fill_vision(encoder.vision, model, parts, encoder_place)
        if encoder.projector is not None:
            fill_projector(encoder.projector, model, parts, encoder_place)
    if language is not None:
        fill_language(language.model, model, parts, language_place)
    return parts.carried


def describe_carried(carried: Mapping[str, tuple[str, ...]]) -> str:
    """Sentence on what is carried over and not trained; empty where there is nothing."""
    parts = " and ".join(f"{part} ({len(names)} tensors)" for part, names in carried.items())
    return parts and f"not trained, carried over unchanged: {parts}"


def fill_vision(module: nn.Module, config: ModelConfig, parts: OmniParts, place: Places) -> None:
    """Fill this rank's shard of a `RadioVit` stage.

    Raises:
        ValueError: The folder does not fit the module, as in `load_omni`.
    """
    rank, size = place.tp
    radio_weights.load_weights(
        module, config.part("vision"), parts.vision, tp_rank=rank, tp_size=size
    )


def fill_projector(module: nn.Module, config: ModelConfig, parts: OmniParts, place: Places) -> None:
    """Fill this rank's shard of a `Projector`.

    Raises:
        ValueError: The folder does not fit the module, as in `load_omni`.
    """
    require_exportable(config)
    fill_module(
        module,
        projector_table(),
        parts.projector,
        table_name=str,
        tp=place.tp,
        expt_tp=place.expt_tp,
    )


def fill_language(module: nn.Module, config: ModelConfig, parts: OmniParts, place: Places) -> None:
    """Fill this rank's shard of a `HybridModel` stage.

    Raises:
        ValueError: The folder does not fit the module, as in `load_omni`.
    """
    language_weights.load_weights(
        module,
        require_exportable(config),
        parts.language,
        tp=place.tp,
        expt_tp=place.expt_tp,
        first_expert=place.first_expert,
    )


def save_omni(
    path: str | Path,
    config: OmniConfig,
    *,
    vision: nn.Module,
    projector: nn.Module,
    language: nn.Module,
    source: WeightFolder | None,
    tokens: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a folder that transformers loads, from modules that one process holds whole.

    Args:
        path: Path to the folder to write; weights in it are replaced. It may be the source.
        config: Architecture of the modules.
        vision: Vision encoder, a `RadioVit`.
        projector: Projector, a `Projector`.
        language: Language model, a `HybridModel`.
        source: Folder that training began from. Its config.json, with the fields that `config`
            changes, the files beside its weights, and its audio and video parts are carried over;
            weights have its dtypes, and those that did not change are the same bit by bit. None:
            there is no audio, and the embedding of video is that of a still image.
        tokens: Fields of text_config beside the architecture, such as pad_token_id; only without a
            source.

    Raises:
        ValueError: transformers' model has no such part; the message names it.
    """
    hybrid = require_exportable(config.model)
    if source is None:
        tensors = dict(_fresh(config, vision, projector, language))
        described = write_omni(config) | {"dtype": dtype_name(tensors[_EMBEDDING])}
        described["text_config"] |= tokens
        write_folder(path, described, tensors)
        save_processor(Path(path), config)
        return
    described = described_by(source.config, write_omni(read_omni(source)), write_omni(config))
    parts = cut(source)
    of_modules = (
        (
            parts.vision,
            radio_weights.restore_weights(vision, config.model.part("vision"), parts.vision),
        ),
        (parts.projector, as_stored(_export_projector(projector), parts.projector)),
        (parts.language, language_weights.restore_weights(language, hybrid, parts.language)),
    )
    named = (
        (part.full_name(name), tensor) for part, tensors in of_modules for name, tensor in tensors
    )
    carried = ((name, source.tensor(name)) for name in parts.carried_names)
    copy_beside(source.path, Path(path))
    write_folder(path, described, chain(named, carried))


def _fresh(
    config: OmniConfig, vision: nn.Module, projector: nn.Module, language: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder that has no source."""
    names = radio_weights.PUBLISHED
    for name, tensor in radio_weights.export_weights(vision, config.model.part("vision")).items():
        # transformers normalises images in front of this model.
        if name.startswith(names.final_norm):
            yield NORM + name.removeprefix(names.final_norm), tensor
        elif name not in (names.mean, names.std):
            yield VISION + name, tensor
        if name == f"{names.patches}.weight":
            yield VIDEO_EMBEDDER, torch.cat([tensor / FRAMES] * FRAMES, dim=1)
    for name, tensor in _export_projector(projector).items():
        yield PROJECTOR + name, tensor
    hybrid = require_exportable(config.model)
    for name, tensor in language_weights.export_weights(language, hybrid).items():
        yield LANGUAGE + name, tensor


def _export_projector(projector: nn.Module) -> dict[str, Tensor]:
    return export_module(projector, projector_table(), table_name=str)


def _require_all(folder: WeightFolder, parts: OmniParts, model: ModelConfig) -> None:
    """Refuse a folder that lacks a weight of a module, or has one that belongs to no module."""
    names, vision = radio_weights.names_of(parts.vision), model.part("vision")
    tables = (
        (parts.vision, radio_weights.name_table(vision, names)),
        (parts.projector, projector_table()),
        (parts.language, language_weights.name_table(require_exportable(model))),
    )
    wanted = {
        part.full_name(name) for part, table in tables for entry in table for name in entry.theirs
    }
    optional = {
        *parts.carried_names,
        *map(parts.vision.full_name, radio_weights.optional_names(vision, names)),
        *map(parts.language.full_name, language_weights.OPTIONAL),
    }
    require_names(folder.path, wanted, folder.names, optional)


def dtype_name(tensor: Tensor) -> str:
    """Name in config.json of the dtype of a tensor [...]."""
    return str(tensor.dtype).removeprefix("torch.")
