"""Image files: their size from the header, and their pixels as RGB."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from megatron_mimo.images.structure import UNKNOWN_FORMAT, structure_flaw

ImageSource = bytes | NDArray[np.uint8]

# Orientations that lie on their side: height and width change places.
_SIDEWAYS = (5, 6, 7, 8)
_WHITE = (255, 255, 255, 255)


class BrokenImageError(Exception):
    """An image file that does not decode."""


def examine_image(image: ImageSource) -> tuple[int, int]:
    """Width and height in pixels, upright, of an image that looks whole.

    Of a file, the header and the frame of its format are read, which finds it cut short or, where
    the format carries checksums, changed; its pixels are not decoded, unless the format has no such
    frame. What passes almost always decodes, and every reader asks this first.

    Raises:
        BrokenImageError: The file is corrupt, cut short, or no image.
    """
    if not isinstance(image, bytes):
        return image.shape[1], image.shape[0]
    with _opened(image) as opened:
        width, height = opened.size
        upright = (height, width) if _orientation(opened) in _SIDEWAYS else (width, height)
        flaw = structure_flaw(image, opened)
    if flaw == UNKNOWN_FORMAT:
        return decode_image(image).size
    if flaw is not None:
        raise _broken(image, flaw)
    return upright


def blank_image(width: int, height: int) -> Image.Image:
    """Mid-grey, in mode RGB."""
    return Image.new("RGB", (width, height), (128, 128, 128))


def decode_image(image: ImageSource) -> Image.Image:
    """Decode an image file, or wrap uint8 pixels [H, W, 3]; upright, in mode RGB.

    Transparent pixels show white. Samples of more than 8 bits are scaled to 8. Of an animation the
    first frame is taken.

    Raises:
        BrokenImageError: The file is corrupt, cut short, or no image.
    """
    if not isinstance(image, bytes):
        return Image.fromarray(image, mode="RGB")
    with _opened(image) as opened:
        # Asked before the pixels are read: an orientation that follows them is not in the header.
        orientation = _orientation(opened)
        upright = _to_rgb(opened)
        upright.getexif()[ExifTags.Base.Orientation] = orientation
        return ImageOps.exif_transpose(upright)


@contextmanager
def _opened(image: bytes) -> Iterator[ImageFile.ImageFile]:
    try:
        with warnings.catch_warnings():
            # A picture too large to be honest is broken, not worth a warning.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image)) as opened:
                yield opened
        return
    except UnidentifiedImageError:
        # Its own message names an object in memory.
        reason = "no known image format"
    # PIL's decoders raise nearly anything on broken bytes.
    except Exception as error:
        reason = str(error) or type(error).__name__
    raise _broken(image, reason)


def _broken(image: bytes, reason: str) -> BrokenImageError:
    return BrokenImageError(f"image of {len(image)} bytes does not decode: {reason}")


def _orientation(opened: Image.Image) -> int:
    """The Exif orientation that stands before the pixels; 1, upright, where there is none."""
    # PIL turns TIFF files itself.
    if opened.format == "TIFF":
        return 1
    # PNG files may carry it behind the pixels, and asking would decode them all.
    if opened.format == "PNG" and not {"exif", "Raw profile type exif"} & opened.info.keys():
        return 1
    return int(opened.getexif().get(ExifTags.Base.Orientation, 1))


def _to_rgb(opened: Image.Image) -> Image.Image:
    if opened.mode.startswith(("I", "F")):
        return _from_deep_grey(opened)
    if opened.has_transparency_data:
        above = opened.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, _WHITE), above).convert("RGB")
    return opened.convert("RGB")


def _from_deep_grey(opened: Image.Image) -> Image.Image:
    """One channel of 16 or 32 bits; PIL would clip it at 255."""
    pixels = np.asarray(opened)
    if np.issubdtype(pixels.dtype, np.floating):
        # TIFF files of floats hold [0, 1]; there is no other convention.
        scaled = np.nan_to_num(pixels).clip(0, 1) * 255
    else:
        # PIL hands 16-bit PNG files out as 16 or as 32 bits, by its version.
        scaled = pixels.clip(0, 65535) / 257
    return Image.fromarray(np.rint(scaled).astype(np.uint8), mode="L").convert("RGB")
