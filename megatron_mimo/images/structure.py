"""Whether an image file is whole, judged by the frame of its format, without decoding pixels."""

import struct
import zlib
from collections.abc import Callable, Mapping
from enum import IntEnum

from PIL import ImageFile

UNKNOWN_FORMAT = "unknown format"

_PNG_SIGNATURE = 8
_JPEG_START_OF_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
# Markers of a JPEG file that have no length: TEM, RST0 to RST7, SOI, EOI.
_JPEG_BARE = {0x01, *range(0xD0, 0xDA)}
# Bytes of a pixel as PIL's raw decoder names them.
_RAW_BYTES = {"L": 1, "RGB": 3, "BGR": 3, "BGRX": 4, "BGRA": 4, "I;16B": 2}


class _Block(IntEnum):
    """First byte of a GIF's block."""

    EXTENSION = 0x21
    IMAGE = 0x2C
    TRAILER = 0x3B


def structure_flaw(data: bytes, opened: ImageFile.ImageFile) -> str | None:
    """What is wrong with a file's frame; `UNKNOWN_FORMAT` if only decoding can tell.

    Args:
        data: The file.
        opened: The same, as PIL opens it, header read.
    """
    check = _CHECKS.get(opened.format or "")
    if check is None:
        return UNKNOWN_FORMAT
    try:
        return check(data, opened)
    except (IndexError, struct.error):
        return "cut short"


def _png(data: bytes, opened: ImageFile.ImageFile) -> str | None:
    """Chunks with right checksums up to the last, pixels among them."""
    at, has_pixels = _PNG_SIGNATURE, False
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 4 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(body) != checksum:
            return f"wrong checksum of its chunk {kind.decode('latin-1')}"
        if kind == b"IEND":
            return None if has_pixels else "no pixels"
        has_pixels |= kind == b"IDAT"
        at += length + 12


def _jpeg(data: bytes, opened: ImageFile.ImageFile) -> str | None:
    """Segments up to the first scan, and behind it the mark of the end, whatever follows that.

    A thumbnail has such a mark too, but stands in a segment, which is stepped over.
    """
    at = 2
    while True:
        if data[at] != 0xFF:
            return "no marker where one belongs"
        marker = data[at + 1]
        # Any number of 0xFF may stand before a marker.
        if marker == 0xFF:
            at += 1
            continue
        if marker == _JPEG_START_OF_SCAN:
            return None if data.find(_JPEG_END, at) >= 0 else "cut short"
        at += 2
        if marker not in _JPEG_BARE:
            at += struct.unpack_from(">H", data, at)[0]


def _webp(data: bytes, opened: ImageFile.ImageFile) -> str | None:
    (size,) = struct.unpack_from("<I", data, 4)
    return None if len(data) >= size + 8 else "cut short"


def _gif(data: bytes, opened: ImageFile.ImageFile) -> str | None:
    """Blocks up to the trailer, an image among them."""
    at, has_image = 13 + _colour_table(data[10]), False
    while data[at] != _Block.TRAILER:
        match data[at]:
            case _Block.EXTENSION:
                at += 2
            case _Block.IMAGE:
                at += 10 + _colour_table(data[at + 9]) + 1
                has_image = True
            case other:
                return f"a block of kind {other}"
        while length := data[at]:
            at += 1 + length
        at += 1
    return None if has_image else "no image"


def _colour_table(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _uncompressed(data: bytes, opened: ImageFile.ImageFile) -> str | None:
    """As many bytes behind the header as the pixels take."""
    ((decoder, extent, offset, arguments),) = opened.tile
    if decoder != "raw" or extent is None:
        return UNKNOWN_FORMAT
    left, top, right, bottom = extent
    if isinstance(arguments, str):
        arguments = (arguments, 0)
    assert arguments is not None
    raw_mode, stride = arguments[:2]
    if not stride and raw_mode not in _RAW_BYTES:
        return UNKNOWN_FORMAT
    row = stride or (right - left) * _RAW_BYTES[raw_mode]
    return None if len(data) - offset >= row * (bottom - top) else "cut short"


_CHECKS: Mapping[str, Callable[[bytes, ImageFile.ImageFile], str | None]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _uncompressed,
    "PPM": _uncompressed,
}
