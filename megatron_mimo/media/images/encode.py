"""Resizing an image to its grid, and cutting it into patches."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.media.images.config import ImageConfig
from megatron_mimo.media.images.grid import Grid, image_grids, rows_of, tile_layout

# Of a channel, 0 to 255; float32 beyond these bounds where an image was resized without rounding.
Pixels = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image, resized and cut into patches.

    Attributes:
        grids: Numbers of patch rows and columns of each piece: tiles in raster order, then the
            thumbnail; one piece without tiling.
        rows: Number of rows that the encoder produces from it.
        patches: Patches, uint8 or float32 [T, 3*P*P] of 0 to 255, piece after piece, in raster
            order, each (channel, y, x); None where the pixels are not needed.
    """

    grids: tuple[Grid, ...]
    rows: int
    patches: Pixels | None


def encode_image(image: Image.Image, config: ImageConfig, *, with_patches: bool) -> EncodedImage:
    """Resize an RGB image to its grid and cut it up.

    Args:
        image: Image in mode RGB.
        config: Mode, grid and patch size.
        with_patches: Whether to compute patches; otherwise only grids are computed.
    """
    grids = image_grids(image.width, image.height, config)
    patches = None
    if with_patches:
        pieces = _pieces(image, grids, config)
        patches = np.concatenate([patchify(piece, config.patch_dim) for piece in pieces])
    return EncodedImage(grids, rows_of(grids, config), patches)


def patchify(pixels: Pixels, patch_dim: int) -> Pixels:
    """Cut an image into square patches.

    Args:
        pixels: Pixels, uint8 or float32 [H, W, 3], with sides divisible by the patch size.
        patch_dim: Side of a patch in pixels, P.

    Returns:
        Patches in raster order, [T, 3*P*P] of the same dtype, each (channel, y, x).
    """
    patches: Pixels = rearrange(
        pixels, "(row y) (column x) c -> (row column) (c y x)", y=patch_dim, x=patch_dim
    )
    return patches


def _pieces(image: Image.Image, grids: tuple[Grid, ...], config: ImageConfig) -> list[Pixels]:
    height, width = (side * config.patch_dim for side in grids[0])
    if config.dynamic_resolution and config.grid_rule == "nemotron-omni":
        return [_resized_unrounded(image, width, height)]
    return [np.asarray(piece) for piece in _rounded_pieces(image, grids, config)]


def _rounded_pieces(
    image: Image.Image, grids: tuple[Grid, ...], config: ImageConfig
) -> list[Image.Image]:
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


def _resized_unrounded(image: Image.Image, width: int, height: int) -> Pixels:
    """Pixels [H, W, 3] of a resized image, as transformers' processor for Nemotron H Omni models.

    They are float32 where the size changes: neither rounded, nor clipped to 0 and 255 beside edges.
    """
    pixels: NDArray[np.uint8] = np.asarray(image)
    if image.size == (width, height):
        return pixels
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    planes = F.interpolate(
        planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    resized: NDArray[np.float32] = planes[0].permute(1, 2, 0).numpy()
    return resized
