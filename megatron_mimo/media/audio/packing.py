"""Clips in one packed sequence, with every index that the encoder needs.

All indices are computed here, while data is loaded, so that a forward runs a few gathers for any
number of clips.

A clip is a signal of its valid frames with zeros on both sides, at every level of the subsampling.
So clips can stand one after the other along time, if what lies between two of them is zero again
after each level: then one convolution over the whole tensor gives each clip what it gets alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.media.audio.clip import EncodedClip
from megatron_mimo.media.audio.config import AudioConfig

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedClips:
    """Clips that one rank runs in a microbatch, packed one after the other.

    N clips, the shortest first, T frames, R rows. Between two clips are frames of zeros, so that
    neither convolution sees from one into the next.

    Attributes:
        features: Mel features, float32 [T, bins]; zeros outside of the clips' valid frames.
        lengths: Number of rows of each clip, ascending, on the host; they sum to R.
        valid: Number of these rows that come from valid frames, on the host: as many, or one less.
        gaps: Positions along time that are outside of every clip's valid ones, int64 [G], after
            each level of the subsampling.
        row_slots: Position of each row after the last level, int64 [R].
        conv_slots: Place of each row on the line that the convolutions of the layers see, with
            zeros between clips, int64 [R]. A row that is not valid has the last place, which no
            kernel covers.
        conv_rows: Place of the first row on that line that each row's kernel covers, int64 [R].
        conv_length: Number of places of that line.
        row_index: Index here of each row, in the order in which the clips were given,
            int64 [R].
    """

    features: Tensor
    lengths: tuple[int, ...]
    valid: tuple[int, ...]
    gaps: tuple[Tensor, ...]
    row_slots: Tensor
    conv_slots: Tensor
    conv_rows: Tensor
    conv_length: int
    row_index: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of rows, R."""
        return sum(self.lengths)


def pack_clips(items: Sequence[EncodedClip], config: AudioConfig) -> PackedClips | None:
    """Pack clips one after the other; None for no clip.

    Args:
        items: Clips with features, in manifest order.
        config: Settings that they were encoded with.
    """
    if not items:
        return None
    features = [item.features for item in items if item.features is not None]
    assert len(features) == len(items), "clips were encoded without features"
    # The last frame is masked, as transformers masks it.
    frames = np.array([len(each) - 1 for each in features], dtype=np.int64)
    lengths = np.array([config.num_rows(len(each)) for each in features], dtype=np.int64)
    valid = np.array([config.num_rows(int(each)) for each in frames], dtype=np.int64)
    # Shortest first: attention runs adjacent clips of equal length as one batch.
    order = np.lexsort((valid, lengths))
    frames, lengths, valid = frames[order], lengths[order], valid[order]
    slots = slot_lengths(frames, config)
    starts = np.cumsum(slots) - slots
    packed = np.zeros((int(slots.sum()), features[0].shape[1]), dtype=np.float32)
    for start, number, index in zip(starts, frames, order, strict=True):
        packed[start : start + number] = features[index][:number]
    place, clip = _ramps(lengths)
    conv_slots, conv_rows, conv_length = _convolution(lengths, valid, config.conv_kernel_size)
    return PackedClips(
        features=torch.from_numpy(packed),
        lengths=tuple(lengths.tolist()),
        valid=tuple(valid.tolist()),
        gaps=_gaps(frames, slots, config),
        row_slots=torch.from_numpy(starts[clip] // config.subsampling_factor + place),
        conv_slots=torch.from_numpy(conv_slots),
        conv_rows=torch.from_numpy(conv_rows),
        conv_length=conv_length,
        row_index=torch.from_numpy(_in_given_order(lengths, order)),
    )


def slot_lengths(frames: Indices, config: AudioConfig) -> Indices:
    """Number of frames between the start of each clip and that of the next, int64 [N].

    It is a multiple of the subsampling factor f, so that starts fall on positions of every level.
    Strides of two see one position back from a start, which is a zero of the clip before: before
    the last level there is one behind its valid positions if there are f/2 frames of zeros.

    Args:
        frames: Number of valid frames of each clip, int64 [N].
        config: Settings with the subsampling factor.
    """
    factor = config.subsampling_factor
    return -(-(frames + factor // 2) // factor) * factor


def _gaps(frames: Indices, slots: Indices, config: AudioConfig) -> tuple[Tensor, ...]:
    """Positions of each level that are outside of every clip's valid ones."""
    gaps = []
    for _ in range(config.subsampling_factor.bit_length() - 1):
        frames, slots = (frames + 1) // 2, slots // 2
        place, clip = _ramps(slots)
        gaps.append(torch.from_numpy(np.flatnonzero(place >= frames[clip])))
    return tuple(gaps)


def _convolution(lengths: Indices, valid: Indices, kernel: int) -> tuple[Indices, Indices, int]:
    """`conv_slots`, `conv_rows` and `conv_length` of `PackedClips`, for an odd kernel."""
    reach = kernel // 2
    starts = np.cumsum(lengths + reach) - lengths
    place, clip = _ramps(lengths)
    last = int((lengths + reach).sum()) + reach
    slots = starts[clip] + place
    return np.where(place < valid[clip], slots, last), slots - reach, last + 1


def _in_given_order(lengths: Indices, order: Indices) -> Indices:
    """Index of each row of clips in the order in which they were given."""
    starts = np.empty_like(lengths)
    given = np.empty_like(lengths)
    starts[order], given[order] = np.cumsum(lengths) - lengths, lengths
    place, clip = _ramps(given)
    return starts[clip] + place


def _ramps(counts: Indices) -> tuple[Indices, Indices]:
    """0..count-1 for every count, one after the other, and the index of each entry's count."""
    owner = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - starts[owner], owner
