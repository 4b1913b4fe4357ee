"""Images in one packed (thd) sequence, with every index that the encoder needs.

All indices are computed here, while data is loaded, so that a forward runs only a few gathers for
any number of images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.media.images.config import ImageConfig
from megatron_mimo.media.images.encode import EncodedImage
from megatron_mimo.media.images.grid import Grid
from megatron_mimo.media.video.clip import EncodedVideo

Indices = NDArray[np.int64]
Weights = NDArray[np.float32]

# Ranges that RADIO draws a crop of its position table from, as megatron-core's `RADIOViTModel`.
_SCALES = (math.sqrt(0.1), 1.0)
_LOG_ASPECTS = (math.log(3 / 4), math.log(4 / 3))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedImages:
    """Images and videos that one rank runs in a microbatch, packed one after the other.

    N pieces (images, tiles of them, or groups of F frames of a video), T patches, L = T + N*c
    tokens: each piece's c class tokens are before its patches. Rows follow the order of items, and
    so do patches, of all images and then of all videos; tokens have the shortest piece first.

    Attributes:
        patches: Normalised patches of images, float32 [T_i, 3*P*P], each (channel, y, x).
        groups: Normalised patches of videos, float32 [T - T_i, F*3*P*P], each
            (frame, channel, y, x); None without videos.
        lengths: Numbers of tokens of the pieces, ascending, on the host.
        cu_seqlens: First token of each piece, and L, int32 [N+1].
        patch_slots: Index of each patch among the tokens, int64 [T].
        class_slots: Indices of the class tokens among the tokens, piece by piece, int64 [N*c].
        class_index: Which of the c class tokens each is, int64 [N*c]; None for all of them in order
            for every piece.
        row_index: Tokens that rows concatenate, int64 [R*k]. Rows of a piece are in raster order,
            the four patches of a row in the order (0,0), (0,1), (1,0), (1,1).
        position_index: Cells of the position table, row after row, that a patch's position
            embedding is interpolated from, int64 [T, 4].
        position_weight: Weights of these cells, float32 [T, 4].
    """

    patches: Tensor
    groups: Tensor | None = None
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    patch_slots: Tensor
    class_slots: Tensor
    class_index: Tensor | None = None
    row_index: Tensor
    position_index: Tensor
    position_weight: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens, L."""
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Number of tokens of the largest piece."""
        return max(self.lengths)


def pack_images(
    items: Sequence[EncodedImage | EncodedVideo], config: ImageConfig, seeds: Sequence[int] = ()
) -> PackedImages | None:
    """Pack images and videos one after the other and normalise them; None for no item.

    Args:
        items: Images and videos with patches, in manifest order.
        config: Settings that images were encoded with.
        seeds: Seed of each item for its crops of the position table, one for each image and for
            each video; needed with `config.position_crop`.
    """
    if not items:
        return None
    of_images = [_content(item) for item in items if isinstance(item, EncodedImage)]
    of_videos = [_content(item) for item in items if isinstance(item, EncodedVideo)]
    draws = None
    if config.position_crop:
        draws = np.concatenate(
            [_draws(item, seed) for item, seed in zip(items, seeds, strict=True)]
        )
    return pack_patches(
        _normalised(of_images, config, width=3 * config.patch_dim**2),
        [grid for item in items for grid in grids_of(item)],
        config,
        draws,
        groups=_normalised(of_videos, config) if of_videos else None,
        of_video=[isinstance(item, EncodedVideo) for item in items for _ in grids_of(item)],
    )


def grids_of(item: EncodedImage | EncodedVideo) -> Sequence[Grid]:
    """The grid of each piece of an item, with its content or without."""
    return item.grids if isinstance(item, EncodedImage) else [item.grid] * len(item.labels)


def _content(item: EncodedImage | EncodedVideo) -> NDArray[Any]:
    assert item.patches is not None, "items were encoded without patches"
    return item.patches


def _draws(item: EncodedImage | EncodedVideo, seed: int) -> NDArray[np.float64]:
    """Random numbers of each piece of an item, [pieces, 4]; all groups of a video have the same."""
    rng = np.random.default_rng(seed)
    if isinstance(item, EncodedVideo):
        return np.repeat(rng.random((1, 4)), len(item.labels), axis=0)
    return rng.random((len(item.grids), 4))


def _normalised(patches: Sequence[NDArray[Any]], config: ImageConfig, width: int = 0) -> Tensor:
    """Normalised patches of several items; [0, width] of none."""
    if not patches:
        return torch.zeros(0, width)
    return normalise(torch.from_numpy(np.concatenate(patches)).float().div_(255), config)


def normalise(patches: Tensor, config: ImageConfig) -> Tensor:
    """Normalised patches: float32 [T, F*3*P*P] minus the channels' mean, over their deviation."""
    per_channel = config.patch_dim**2
    frames = patches.size(1) // (3 * per_channel)
    mean = torch.tensor(config.pixel_mean).repeat_interleave(per_channel).repeat(frames).to(patches)
    std = torch.tensor(config.pixel_std).repeat_interleave(per_channel).repeat(frames).to(patches)
    return (patches - mean).div_(std)


