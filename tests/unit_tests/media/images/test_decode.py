"""Files of every kind, right or refused."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from megatron_mimo.media.images import BrokenImageError, decode_image, examine_image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(width: int = 12, height: int = 8) -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def colours(file: bytes) -> np.ndarray:
    image = decode_image(file)
    assert image.mode == "RGB"
    assert image.size == examine_image(file)
    return np.asarray(image).astype(int)


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = colours(saved(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(found, np.arange(256).reshape(16, 16, 1).repeat(3, axis=2))


def test_a_float_picture_spans_zero_to_one() -> None:
    picture = np.array([[0.0, 0.5], [1.0, 7.0]], dtype=np.float32)
    found = colours(saved(Image.fromarray(picture), "TIFF"))
    assert found[..., 0].tolist() == [[0, 128], [255, 255]]


def test_cmyk_jpeg() -> None:
    found = colours(saved(halves(32, 32).convert("CMYK"), "JPEG", quality=95))
    red, blue = found[16, 4], found[16, 28]
    assert red[0] > 200 and red[2] < 60
    assert blue[2] > 200 and blue[0] < 60


def test_transparent_pixels_of_a_palette_show_white() -> None:
    palette = halves().quantize(4)
    red = palette.getpixel((0, 0))
    found = colours(saved(palette, "PNG", transparency=red))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, -1].tolist() == [0, 0, 255]


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    image = halves().convert("RGBA")
    image.putalpha(128)
    assert colours(saved(image, "PNG"))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind: str, orientation: int) -> None:
    image = halves(48, 16)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = saved(image, kind, exif=exif)
    found = colours(file)
    # Where the left side of the stored picture belongs, by the Exif standard.
    red_at = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom"}
    side = red_at.get(orientation, "bottom")
    assert examine_image(file) == ((48, 16) if orientation < 5 else (16, 48))
    corner = {"left": (8, 0), "right": (8, -1), "top": (0, 8), "bottom": (-1, 8)}[side]
    assert found[corner][0] > 180 > 80 > found[corner][2]


def test_orientation_behind_the_pixels_is_not_seen_by_either() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = saved(halves(48, 16), "PNG", exif=exif)
    chunk = file.index(b"eXIf") - 4
    length = int.from_bytes(file[chunk : chunk + 4], "big") + 12
    end = file.index(b"IEND") - 4
    moved = file[:chunk] + file[chunk + length : end] + file[chunk : chunk + length] + file[end:]
    assert examine_image(moved) == decode_image(moved).size == (48, 16)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colours(file)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_truncated_files_are_broken_though_their_header_is_not(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = saved(Image.fromarray(noise), kind)
    with pytest.raises(BrokenImageError, match="image of .* bytes does not decode"):
        decode_image(file[: len(file) // 2])


@pytest.mark.parametrize("file", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image(file: bytes) -> None:
    for read in (examine_image, decode_image):
        with pytest.raises(BrokenImageError, match=f"image of {len(file)} bytes does not decode"):
            read(file)


def test_pixels_are_taken_as_they_are() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert examine_image(pixels) == (7, 5)
    np.testing.assert_array_equal(np.asarray(decode_image(pixels)), pixels)


def test_a_bomb_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BrokenImageError, match="exceeds limit"):
        examine_image(saved(halves(), "PNG"))
