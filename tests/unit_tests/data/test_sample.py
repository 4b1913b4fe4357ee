import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.data import sample as sample_module
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.conversation import Turn
from megatron_mimo.data.sample import (
    EncodedSample,
    RawSample,
    RejectedSample,
    SkippedSample,
    dataset_of,
    encode_sample,
    name_source,
    try_encode,
)
from megatron_mimo.data.tokenizer import ByteTokenizer
from megatron_mimo.images import (
    BrokenImageError,
    EncodedImage,
    ImageConfig,
    decode_image,
    rows_for,
)

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
    raw = RawSample.asking(
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
        encode(RawSample.asking(key="k", question="<image>", answer="a", images=(image,))).images[0]
        for image in (file, pixels)
    ]
    assert kept[0].grids == kept[1].grids
    np.testing.assert_array_equal(kept[0].patches, kept[1].patches)


@pytest.mark.parametrize(("placeholders", "images"), [(2, 1), (0, 1), (1, 0)])
def test_one_placeholder_for_each_image(placeholders: int, images: int) -> None:
    raw = RawSample.asking(
        key="s7",
        question="<image>" * placeholders,
        answer="a",
        images=(png(8, 8),) * images,
        source="dataset /d, shard t/3.tar",
    )
    outcome = try_encode(raw, DataConfig(), TOKENIZER, with_patches=False)
    assert isinstance(outcome, RejectedSample)
    assert outcome.message == (
        f"sample 's7' of dataset /d, shard t/3.tar: {placeholders} <image> placeholders and "
        f"{images} images: expected one placeholder for each image"
    )


def test_images_stand_anywhere_and_are_never_learnt() -> None:
    turns = (
        Turn("user", "a<image>"),
        Turn("assistant", "<image>b<image>"),
        Turn("user", "<image>"),
        Turn("assistant", "c"),
    )
    sizes = [(16, 16), (32, 16), (16, 48), (32, 32)]
    raw = RawSample(key="k", turns=turns, images=tuple(png(*size) for size in sizes))
    sample = encode(raw)
    rows = [1, 2, 3, 4]
    assert [image.rows for image in sample.images] == rows
    end, line = TOKENIZER.eos_id, ord("\n")
    first, second, third, fourth = ([IMAGE] * count for count in rows)
    answer = [*second, ord("b"), *third, end]
    assert sample.tokens.tolist() == [
        ord("a"), *first, line, *answer, *fourth, line, ord("c"), end
    ]  # fmt: skip
    assert sample.tokens[sample.targets].tolist() == [ord("b"), end, ord("c"), end]


def test_the_tokens_of_a_document_are_learnt_but_for_the_first() -> None:
    raw = RawSample(key="k", turns=(Turn("assistant", "ab<image>c"),), images=(png(16, 16),))
    sample = encode(raw)
    assert sample.tokens.tolist() == [ord("a"), ord("b"), IMAGE, ord("c"), TOKENIZER.eos_id]
    assert sample.targets.tolist() == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((Turn("user", "q"), Turn("assistant", " \n")), "it has an answer without text"),
        ((Turn("assistant", "<image>"),), "it has an answer without text"),
        ((Turn("system", "s"), Turn("user", "q")), "it has no answer to learn"),
        ((), "it has no answer to learn"),
    ],
)
def test_nothing_to_learn_is_skipped(turns: tuple[Turn, ...], reason: str) -> None:
    images = (png(8, 8),) * sum(turn.text.count("<image>") for turn in turns)
    raw = RawSample(key="k", turns=turns, images=images, source="d")
    outcome = try_encode(raw, DataConfig(), TOKENIZER, with_patches=False)
    assert outcome == SkippedSample(key="k", source="d", kind="no answer", reason=reason)


class StrayTokenizer(ByteTokenizer):
    """Reads "@" as the image token, as a special token spelled in a text would be."""

    def encode(self, text: str) -> list[int]:
        return [IMAGE if byte == ord("@") else byte for byte in text.encode()]


