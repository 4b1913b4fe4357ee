"""Operations of the audio encoder and of its projector."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops, LoraLayers, Work, all_pairs, attention, product
from megatron_mimo.modules.parakeet.config import ParakeetConfig

AUDIO, PROJECTOR = "audio", "audio_projector"


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioWork(Work):
    """Amount of work of an audio encoder.

    Attributes:
        frames: Number of mel frames of all clips, those between clips included.
        clip_pairs: Number of pairs of rows of one clip (`all_pairs`).
        distances: Number of distances between rows of the longest clip of a microbatch, 2N-1.
    """

    balanced = ("rows", "frames")

    frames: int = 0
    clip_pairs: int = 0
    distances: int = 0


def audio_work(frames: int, lengths: Sequence[int]) -> AudioWork:
    """Work of the encoder on packed clips.

    Args:
        frames: Number of frames of the packed features.
        lengths: Number of rows of each clip (`PackedClips.lengths`).
    """
    return AudioWork(
        rows=sum(lengths),
        frames=frames,
        clip_pairs=all_pairs(lengths),
        distances=2 * max(lengths, default=0) - bool(lengths),
    )


def audio_flops(config: ParakeetConfig, work: AudioWork, context: FlopsContext) -> Flops:
    """Number of operations of the packed encoder.

    Convolutions count as products. A row has scores against all 2n-1 distances of its clip, n of
    which are used: all are computed, here and in transformers, and all count.
    """
    width, inner, rows = config.hidden_size, config.ffn_hidden_size, work.rows
    trains = context.trains(AUDIO)
    weight = trains and AUDIO not in context.lora
    flops = subsampling_flops(config, work, weight=weight)

    def layer(first: bool) -> Flops:
        # Where no weight trains, gradients end at the first adapter.
        below = trains and not (first and AUDIO in context.lora)
        adapted = context.lora.get(AUDIO, LoraLayers(rank=1, layers=frozenset())).layers
        total = Flops()
        for name, inputs, outputs, parts in (
            ("linear_fc1", width, inner, 1),
            ("linear_fc2", inner, width, 1),
            ("linear_qkv", width, 3 * width, 3),
            ("linear_proj", width, width, 1),
            ("pointwise_in", width, 2 * width, 1),
            ("pointwise_out", width, width, 1),
            ("linear_fc1", width, inner, 1),
            ("linear_fc2", inner, width, 1),
        ):
            linear = context.linear(AUDIO, backward=below)
            total += linear(name, rows, inputs, outputs, parts=parts)
            below = below or name in adapted
            if name == "linear_qkv":
                # Distances have no gradient of their own.
                total += product(work.distances, width, width, weight=weight, inputs=False)
                total += attention(work.clip_pairs, width, backward=below)
                scores = 2 * work.clip_pairs - rows
                total += product(scores, width, 1, weight=weight, inputs=below)
            if name == "pointwise_in":
                total += product(rows, config.conv_kernel_size, width, weight=weight, inputs=below)
        return total

    return flops + layer(True) + layer(False) * (config.num_layers - 1)


def subsampling_flops(config: ParakeetConfig, work: AudioWork, *, weight: bool) -> Flops:
    """Number of operations of the convolutions and the linear layer before the layers.

    Args:
        config: Architecture of the encoder.
        work: Frames and rows.
        weight: Whether their weights train.
    """
    channels, cells = config.subsampling_conv_channels, work.frames * config.num_mel_bins // 4
    # Mel features have no gradient.
    flops = product(cells, 9, channels, weight=weight, inputs=False)
    for _ in range(config.subsampling_factor.bit_length() - 2):
        cells //= 4
        flops += product(cells, 9, channels, weight=weight, inputs=weight)
        flops += product(cells, channels, channels, weight=weight, inputs=weight)
    bins = config.num_mel_bins // config.subsampling_factor
    return flops + product(
        work.rows, bins * channels, config.hidden_size, weight=weight, inputs=weight
    )
