"""Checks that an image file is complete by the structure of its format, without decoding it."""

import struct
import zlib
from collections.abc import Callable, Mapping
from enum import IntEnum

from PIL import ImageFile

_PNG_SIGNATURE = 8
_JPEG_START_OF_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
# Markers of a JPEG file that have no length: TEM, RST0 to RST7, SOI, EOI.
_JPEG_BARE = {0x01, *range(0xD0, 0xDA)}
# Number of bytes of a pixel by the name of PIL's raw decoder.
_RAW_BYTES = {"L": 1, "RGB": 3, "BGR": 3, "BGRX": 4, "BGRA": 4, "I;16B": 2}


class _Block(IntEnum):
    """First byte of a GIF's block."""

    EXTENSION = 0x21
    IMAGE = 0x2C
    TRAILER = 0x3B


def appears_whole(data: bytes, opened: ImageFile.ImageFile) -> bool:
    """Whether the structure of a file has no flaw; False if only decoding can find one.

    Args:
        data: Contents of the file.
        opened: The same file as PIL opens it, with its header read.
    """
    check = _CHECKS.get(opened.format or "")
    if check is None:
        return False
    try:
        return check(data, opened)
    # Numbers of a damaged file lead anywhere.
    except Exception:
        return False


def _png(data: bytes, opened: ImageFile.ImageFile) -> bool:
    """Require chunks with correct checksums up to the last one, and pixels among them."""
    at, has_pixels = _PNG_SIGNATURE, False
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 4 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(body) != checksum:
            return False
        if kind == b"IEND":
            return has_pixels
        has_pixels |= kind == b"IDAT"
        at += length + 12


def _jpeg(data: bytes, opened: ImageFile.ImageFile) -> bool:
    """Require segments up to the first scan, and the end marker after it; more may follow.

    A thumbnail has such a marker too, but is inside a segment, which is skipped.
    """
    at = 2
    while True:
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        # Any number of 0xFF may precede a marker.
        if marker == 0xFF:
            at += 1
            continue
        if marker == _JPEG_START_OF_SCAN:
            return data.find(_JPEG_END, at) >= 0
        at += 2
        if marker not in _JPEG_BARE:
            at += struct.unpack_from(">H", data, at)[0]


def _webp(data: bytes, opened: ImageFile.ImageFile) -> bool:
    (size,) = struct.unpack_from("<I", data, 4)
    return bool(len(data) >= size + 8)


def _gif(data: bytes, opened: ImageFile.ImageFile) -> bool:
    """Require blocks up to the trailer, with an image among them."""
    at, has_image = 13 + _colour_table(data[10]), False
    while data[at] != _Block.TRAILER:
        match data[at]:
            case _Block.EXTENSION:
                at += 2
            case _Block.IMAGE:
                at += 10 + _colour_table(data[at + 9]) + 1
                has_image = True
            case _:
                return False
        while length := data[at]:
            at += 1 + length
        at += 1
    return has_image


def _colour_table(flags: int) -> int:
    """Number of bytes of a GIF's colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _uncompressed(data: bytes, opened: ImageFile.ImageFile) -> bool:
    """Require as many bytes after the header as the pixels need."""
    ((decoder, extent, offset, arguments),) = opened.tile
    if decoder != "raw" or extent is None:
        return False
    left, top, right, bottom = extent
    if isinstance(arguments, str):
        arguments = (arguments, 0)
    assert arguments is not None
    raw_mode, stride = arguments[:2]
    if not stride and raw_mode not in _RAW_BYTES:
        return False
    row = stride or (right - left) * _RAW_BYTES[raw_mode]
    return bool(len(data) - offset >= row * (bottom - top))


_CHECKS: Mapping[str, Callable[[bytes, ImageFile.ImageFile], bool]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _uncompressed,
    "PPM": _uncompressed,
}
