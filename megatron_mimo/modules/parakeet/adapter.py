"""Adapter of Parakeet with a projector."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.audio.input import AudioInput
from megatron_mimo.modules.adapter import BuildContext, Division, FlopsContext, SourceAdapter
from megatron_mimo.modules.flops import Flops, all_pairs
from megatron_mimo.modules.parakeet.config import ParakeetModuleConfig
from megatron_mimo.modules.parakeet.flops import (
    AUDIO,
    PROJECTOR,
    AudioWork,
    audio_flops,
    audio_work,
)
from megatron_mimo.modules.projector.flops import projector_flops

if TYPE_CHECKING:
    from megatron_mimo.media.audio.packing import PackedClips
    from megatron_mimo.modules.stage import ModuleStage

# As megatron-core's multimodal model names these two.
STORED_PREFIXES: Mapping[str, str] = {
    f"{AUDIO}.": "sound_model.",
    f"{PROJECTOR}.": "sound_projection.",
}


class ParakeetAdapter(SourceAdapter[ParakeetModuleConfig, AudioWork]):
    """Parakeet over packed clips, and a projector on its last stage."""

    config_type = ParakeetModuleConfig
    work_type = AudioWork

    def part_titles(self, config: ParakeetModuleConfig) -> Mapping[str, str]:
        """Titles of the parts in tables."""
        return {AUDIO: "audio encoder", PROJECTOR: "audio projector"}

    def trains_inside(self, config: ParakeetModuleConfig, frozen: frozenset[str]) -> bool:
        """Whether the audio encoder trains; the projector is on the last stage."""
        return AUDIO not in frozen

    def build(self, config: ParakeetModuleConfig, context: BuildContext) -> "ModuleStage":
        """This rank's shard of its pipeline stage."""
        from megatron_mimo.modules.parakeet.module import ParakeetModule

        return ParakeetModule(
            config,
            context.pg_collection,
            context.params_dtype,
            row_width=context.row_width,
            frozen=context.frozen,
            initialize=context.initialize,
        )

    def hidden_width(self, config: ParakeetModuleConfig) -> int:
        """Width of a row of the audio encoder."""
        return config.audio.hidden_size

    def prefixes(self, config: ParakeetModuleConfig, name: str) -> Mapping[str, str]:
        """Prefixes of a Megatron checkpoint."""
        return STORED_PREFIXES

    def divisions(self, config: ParakeetModuleConfig) -> Iterable[Division]:
        """Layers divide over stages; heads, which divide channels, and MLPs over tp ranks."""
        return (
            Division("pp", AUDIO, "num_layers"),
            Division("tp", AUDIO, "num_attention_heads"),
            Division("tp", AUDIO, "ffn_hidden_size"),
            Division("tp", PROJECTOR, "ffn_hidden_size"),
        )

    def linear_layers(
        self, config: ParakeetModuleConfig, row_width: int
    ) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """The linear layers of attention and MLPs, and of the projector."""
        audio, projector = config.audio, config.audio_projector
        width, inner = audio.hidden_size, audio.ffn_hidden_size
        return {
            AUDIO: {
                "linear_qkv": (width, 3 * width),
                "linear_proj": (width, width),
                "linear_fc1": (width, inner),
                "linear_fc2": (inner, width),
            },
            PROJECTOR: {"linear": (width, row_width)}
            if projector.kind == "affine"
            else {
                "linear_fc1": (width, projector.ffn_hidden_size),
                "linear_fc2": (projector.ffn_hidden_size, row_width),
            },
        }

    def flops(self, config: ParakeetModuleConfig, work: AudioWork, context: FlopsContext) -> Flops:
        """Number of operations of some work of both parts."""
        return audio_flops(config.audio, work, context) + projector_flops(
            config.audio_projector,
            context,
            part=PROJECTOR,
            size=config.audio.hidden_size,
            rows=work.rows,
            below=context.trains(AUDIO),
        )

    def work(self, config: ParakeetModuleConfig, packed: "PackedClips") -> AudioWork:
        """Work of packed clips."""
        return audio_work(len(packed.features), packed.lengths)

    def item_work(
        self, config: ParakeetModuleConfig, lengths: Sequence[int], rows: int
    ) -> AudioWork:
        """Work of one clip, without zeros after it and without the distances of a microbatch."""
        return AudioWork(
            rows=rows,
            frames=rows * config.audio.subsampling_factor,
            clip_pairs=all_pairs(lengths),
        )

    def item_input(
        self,
        config: ParakeetModuleConfig,
        *,
        name: str,
        frozen: frozenset[str],
        several: bool = False,
        audio: AudioConfig | None = None,
        **settings: Any,
    ) -> AudioInput:
        """Conversion of clips to mel features and rows.

        Args:
            config: Architecture of the module.
            name: Name of the module.
            frozen: Names of the parts that do not train.
            several: Whether the model has another module of this family.
            audio: How a clip becomes mel features; None for that of transformers' Parakeet.
            settings: Flags of images, which are not used.
        """
        own = config.audio.audio_config()
        settled = replace(
            audio or own,
            num_mel_bins=own.num_mel_bins,
            subsampling_factor=own.subsampling_factor,
            conv_kernel_size=own.conv_kernel_size,
        )
        if several:
            # A token each, and a field each in stored samples.
            return AudioInput(config=settled, placeholder=f"<{name}>", token=f"<{name}>", noun=name)
        return AudioInput(config=settled)
