import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.sample import (
    BrokenImageError,
    EncodedSample,
    RawSample,
    RejectedSample,
    SkippedSample,
    decode_image,
    encode_sample,
    try_encode,
)
from megatron_mimo.data.tokenizer import ByteTokenizer
from megatron_mimo.images import ImageConfig, rows_for

TOKENIZER = ByteTokenizer()
IMAGE = TOKENIZER.image_token_id


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, size=(height, width, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def encode(raw: RawSample, **settings: object) -> EncodedSample:
    config = DataConfig(**({"seq_length": 512} | settings))  # type: ignore[arg-type]
    return encode_sample(raw, config, TOKENIZER, with_patches=True)


@given(
    st.lists(st.tuples(st.integers(8, 64), st.integers(8, 64)), max_size=3),
    st.text(alphabet="ab é", max_size=9),
    st.text(alphabet="xyz", min_size=1, max_size=9),
)
def test_each_placeholder_becomes_its_images_rows(
    sizes: list[tuple[int, int]], text: str, answer: str
) -> None:
    raw = RawSample(
        key="k",
        question=text.join(["<image>"] * len(sizes)) + text,
        answer=answer,
        images=tuple(png(width, height) for width, height in sizes),
    )
    sample = encode(raw)
    expected: list[int] = []
    for index, (width, height) in enumerate(sizes):
        expected += TOKENIZER.encode(text) if index else []
        expected += [IMAGE] * rows_for(width, height, ImageConfig())
    expected += TOKENIZER.encode(text + "\n")
    assert sample.tokens[~sample.targets].tolist() == expected
    assert sample.tokens[sample.targets].tolist() == [*answer.encode(), TOKENIZER.eos_id]
    assert sample.target_tokens == len(answer) + 1


def test_pixels_and_files_of_the_same_picture_encode_alike() -> None:
    file = png(30, 50)
    pixels = np.asarray(Image.open(io.BytesIO(file)))
    kept = [
        encode(RawSample(key="k", question="<image>", answer="a", images=(image,))).images[0]
        for image in (file, pixels)
    ]
    assert kept[0].grids == kept[1].grids
    np.testing.assert_array_equal(kept[0].patches, kept[1].patches)


def test_too_few_images_names_sample_and_source() -> None:
    raw = RawSample(
        key="s7",
        question="<image> and <image>",
        answer="a",
        images=(png(8, 8),),
        source="dataset /d, shard t/3.tar",
    )
    with pytest.raises(
        ValueError,
        match=r"sample 's7' of dataset /d, shard t/3.tar has 2 <image> placeholders .* 1 images",
    ):
        encode(raw)


def test_image_without_placeholder_is_refused() -> None:
    with pytest.raises(ValueError, match="has 0 <image> placeholders .* and 1 images"):
        encode(RawSample(key="k", question="q", answer="a", images=(png(8, 8),)))


def test_placeholder_in_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="placeholder <image> in its answer"):
        encode(RawSample(key="k", question="q", answer="<image>"))


def test_empty_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 'k' of memory has an empty answer"):
        encode(RawSample(key="k", question="q", answer=""))


class StrayTokenizer(ByteTokenizer):
    """Reads "@" as the image token, as a special token spelled in a text would be."""

    def encode(self, text: str) -> list[int]:
        return [IMAGE if byte == ord("@") else byte for byte in text.encode()]


def test_stray_image_token_names_the_sample() -> None:
    raw = RawSample(key="k", question="<image>@", answer="a", images=(png(16, 16),), source="d")
    with pytest.raises(ValueError, match=r"sample 'k' of d has 2 image tokens for 1 rows"):
        encode_sample(raw, DataConfig(), StrayTokenizer(), with_patches=False)


def test_longest_sample_fits_and_one_more_token_does_not() -> None:
    raw = RawSample(key="k", question="<image>abc", answer="defg", images=(png(32, 32),))
    needed = 4 + 3 + 1 + 4  # rows, question, end of question, answer; the end is a target only
    assert len(encode(raw, seq_length=needed).tokens) == needed + 1
    with pytest.raises(
        ValueError,
        match=rf"'k' .* needs {needed} positions \(4 rows of images and 9 tokens of text\), more "
        rf"than --seq-length {needed - 1}",
    ):
        encode(raw, seq_length=needed - 1)


@pytest.mark.parametrize("keep", [0, 20, 60, -30])
def test_cut_image_is_broken(keep: int) -> None:
    with pytest.raises(BrokenImageError, match="does not decode"):
        decode_image(png(40, 40)[:keep])


def test_noise_is_no_image() -> None:
    with pytest.raises(BrokenImageError, match="image of 9 bytes does not decode"):
        decode_image(b"not a png")


def test_grey_image_becomes_rgb() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 7).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("with_patches", [True, False])
def test_every_reader_skips_a_broken_image(with_patches: bool) -> None:
    raw = RawSample(
        key="k", question="<image>", answer="a", images=(png(40, 40)[:-30],), source="d"
    )
    outcome = try_encode(raw, DataConfig(), TOKENIZER, with_patches=with_patches)
    assert isinstance(outcome, SkippedSample)
    assert (outcome.key, outcome.source) == ("k", "d")


def test_contradiction_is_a_value_too() -> None:
    raw = RawSample(key="k", question="<image>", answer="a")
    outcome = try_encode(raw, DataConfig(), TOKENIZER, with_patches=True)
    assert isinstance(outcome, RejectedSample)
    assert "1 <image> placeholders" in outcome.message