def pack_patches(
    patches: Tensor,
    grids: Sequence[Grid],
    config: ImageConfig,
    draws: NDArray[np.float64] | None = None,
    *,
    groups: Tensor | None = None,
    of_video: Sequence[bool] = (),
) -> PackedImages:
    """Pack normalised patches [T_i, 3*P*P] of pieces with the given grids.

    Args:
        patches: Patches of all images, one after the other, float32 [T_i, 3*P*P].
        grids: Grid of each piece; at least one.
        config: Class tokens, row order and position table.
        draws: Random numbers in [0, 1), [N, 4], for crops of the position table; None uses the
            whole table.
        groups: Patches of all videos, one after the other, float32 [T - T_i, F*3*P*P]; None without
            videos.
        of_video: Whether each piece is a group of frames; needed with `groups`.
    """
    sizes = np.array(grids, dtype=np.int64).reshape(-1, 2)
    counts, extra = sizes.prod(axis=1), config.class_token_len
    # Shortest first: attention runs adjacent pieces of equal length as one batch.
    order = np.argsort(counts, kind="stable")
    lengths = counts[order] + extra
    starts = np.empty_like(counts)
    starts[order] = np.cumsum(lengths) - lengths
    place, piece = _ramps(counts)
    if draws is None:
        index, weight = position_taps(sizes, config.position_grid)
    else:
        index, weight = cropped_taps(sizes, config.position_grid, draws)
    slots = starts[piece] + extra + place
    if groups is not None:
        order_of_patches = np.argsort(np.array(of_video)[piece], kind="stable")
        slots, index = slots[order_of_patches], index[order_of_patches]
        weight = weight[order_of_patches]
    return PackedImages(
        patches=patches,
        groups=groups,
        lengths=tuple(lengths.tolist()),
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)),
        patch_slots=torch.from_numpy(slots),
        class_slots=torch.from_numpy((starts[:, None] + np.arange(extra)).ravel()),
        row_index=torch.from_numpy(row_index(sizes, starts + extra, config)),
        position_index=torch.from_numpy(index),
        position_weight=torch.from_numpy(weight),
    )


