"""The header against the pixels: sizes agree, and what is cut or changed is found."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from megatron_mimo.media.images import (
    BrokenImageError,
    ImageConfig,
    blank_image,
    decode_image,
    examine_image,
    rows_for,
)
from megatron_mimo.media.images import decode as decoding
from tests.properties import examples

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "L"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "TIFF": ["L", "RGB", "F"],
}
FRAMED = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM"]


def saved(width: int, height: int, kind: str, mode: str, orientation: int | None = None) -> bytes:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    picture = Image.fromarray(noise.astype(np.uint8)).convert("L" if ";" in mode else "RGB")
    options = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    picture.convert(mode).save(file, kind, **options)
    return file.getvalue()


@st.composite
def files(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(sorted(MODES)))
    orientations = st.none() | st.integers(1, 8)
    return saved(
        draw(st.integers(1, 90)),
        draw(st.integers(1, 90)),
        kind,
        draw(st.sampled_from(MODES[kind])),
        draw(orientations) if kind in ("PNG", "JPEG", "WEBP", "TIFF") else None,
    )


@examples(300)
@given(files(), st.sampled_from([0, 64, 256]), st.booleans())
def test_rows_by_the_header_are_those_by_the_pixels(
    file: bytes, most: int, pixel_shuffle: bool
) -> None:
    config = ImageConfig(max_patches=most, pixel_shuffle=pixel_shuffle)
    assert examine_image(file) == decode_image(file).size
    assert rows_for(*examine_image(file), config) == rows_for(*decode_image(file).size, config)


@pytest.mark.parametrize("kind", FRAMED)
def test_a_whole_file_is_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_image", None)
    assert examine_image(saved(31, 17, kind, "L")) == (31, 17)


@pytest.mark.parametrize("kind", FRAMED)
def test_a_file_cut_anywhere_is_broken(kind: str) -> None:
    file = saved(40, 30, kind, "L")
    # The bytes at the end may hold no pixels, and are then not missed.
    for keep in range(0, len(file) * 9 // 10, 7):
        with pytest.raises(BrokenImageError, match="does not decode"):
            examine_image(file[:keep])


@pytest.mark.parametrize("kind", FRAMED)
def test_bytes_behind_the_end_do_not_matter(kind: str) -> None:
    assert examine_image(saved(40, 30, kind, "L") + b"\0\0left over") == (40, 30)


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_jpeg() -> None:
    thumbnail = saved(8, 8, "JPEG", "RGB")
    file = saved(64, 64, "JPEG", "RGB")
    comment = b"\xff\xfe" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = file[:2] + comment + file[2:]
    assert examine_image(whole) == (64, 64)
    for cut in (len(comment) + 2, len(comment) + 700, len(whole) - 2):
        with pytest.raises(BrokenImageError):
            examine_image(whole[:cut])


def test_a_png_without_pixels_is_broken() -> None:
    file = saved(9, 9, "PNG", "L")
    start = file.index(b"IDAT") - 4
    with pytest.raises(BrokenImageError):
        examine_image(file[:start] + file[file.index(b"IEND") - 4 :])


def test_of_an_animation_the_first_frame_must_be_whole() -> None:
    frames = [Image.effect_noise((24, 24), 80) for _ in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    for whole in (file.getvalue(), file.getvalue()[:-40]):
        assert examine_image(whole) == decode_image(whole).size == (24, 24)
    with pytest.raises(BrokenImageError, match="truncated"):
        examine_image(file.getvalue()[:900])


def test_a_blank_is_grey() -> None:
    assert blank_image(3, 2).size == (3, 2)
    assert blank_image(3, 2).getpixel((2, 1)) == (128, 128, 128)
