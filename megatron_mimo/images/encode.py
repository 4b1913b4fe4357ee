"""Resizing an image to its grid, and cutting it into patches."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.images.config import ImageConfig
from megatron_mimo.images.grid import Grid, image_grids, rows_of, tile_layout


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image, resized and cut into patches.

    Attributes:
        grids: Patch rows and columns of each piece: tiles in raster order, then the thumbnail; one
            piece without tiling.
        rows: Rows that the encoder makes of it.
        patches: uint8 [T, 3*P*P], pieces end to end, patches in raster order, each (channel, y, x);
            None where the pixels are not needed.
    """

    grids: tuple[Grid, ...]
    rows: int
    patches: NDArray[np.uint8] | None


def encode_image(image: Image.Image, config: ImageConfig, *, with_patches: bool) -> EncodedImage:
    """Resize an RGB image to its grid and cut it up.

    Args:
        image: In mode RGB.
        config: Mode, grid and patch size.
        with_patches: Without, only the grids are worked out.
    """
    grids = image_grids(image.width, image.height, config)
    patches = None
    if with_patches:
        pieces = _pieces(image, grids, config)
        patches = np.concatenate(
            [patchify(np.asarray(piece), config.patch_dim) for piece in pieces]
        )
    return EncodedImage(grids, rows_of(grids, config), patches)


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


def _pieces(image: Image.Image, grids: tuple[Grid, ...], config: ImageConfig) -> list[Image.Image]:
    height, width = (side * config.patch_dim for side in grids[0])
    if len(grids) == 1:
        return [_resized(image, width, height)]
    rows, columns = tile_layout(image.width, image.height, config)
    whole = _resized(image, columns * width, rows * height)
    pieces = [
        whole.crop((x, y, x + width, y + height))
        for y in range(0, rows * height, height)
        for x in range(0, columns * width, width)
    ]
    return [*pieces, _resized(image, width, height)] if config.use_thumbnail else pieces


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