def test_a_stray_image_token_stops() -> None:
    raw = RawSample.asking(key="k", question="<image>@", answer="a", images=(png(16, 16),))
    outcome = try_encode(raw, DataConfig(), StrayTokenizer(), with_patches=False)
    assert isinstance(outcome, RejectedSample)
    assert "sample 'k' of memory: 2 image tokens for 1 rows of its images" in outcome.message


def test_longest_sample_fits_and_one_more_token_does_not() -> None:
    raw = RawSample.asking(key="k", question="<image>abc", answer="defg", images=(png(32, 32),))
    needed = 4 + 3 + 1 + 4  # rows, question, end of question, answer; the end is a target only
    assert len(encode(raw, seq_length=needed).tokens) == needed + 1
    for with_patches in (True, False):
        outcome = try_encode(
            raw, DataConfig(seq_length=needed - 1), TOKENIZER, with_patches=with_patches
        )
        assert isinstance(outcome, SkippedSample)
        assert outcome.kind == "too long"
        assert (
            f"needs {needed} positions (4 rows of images and 9 tokens of text), more than "
            f"--seq-length {needed - 1}" in outcome.reason
        )


def undecodable_png(width: int, height: int) -> bytes:
    """Whole by its frame and checksums, but its pixels are no compressed data."""
    file = png(width, height)
    start, end = file.index(b"IDAT") - 4, file.index(b"IEND") - 4
    body = b"IDAT" + b"no pixels"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return file[:start] + chunk + file[end:]


def test_a_blank_of_its_size_stands_for_an_image_that_does_not_decode() -> None:
    file = undecodable_png(32, 48)
    with pytest.raises(BrokenImageError):
        decode_image(file)
    raw = RawSample.asking(
        key="k", question="<image><image>", answer="a", images=(png(16, 16), file), source="d"
    )
    with_pixels, without = (
        try_encode(raw, DataConfig(), TOKENIZER, with_patches=patches) for patches in (True, False)
    )
    assert isinstance(with_pixels, EncodedSample) and isinstance(without, EncodedSample)
    assert with_pixels.tokens.tolist() == without.tokens.tolist()
    assert [i.grids for i in with_pixels.images] == [i.grids for i in without.images]
    assert without.flaw is None
    assert with_pixels.flaw is not None
    assert (with_pixels.flaw.key, with_pixels.flaw.kind) == ("k", "blank for an image")
    assert with_pixels.images[1].patches is not None
    assert set(with_pixels.images[1].patches.ravel().tolist()) == {128}


def test_without_patches_nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "decode_image", None)
    raw = RawSample.asking(key="k", question="<image>", answer="a", images=(png(16, 32),))
    sample = encode_sample(raw, DataConfig(), TOKENIZER, with_patches=False)
    assert sample.images == (EncodedImage(((4, 2),), 2, None),)


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
    raw = RawSample.asking(
        key="k", question="<image>", answer="a", images=(png(40, 40)[:-30],), source="d"
    )
    outcome = try_encode(raw, DataConfig(), TOKENIZER, with_patches=with_patches)
    assert isinstance(outcome, SkippedSample)
    assert (outcome.key, outcome.source, outcome.kind) == ("k", "d", "broken image")


def test_contradiction_is_a_value_too() -> None:
    raw = RawSample.asking(key="k", question="<image>", answer="a")
    outcome = try_encode(raw, DataConfig(), TOKENIZER, with_patches=True)
    assert isinstance(outcome, RejectedSample)
    assert "1 <image> placeholders" in outcome.message


def test_the_dataset_is_told_from_the_shard() -> None:
    assert dataset_of(name_source("/d, shard of old/x", "train/0.tar")) == (
        "dataset /d, shard of old/x"
    )
    assert dataset_of("memory") == "memory"
