"""Image files: their size from the header, and their pixels as RGB."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from megatron_mimo.media.images.structure import appears_whole
from megatron_mimo.media.items import BrokenItemError

ImageSource = bytes | NDArray[np.uint8]

# How a picture is turned upright, by its Exif orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations that are rotated by 90 degrees: height and width are exchanged.
_SIDEWAYS = (5, 6, 7, 8)
_WHITE = (255, 255, 255, 255)
# Formats that PIL runs another program for.
_PROGRAMS = ("EPS",)


class BrokenImageError(BrokenItemError):
    """An image file that cannot be decoded."""


def examine_image(image: ImageSource) -> tuple[int, int]:
    """Width and height in pixels, upright, of an image that appears complete.

    The header and the structure of the file format are read. Pixels are decoded only where the
    structure has a flaw, or the format has none that could be checked: then decoding decides. So
    nothing is refused that can be decoded, and a file that passes can almost always be decoded.
    Every reader checks this first.

    Raises:
        BrokenImageError: The file is corrupt, truncated, or not an image.
    """
    if not isinstance(image, bytes):
        return image.shape[1], image.shape[0]
    with _opened(image) as opened:
        width, height = opened.size
        upright = (height, width) if _orientation(opened) in _SIDEWAYS else (width, height)
        whole = appears_whole(image, opened)
    return upright if whole else decode_image(image).size


def blank_image(width: int, height: int) -> Image.Image:
    """A grey image in mode RGB; width and height in pixels."""
    return Image.new("RGB", (width, height), (128, 128, 128))


def decode_image(image: ImageSource) -> Image.Image:
    """Decode an image file, or wrap uint8 pixels [H, W, 3]; upright, in mode RGB.

    Transparent pixels show white. Samples of more than 8 bits are scaled to 8. Of an animation the
    first frame is used.

    Raises:
        BrokenImageError: The file is corrupt, truncated, or not an image.
    """
    if not isinstance(image, bytes):
        return Image.fromarray(image, mode="RGB")
    with _opened(image) as opened:
        # Read before the pixels: an orientation that follows them is not in the header.
        orientation = _orientation(opened)
        picture = _to_rgb(opened)
        turn = _UPRIGHT.get(orientation)
        return picture if turn is None else picture.transpose(turn)


def decode_or_blank(source: ImageSource, size: tuple[int, int]) -> tuple[Image.Image, str | None]:
    """The picture, or a blank of its size and the reason.

    Args:
        source: Contents of an image file, or pixels, uint8 [H, W, 3].
        size: Width and height in pixels, from `examine_image`.
    """
    try:
        decoded = decode_image(source)
    except BrokenImageError as error:
        return blank_image(*size), f"{error}; a blank stands in its place"
    if decoded.size != size:
        found = "decodes to {} x {} pixels".format(*decoded.size)
        return blank_image(*size), f"image of {size[0]} x {size[1]} pixels {found}: a blank stands"
    return decoded, None


@contextmanager
def _opened(image: bytes) -> Iterator[ImageFile.ImageFile]:
    try:
        with warnings.catch_warnings():
            # PIL warns of damaged metadata, which decide nothing here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image)) as opened:
                _require_plausible(opened)
                yield opened
        return
    except UnidentifiedImageError:
        # PIL's message names an object in memory.
        reason = "no known image format"
    # PIL's decoders raise nearly anything on broken bytes.
    except Exception as error:
        reason = str(error) or type(error).__name__
    raise _broken(image, reason)


def _require_plausible(opened: ImageFile.ImageFile) -> None:
    width, height = opened.size
    most = Image.MAX_IMAGE_PIXELS
    if not width * height:
        raise ValueError("it has no pixels")
    if most is not None and width * height > most:
        raise ValueError(f"{width} x {height} pixels: more than {most} are taken for an attack")
    if opened.format in _PROGRAMS:
        raise ValueError(f"{opened.format} files are programs, which are not run")


def _broken(image: bytes, reason: str) -> BrokenImageError:
    return BrokenImageError(f"image of {len(image)} bytes does not decode: {reason}")


def _orientation(opened: Image.Image) -> int:
    """The Exif orientation stored before the pixels; 1, upright, where there is none that counts.

    Metadata that cannot be read say nothing about the pixels: the picture is taken as it is stored.
    """
    # PIL rotates TIFF files itself.
    if opened.format == "TIFF":
        return 1
    # PNG files may store it after the pixels, and reading it would decode all of them.
    if opened.format == "PNG" and not {"exif", "Raw profile type exif"} & opened.info.keys():
        return 1
    try:
        found = opened.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _UPRIGHT else 1
    # PIL raises nearly anything on broken metadata.
    except Exception:
        return 1


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
        # PIL returns 16-bit PNG files as 16 or as 32 bits, depending on its version.
        scaled = pixels.clip(0, 65535) / 257
    return Image.fromarray(np.rint(scaled).astype(np.uint8), mode="L").convert("RGB")
