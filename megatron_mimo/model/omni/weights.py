"""Weights of whole models: each rank reads its shard, one process writes whole tensors."""

from collections.abc import Collection, Iterable, Iterator, Mapping
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
    ALL,
    AUDIO,
    AUDIO_PROJECTOR,
    LANGUAGE,
    NORM,
    PROJECTOR,
    VIDEO,
    VISION,
    OmniParts,
    Optional,
    audio_projector_table,
    cut,
    described_by,
    parts_of,
    projector_table,
    video_table,
)
from megatron_mimo.modules.adapter import ModuleConfig
from megatron_mimo.modules.hybrid import weights as language_weights
from megatron_mimo.modules.parakeet import weights as audio_weights
from megatron_mimo.modules.parakeet.config import ParakeetModuleConfig
from megatron_mimo.modules.radio import weights as radio_weights
from megatron_mimo.modules.radio.config import RadioModuleConfig
from megatron_mimo.weights.folder import WeightFolder, copy_beside, require_names, write_folder
from megatron_mimo.weights.load import Place, as_stored, export_module, fill_module
from megatron_mimo.weights.table import Entry

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

    @property
    def video(self) -> nn.Module | None:
        """A `VideoEmbedding`; None after the first stage, and for images alone."""


class Audio(Protocol):
    """A stage of audio encoder and projector, such as `modules.parakeet.module.ParakeetModule`."""

    @property
    def architecture(self) -> ParakeetModuleConfig:
        """Architecture of both parts."""

    @property
    def audio(self) -> nn.Module:
        """A `ParakeetEncoder`."""

    @property
    def audio_projector(self) -> nn.Module | None:
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
    video_encoder: Encoder | None = None,
    audio: Audio | None = None,
    without: Collection[Optional] = (),
    encoder_place: Places = Places(),
    language_place: Places = Places(),
    video_place: Places = Places(),
    audio_place: Places = Places(),
) -> Mapping[str, tuple[str, ...]]:
    """Fill the modules that this rank holds; it reads only its own shards of the weights.

    Not collective. An optimizer that keeps copies of the weights is made after it.

    Args:
        folder: Folder of the whole model.
        encoder: Stage of the encoder on this rank; None outside the encoder's grid.
        language: Stage of the language model on this rank; None outside its grid.
        video_encoder: Stage of the encoder of videos on this rank, where they have their own.
        audio: Stage of the audio encoder on this rank; None outside its grid.
        without: Parts that the model leaves out, as in `read_omni`.
        encoder_place: Positions of this rank in the encoder's grid.
        language_place: Positions of this rank in the language model's grid.
        video_place: Positions of this rank in the grid of the encoder of videos.
        audio_place: Positions of this rank in the audio encoder's grid.

    Returns:
        Part that is left out -> names of its tensors, which one rank reports (`describe_carried`).
        They stay in the folder, from which `save_omni` carries them over.

    Raises:
        ValueError: The architecture is not supported, or weights are missing, unexpected or of
            another shape; the message lists them.
    """
    model, parts = read_omni(folder, without).model, cut(folder)
    encoders = [
        (one, place)
        for one, place in ((encoder, encoder_place), (video_encoder, video_place))
        if one is not None
    ]
    for one, _ in encoders:
        model = model.with_parts(
            vision=one.architecture.vision, projector=one.architecture.projector
        )
    if language is not None:
        model = model.with_parts(language=language.architecture)
    if audio is not None:
        model = model.with_parts(
            audio=audio.architecture.audio, audio_projector=audio.architecture.audio_projector
        )
    _require_all(folder, parts, model)
    for one, place in encoders:
        fill_vision(one.vision, model, parts, place)
        if one.projector is not None:
            fill_projector(one.projector, model, parts, place)
        if one.video is not None:
            _fill(one.video, video_table(), parts.video, place)
    if audio is not None:
        rank, size = audio_place.tp
        audio_weights.load_weights(
            audio.audio, model.part("audio"), parts.audio, tp_rank=rank, tp_size=size
        )
        if audio.audio_projector is not None:
            table = audio_projector_table(model.part("audio_projector"))
            _fill(audio.audio_projector, table, parts.audio_projector, audio_place)
    if language is not None:
        fill_language(language.model, model, parts, language_place)
    return parts.carried(model)


def describe_carried(carried: Mapping[str, tuple[str, ...]]) -> str:
    """Sentence on what is left out and carried over; empty where there is nothing."""
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
    _fill(module, projector_table(), parts.projector, place)


