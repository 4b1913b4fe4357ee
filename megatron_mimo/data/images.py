"""From pictures to packed patches: grids, resizing, and the indices that rows need.

A *grid* is (patch rows, patch columns) of a resized image; with pixel shuffle both are even.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.data.batch import PackedImages
from megatron_mimo.data.config import ImageConfig

Grid = tuple[int, int]

# Mean and standard deviation of the channels that CLIP, and RADIO after it, were trained with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image, resized and cut into patches.

    Attributes:
        grid: Patch rows and columns.
        patches: uint8 [T, 3*P*P] in raster order, channel-major inside a patch; None where the
            pixels are not needed.
    """

    grid: Grid
    patches: NDArray[np.uint8] | None


def target_grid(width: int, height: int, config: ImageConfig) -> Grid:
    """The patch grid that an image is resized to.

    With dynamic resolution each side is its native length rounded to whole units (a patch, or two
    with pixel shuffle), then scaled by one factor into the bounds on the number of patches: up and
    rounded up to reach the minimum, down and rounded down to keep the maximum. Where both cannot
    hold, the maximum does.

    Args:
        width: Pixels, at least 1.
        height: Pixels, at least 1.
        config: Bounds and patch size.
    """
    side = 2 if config.pixel_shuffle else 1
    if not config.dynamic_resolution:
        return config.img_h // config.patch_dim, config.img_w // config.patch_dim
    per_unit = side * side
    native_h, native_w = height / config.unit, width / config.unit
    grid_h, grid_w = max(1, round(native_h)), max(1, round(native_w))
    least = math.ceil(config.min_patches / per_unit)
    if grid_h * grid_w < least:
        factor = math.sqrt(least / (native_h * native_w))
        grid_h, grid_w = math.ceil(native_h * factor), math.ceil(native_w * factor)
    if config.max_patches:
        grid_h, grid_w = _shrink(grid_h, grid_w, config.max_patches // per_unit)
    if config.max_grid:
        longest = config.max_grid // side
        grid_h, grid_w = min(grid_h, longest), min(grid_w, longest)
    return grid_h * side, grid_w * side


def _shrink(grid_h: int, grid_w: int, most: int) -> Grid:
    """Scale both sides by one factor until at most `most` cells are left, one at least per side."""
    if grid_h * grid_w <= most:
        return grid_h, grid_w
    factor = math.sqrt(most / (grid_h * grid_w))
    small_h, small_w = max(1, int(grid_h * factor)), max(1, int(grid_w * factor))
    # A side held at one leaves less to the other than the common factor gives it.
    return min(small_h, max(1, most // small_w)), min(small_w, max(1, most // small_h))


def rows_of(grid: Grid, config: ImageConfig) -> int:
    """Rows that a grid's patches become."""
    return grid[0] * grid[1] // config.patches_per_row


def rows_for(width: int, height: int, config: ImageConfig) -> int:
    """Rows that an image of `width` x `height` pixels becomes."""
    return rows_of(target_grid(width, height, config), config)


def patchify(pixels: NDArray[np.uint8], patch_dim: int) -> NDArray[np.uint8]:
    """Cut an image into square patches.

    Args:
        pixels: uint8 [H, W, 3], sides divisible by the patch size.
        patch_dim: P.

    Returns:
        uint8 [T, 3*P*P], patches in raster order, each (channel, y, x).
    """
    height, width, channels = pixels.shape
    grid_h, grid_w = height // patch_dim, width // patch_dim
    tiles = pixels.reshape(grid_h, patch_dim, grid_w, patch_dim, channels)
    return tiles.transpose(0, 2, 4, 1, 3).reshape(grid_h * grid_w, -1)


def encode_image(image: Image.Image, config: ImageConfig, *, with_patches: bool) -> EncodedImage:
    """Resize an RGB image to its grid and cut it up.

    Args:
        image: In mode RGB.
        config: Grid and patch size.
        with_patches: Without, only the grid is worked out.
    """
    grid = target_grid(image.width, image.height, config)
    if not with_patches:
        return EncodedImage(grid, None)
    size = (grid[1] * config.patch_dim, grid[0] * config.patch_dim)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return EncodedImage(grid, patchify(np.asarray(image), config.patch_dim))


def patch_positions(grids: Sequence[Grid]) -> NDArray[np.int64]:
    """int64 [T, 2]: (row, column) of every patch of images packed end to end."""
    columns = np.array([grid[1] for grid in grids], dtype=np.int64)
    index, image = _ramps(np.array([grid[0] * grid[1] for grid in grids], dtype=np.int64))
    return np.stack(np.divmod(index, columns[image]), axis=1)


def row_index(grids: Sequence[Grid], config: ImageConfig) -> NDArray[np.int64]:
    """int64 [R*k]: the packed patches that rows concatenate (see `PackedImages`)."""
    sizes = np.array(grids, dtype=np.int64).reshape(-1, 2)
    patches = sizes.prod(axis=1)
    if not config.pixel_shuffle:
        return np.arange(patches.sum(), dtype=np.int64)
    starts = np.cumsum(patches) - patches
    index, image = _ramps(patches // 4)
    columns = sizes[image, 1]
    row, column = np.divmod(index, columns // 2)
    corner = starts[image] + 2 * row * columns + 2 * column
    return np.stack([corner, corner + 1, corner + columns, corner + columns + 1], axis=1).ravel()


def _ramps(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """0..count-1 for every count, end to end, and which count each entry belongs to."""
    owner = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - starts[owner], owner


def pack_images(images: Sequence[EncodedImage], config: ImageConfig) -> PackedImages | None:
    """Pack images end to end and normalise them; None for no image.

    Args:
        images: With patches, in manifest order.
        config: That they were encoded with.
    """
    if not images:
        return None
    pixels = [image.patches for image in images if image.patches is not None]
    assert len(pixels) == len(images), "images were encoded without patches"
    grids = [image.grid for image in images]
    lengths = np.array([grid[0] * grid[1] for grid in grids], dtype=np.int32)
    raw = torch.from_numpy(np.concatenate(pixels))
    per_channel = config.patch_dim**2
    mean = torch.tensor(_MEAN).repeat_interleave(per_channel)
    std = torch.tensor(_STD).repeat_interleave(per_channel)
    return PackedImages(
        patches=raw.float().div_(255).sub_(mean).div_(std),
        positions=torch.from_numpy(patch_positions(grids)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        row_index=torch.from_numpy(row_index(grids, config)),
    )