def row_index(sizes: Indices, starts: Indices, config: ImageConfig) -> Indices:
    """The tokens that rows concatenate (see `PackedImages`), int64 [R*k].

    Args:
        sizes: Grids, int64 [N, 2].
        starts: Index among the tokens of the first patch of each piece, int64 [N].
        config: Settings with the row order.
    """
    counts = sizes.prod(axis=1)
    if not config.pixel_shuffle or config.row_order == "megatron":
        place, piece = _ramps(counts)
        return starts[piece] + place
    place, piece = _ramps(counts // 4)
    columns = sizes[piece, 1]
    row, column = np.divmod(place, columns // 2)
    corner = starts[piece] + 2 * row * columns + 2 * column
    return np.stack([corner, corner + 1, corner + columns, corner + columns + 1], axis=1).ravel()


def position_taps(sizes: Indices, table: int) -> tuple[Indices, Weights]:
    """Cells of the position table that the embedding of every patch is interpolated from.

    A piece whose longer side has m patches uses the table resized to m x m (bilinear, corners not
    aligned), of which it uses the top left part. The arithmetic is that of torch's `interpolate`
    in float32, as transformers' `RadioModel` calls it.

    Args:
        sizes: Grids, int64 [N, 2].
        table: Number of rows, and of columns, of the table.

    Returns:
        Cells, int64 [T, 4], and their weights, float32 [T, 4].
    """
    longest = sizes.max(axis=1)
    row, column, piece = _coordinates(sizes)
    scale = np.float32(table) / longest.astype(np.float32)
    half = np.float32(0.5)
    down, across = (
        np.maximum(scale[piece] * (along.astype(np.float32) + half) - half, np.float32(0))
        for along in (row, column)
    )
    return _bilinear(down, across, table)


def cropped_taps(sizes: Indices, table: int, draws: NDArray[np.float64]) -> tuple[Indices, Weights]:
    """`position_taps` for a random part of the table, one for each piece, stretched over it.

    A part covers a share of the table between 0.1 and 1, its shape between 3:4 and 4:3 (corners
    aligned), as in training with megatron-core's `RADIOViTModel`.

    Args:
        sizes: Grids, int64 [N, 2].
        table: Number of rows, and of columns, of the table.
        draws: Random numbers in [0, 1), [N, 4]: scale, shape, and position of the part.
    """
    scale = _SCALES[0] + draws[:, 0] * (_SCALES[1] - _SCALES[0])
    aspect = np.exp(_LOG_ASPECTS[0] + draws[:, 1] * (_LOG_ASPECTS[1] - _LOG_ASPECTS[0]))
    extent = np.stack([scale / aspect, scale * aspect], axis=1).clip(0, 1)
    origin = draws[:, 2:] * (1 - extent)
    row, column, piece = _coordinates(sizes)
    # A side of one patch uses the start of its part.
    steps = np.maximum(sizes - 1, 1)
    down, across = (
        ((along / steps[piece, axis]) * extent[piece, axis] + origin[piece, axis]) * (table - 1)
        for axis, along in enumerate((row, column))
    )
    return _bilinear(down.astype(np.float32), across.astype(np.float32), table)


def _coordinates(sizes: Indices) -> tuple[Indices, Indices, Indices]:
    """Row, column and piece of every patch."""
    place, piece = _ramps(sizes.prod(axis=1))
    row, column = np.divmod(place, sizes[piece, 1])
    return row, column, piece


def _bilinear(rows: Weights, columns: Weights, table: int) -> tuple[Indices, Weights]:
    """The four cells around points [T] inside a table, and their weights."""
    (top, bottom, down), (left, right, across) = (_between(at, table) for at in (rows, columns))
    one = np.float32(1)
    index = np.stack([top + left, top + right, bottom + left, bottom + right], axis=1)
    index[:, :2] += top[:, None] * (table - 1)
    index[:, 2:] += bottom[:, None] * (table - 1)
    weight = np.stack(
        [
            (one - down) * (one - across),
            (one - down) * across,
            down * (one - across),
            down * across,
        ],
        axis=1,
    )
    return index, weight


def _between(points: Weights, table: int) -> tuple[Indices, Indices, Weights]:
    """The cells before and after each point, and its distance from the former as a fraction."""
    before = np.minimum(points.astype(np.int64), table - 1)
    return before, np.minimum(before + 1, table - 1), points - before.astype(np.float32)


def _ramps(counts: Indices) -> tuple[Indices, Indices]:
    """0..count-1 for every count, one after the other, and the index of each entry's count."""
    owner = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - starts[owner], owner
