"""From picture files to packed patches and the indices that an encoder needs. No modules."""

from megatron_mimo.images.config import ImageConfig
from megatron_mimo.images.decode import (
    BrokenImageError,
    ImageSource,
    blank_image,
    decode_image,
    examine_image,
)
from megatron_mimo.images.encode import EncodedImage, encode_image
from megatron_mimo.images.grid import Grid, image_grids, rows_for, rows_of
from megatron_mimo.images.packing import PackedImages, pack_images

__all__ = [
    "BrokenImageError",
    "EncodedImage",
    "Grid",
    "ImageConfig",
    "ImageSource",
    "PackedImages",
    "blank_image",
    "decode_image",
    "encode_image",
    "examine_image",
    "image_grids",
    "pack_images",
    "rows_for",
    "rows_of",
]
