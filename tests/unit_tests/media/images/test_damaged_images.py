"""Damaged files: what PIL decodes is taken with PIL's pixels, and nothing else is."""

import io
import random
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from megatron_mimo.media.images import BrokenImageError, ImageInput, decode_image, examine_image
from tests.properties import examples

KINDS = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB"),
    "TIFF": ("L", "RGB", "CMYK"),
}
WITH_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")


def saved(
    kind: str, mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: object
) -> bytes:
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(file, kind, **options)
    return file.getvalue()


def segment(payload: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


def tiff(entry: bytes) -> bytes:
    """An Exif block of one entry."""
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)


def by_pil(file: bytes) -> Image.Image | None:
    """The picture as PIL decodes it, not turned; None if it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(file)) as opened:
                opened.load()
                return opened.copy() if opened.width * opened.height else None
        except Exception:
            return None


def as_stored(file: bytes) -> np.ndarray | None:
    """Pixels of PIL, with white behind transparent ones."""
    picture = by_pil(file)
    if picture is None:
        return None
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return np.asarray(picture.convert("RGB"))


def taken(file: bytes) -> np.ndarray | None:
    """Pixels with which a sample of this file trains; None if it is refused or a blank trains."""
    kind = ImageInput()
    try:
        width, height = kind.examine(file)
    except BrokenImageError:
        return None
    _, reason = kind.encode(file, (width, height), with_content=True)
    if reason is not None:
        return None
    decoded = decode_image(file)
    assert decoded.size == (width, height)
    return np.asarray(decoded)


# -- metadata --------------------------------------------------------------------------------------

PLAIN = saved("JPEG")
JUNK = {
    "zeros": PLAIN[:2] + segment(b"Exif\0\0" + bytes(64)) + PLAIN[2:],
    "no TIFF": PLAIN[:2] + segment(b"Exif\0\0garbage-not-tiff") + PLAIN[2:],
    "orientation as byte": PLAIN[:2]
    + segment(tiff(struct.pack("<HHI4s", 0x112, 1, 1, b"\6\0\0\0")))
    + PLAIN[2:],
    "orientation as text": PLAIN[:2]
    + segment(tiff(struct.pack("<HHI4s", 0x112, 2, 4, b"top\0")))
    + PLAIN[2:],
    "orientation 99": PLAIN[:2]
    + segment(tiff(struct.pack("<HHIHH", 0x112, 3, 1, 99, 0)))
    + PLAIN[2:],
    "WebP": saved("WEBP", exif=b"junkjunkjunk"),
    "PNG": saved("PNG", exif=b"junkjunkjunk"),
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_in_metadata_leaves_the_pixels_as_they_are(name: str) -> None:
    found, expected = taken(JUNK[name]), as_stored(JUNK[name])
    assert found is not None and expected is not None
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_an_orientation_that_can_be_read_turns_the_picture_as_pil_does(kind: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        file = saved(kind, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
        np.testing.assert_array_equal(taken(file), np.asarray(upright))


def test_a_flaw_that_decoding_does_not_meet_is_none() -> None:
    file = saved("PNG")
    wrong = file[:-4] + b"\0\0\0\0"
    assert wrong != file
    for whole in (wrong, file[:-12], saved("GIF")[:-1], saved("BMP") + b"more"):
        assert by_pil(whole) is not None
        np.testing.assert_array_equal(taken(whole), as_stored(whole))


def test_a_program_is_no_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(BrokenImageError, match="EPS files are programs, which are not run"):
        examine_image(file.getvalue())


# -- anything --------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of any kind with metadata of any kind, and damage anywhere."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    options: dict[str, object] = {}
    if kind in WITH_EXIF and draw(st.booleans()):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = draw(st.integers(0, 10))
        junk = st.binary(max_size=40).map(lambda payload: b"Exif\0\0" + payload)
        options["exif"] = draw(st.just(exif) if kind == "TIFF" else st.just(exif.tobytes()) | junk)
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    file = bytearray(saved(kind, draw(st.sampled_from(KINDS[kind])), size, **options))
    rng = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(0, 3))):
        # Most of what matters stands in front.
        reach = rng.choice((len(file), min(len(file), 120)))
        at, length = rng.randrange(max(reach, 1)), rng.randrange(1, 12)
        match rng.randrange(6):
            case 0:
                file[at : at + 1] = rng.randbytes(1)
            case 1:
                del file[at : at + length]
            case 2:
                file[at:at] = rng.randbytes(length)
            case 3:
                file[at : at + length] = bytes(length)
            case 4:
                del file[rng.randrange(len(file) + 1) :]
            case _:
                file += rng.randbytes(length)
        if not file:
            break
    return bytes(file)


@examples(100)
@given(damaged())
def test_what_pil_decodes_trains_with_its_pixels_and_nothing_else_does(file: bytes) -> None:
    found, expected = taken(file), as_stored(file)
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    # Turned or not: that is another test.
    turned = [np.asarray(Image.fromarray(expected).transpose(turn)) for turn in Image.Transpose]
    assert any(np.array_equal(found, one) for one in [expected, *turned])
