"""All modules of a folder, each whole in this process, without a launcher."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_mimo.model.omni.config import OmniConfig, read_omni
from megatron_mimo.model.omni.parts import cut
from megatron_mimo.modules.adapter import BuildContext
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.runtime import prepare_megatron_core, resolve_device
from megatron_mimo.weights.folder import WeightFolder

if TYPE_CHECKING:
    from megatron_mimo.modules.stage import ModuleStage


class WholeOmni:
    """The modules of a folder on this host, filled with its weights.

    Args:
        folder: Path to the folder.
        dtype: Dtype of the parameters; None for that of the language model's embeddings.

    Attributes:
        config: Architecture, and processing of items.

    Raises:
        ValueError: A file is missing or damaged, weights are missing or unexpected, or the
            architecture is not supported.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        prepare_megatron_core(resolve_device("cpu"))
        from megatron_mimo.model.omni.weights import load_omni
        from megatron_mimo.modules.language.module import LanguageModule
        from megatron_mimo.modules.parakeet.module import ParakeetModule
        from megatron_mimo.modules.radio.module import RadioModule
        from megatron_mimo.runtime.solo import solo_groups, solo_world

        self._source = WeightFolder(folder)
        self.config: OmniConfig = read_omni(self._source)
        stored = cut(self._source).language.dtype("backbone.embeddings.weight")
        model = self.config.model
        stages: dict[type[ModuleStage], ModuleStage] = {}
        with solo_world():
            for config in model.modules.values():
                context = BuildContext(
                    pg_collection=solo_groups(),
                    params_dtype=dtype or stored,
                    row_width=model.row_width,
                    vocab_size=self.config.vocab_size,
                    seq_length=self.config.seq_length,
                    initialize=False,
                )
                stage = adapter_of(config).build(config, context)
                stages[type(stage)] = stage
            encoder, language = stages[RadioModule], stages[LanguageModule]
            audio = stages.get(ParakeetModule)
            assert isinstance(encoder, RadioModule) and isinstance(language, LanguageModule)
            assert audio is None or isinstance(audio, ParakeetModule)
            load_omni(self._source, encoder=encoder, audio=audio, language=language)
        self._encoder, self._audio, self._language = encoder, audio, language

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The modules' parts by the names that they have in training."""
        parts = {**self._encoder.parts, "model": self._language.model}
        if self._audio is not None:
            parts |= self._audio.parts
        return {name: part for name, part in parts.items() if part is not None}

    def save(self, folder: Path) -> None:
        """Write a folder that transformers loads, with everything else of the one it came from."""
        from megatron_mimo.model.omni.weights import save_omni

        assert self._encoder.projector is not None
        save_omni(
            folder,
            self.config,
            vision=self._encoder.vision,
            projector=self._encoder.projector,
            language=self._language.model,
            video=self._encoder.video,
            audio=None if self._audio is None else self._audio.audio,
            audio_projector=None if self._audio is None else self._audio.audio_projector,
            source=self._source,
        )
