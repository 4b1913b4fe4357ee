"""From picture files to packed patches and the indices that an encoder needs. No modules."""

from megatron_mimo.images.config import ImageConfig
from megatron_mimo.images.decode import BrokenImageError, decode_image, image_size
from megatron_mimo.images.encode import EncodedImage, encode_image
from megatron_mimo.images.grid import Grid, image_grids, rows_for
from megatron_mimo.images.packing import PackedImages, pack_images

__all__ = [
    "BrokenImageError",
    "EncodedImage",
    "Grid",
    "ImageConfig",
    "PackedImages",
    "decode_image",
    "encode_image",
    "image_grids",
    "image_size",
    "pack_images",
    "rows_for",
]