def _fill(module: nn.Module, table: Iterable[Entry], part: WeightFolder, place: Places) -> None:
    """Fill this rank's shard of a module whose names are those of its table."""
    fill_module(module, table, part, table_name=str, tp=place.tp, expt_tp=place.expt_tp)


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
    video: nn.Module | None = None,
    audio: nn.Module | None = None,
    audio_projector: nn.Module | None = None,
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
            changes, the files beside its weights, and parts that the architecture leaves out are
            carried over; weights have its dtypes, and those that did not change are the same bit by
            bit. None: without videos, their embedding is that of a still image.
        video: Embedding of videos, a `VideoEmbedding`, where the architecture has it.
        audio: Audio encoder, a `ParakeetEncoder`, where the architecture has it.
        audio_projector: Its projector, a `Projector`.
        tokens: Fields of text_config beside the architecture, such as pad_token_id; only without a
            source.

    Raises:
        ValueError: transformers' model has no such part; the message names it.
    """
    hybrid = require_exportable(config.model)
    if source is None:
        tensors = dict(_fresh(config, vision, projector, language))
        if video is not None:
            tensors |= _named(VIDEO, export_module(video, video_table(), table_name=str))
        if audio is not None and audio_projector is not None:
            tensors |= dict(_fresh_audio(config, audio, audio_projector))
        described = write_omni(config) | {"dtype": dtype_name(tensors[_EMBEDDING])}
        described["text_config"] |= tokens
        write_folder(path, described, tensors)
        save_processor(Path(path), config)
        return
    left_out = ALL - parts_of(config.model)
    before = write_omni(read_omni(source, left_out))
    described = described_by(source.config, before, write_omni(config))
    parts = cut(source)
    of_modules = [
        (
            parts.vision,
            radio_weights.restore_weights(vision, config.model.part("vision"), parts.vision),
        ),
        (parts.projector, as_stored(_export_projector(projector), parts.projector)),
        (parts.language, language_weights.restore_weights(language, hybrid, parts.language)),
    ]
    if video is not None:
        exported = export_module(video, video_table(), table_name=str)
        of_modules.append((parts.video, as_stored(exported, parts.video)))
    if audio is not None and audio_projector is not None:
        table = audio_projector_table(config.model.part("audio_projector"))
        exported = export_module(audio_projector, table, table_name=str)
        restored = audio_weights.restore_weights(audio, config.model.part("audio"), parts.audio)
        of_modules += [
            (parts.audio, restored),
            (parts.audio_projector, as_stored(exported, parts.audio_projector)),
        ]
    named = (
        (part.full_name(name), tensor) for part, tensors in of_modules for name, tensor in tensors
    )
    carried = ((name, source.tensor(name)) for name in parts.carried_names(config.model))
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
        if name == f"{names.patches}.weight" and "video" not in config.model.parts:
            yield f"{VIDEO}weight", torch.cat([tensor / FRAMES] * FRAMES, dim=1)
    for name, tensor in _export_projector(projector).items():
        yield PROJECTOR + name, tensor
    hybrid = require_exportable(config.model)
    for name, tensor in language_weights.export_weights(language, hybrid).items():
        yield LANGUAGE + name, tensor


def _fresh_audio(
    config: OmniConfig, audio: nn.Module, projector: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the audio encoder, and of its projector."""
    exported = audio_weights.export_weights(audio, config.model.part("audio"))
    yield from _named(AUDIO, exported).items()
    table = audio_projector_table(config.model.part("audio_projector"))
    exported = export_module(projector, table, table_name=str)
    yield from _named(AUDIO_PROJECTOR, exported).items()


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _export_projector(projector: nn.Module) -> dict[str, Tensor]:
    return export_module(projector, projector_table(), table_name=str)


def _require_all(folder: WeightFolder, parts: OmniParts, model: ModelConfig) -> None:
    """Refuse a folder that lacks a weight of a module, or has one that belongs to no module."""
    names, vision = radio_weights.names_of(parts.vision), model.part("vision")
    held = parts_of(model)
    tables: list[tuple[WeightFolder, Iterable[Entry]]] = [
        (parts.vision, radio_weights.name_table(vision, names)),
        (parts.projector, projector_table()),
        (parts.language, language_weights.name_table(require_exportable(model))),
    ]
    if "video" in held:
        tables.append((parts.video, video_table()))
    if "audio" in held:
        table = audio_projector_table(model.part("audio_projector"))
        tables += [
            (parts.audio, audio_weights.name_table(model.part("audio"))),
            (parts.audio_projector, table),
        ]
    wanted = {
        part.full_name(name) for part, table in tables for entry in table for name in entry.theirs
    }
    optional = {
        *parts.carried_names(model),
        *map(parts.vision.full_name, radio_weights.optional_names(vision, names)),
        *map(parts.language.full_name, language_weights.OPTIONAL),
    }
    require_names(folder.path, wanted, folder.names, optional)


def dtype_name(tensor: Tensor) -> str:
    """Name in config.json of the dtype of a tensor [...]."""
    return str(tensor.dtype).removeprefix("torch.")
