"""Conversion of image files to packed patches and indices for an encoder, without modules."""

from megatron_mimo.media.images.config import ImageConfig
from megatron_mimo.media.images.decode import (
    BrokenImageError,
    ImageSource,
    blank_image,
    decode_image,
    examine_image,
)
from megatron_mimo.media.images.encode import EncodedImage, encode_image
from megatron_mimo.media.images.grid import Grid, image_grids, rows_for, rows_of
from megatron_mimo.media.images.input import IMAGE_ENDINGS, ImageInput, ImageTagType
from megatron_mimo.media.images.packing import PackedImages, pack_images

__all__ = [
    "IMAGE_ENDINGS",
    "BrokenImageError",
    "EncodedImage",
    "Grid",
    "ImageConfig",
    "ImageInput",
    "ImageSource",
    "ImageTagType",
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
