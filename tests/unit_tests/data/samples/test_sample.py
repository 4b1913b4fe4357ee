import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.samples.sample import (
    EncodedSample,
    RawSample,
    RejectedSample,
    SkippedSample,
    dataset_of,
    draw,
    encode_sample,
    name_source,
    try_encode,
)
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import (
    BrokenImageError,
    EncodedImage,
    ImageConfig,
    decode_image,
    rows_for,
)
from megatron_mimo.media.images import decode as decoding

TOKENIZER = ByteTokenizer()
IMAGE = TOKENIZER.placeholder_ids["encoder"]


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, size=(height, width, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def asked(*images: Any, question: str, answer: str, source: str = "memory") -> RawSample:
    return RawSample.asking(
        key="k", question=question, answer=answer, items={"encoder": images}, source=source
    )


def images(sample: EncodedSample) -> tuple[Any, ...]:
    return sample.items["encoder"]


def encode(raw: RawSample, **settings: object) -> EncodedSample:
    config = DataConfig(**({"seq_length": 512} | settings))  # type: ignore[arg-type]
    return encode_sample(raw, config, TOKENIZER, content=("encoder",))


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
        items={"encoder": tuple(png(width, height) for width, height in sizes)},
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
    kept: list[Any] = [
        encode(asked(image, question="<image>", answer="a")).items["encoder"][0]
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
        items={"encoder": (png(8, 8),) * images},
        source="dataset /d, shard t/3.tar",
    )
    outcome = try_encode(raw, DataConfig(), TOKENIZER, content=())
    assert isinstance(outcome, RejectedSample)
    found = "1 image" if images == 1 else f"{images} images"
    assert outcome.message == (
        f"sample 's7' of dataset /d, shard t/3.tar: {placeholders} <image> placeholders and "
        f"{found}: expected one placeholder for each image"
    )


def test_images_stand_anywhere_and_are_never_learnt() -> None:
    turns = (
        Turn("user", "a<image>"),
        Turn("assistant", "<image>b<image>"),
        Turn("user", "<image>"),
        Turn("assistant", "c"),
    )
    sizes = [(16, 16), (32, 16), (16, 48), (32, 32)]
    raw = RawSample(key="k", turns=turns, items={"encoder": tuple(png(*size) for size in sizes)})
    sample = encode(raw)
    rows = [1, 2, 3, 4]
    assert [image.rows for image in sample.items["encoder"]] == rows
    end, line = TOKENIZER.eos_id, ord("\n")
    first, second, third, fourth = ([IMAGE] * count for count in rows)
    answer = [*second, ord("b"), *third, end]
    assert sample.tokens.tolist() == [
        ord("a"), *first, line, *answer, *fourth, line, ord("c"), end
    ]  # fmt: skip
    assert sample.tokens[sample.targets].tolist() == [ord("b"), end, ord("c"), end]


def test_the_tokens_of_a_document_are_learnt_but_for_the_first() -> None:
    raw = RawSample(
        key="k", turns=(Turn("assistant", "ab<image>c"),), items={"encoder": (png(16, 16),)}
    )
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
    raw = RawSample(key="k", turns=turns, items={"encoder": images}, source="d")
    outcome = try_encode(raw, DataConfig(), TOKENIZER, content=())
    assert outcome == SkippedSample(key="k", source="d", kind="no answer", reason=reason)


def test_half_a_character_leaves_a_sample_out() -> None:
    for question, answer in (("\ud83d", "a"), ("q", "a\udc80")):
        raw = RawSample.asking(key="k", question=question, answer=answer, source="d")
        outcome = try_encode(raw, DataConfig(), TOKENIZER, content=())
        assert isinstance(outcome, SkippedSample)
        assert outcome.kind == "malformed text"
        assert outcome.reason.startswith("its text is not valid Unicode: surrogates not allowed")


class StrayTokenizer(ByteTokenizer):
    """Reads "@" as the image token, as a special token spelled in a text would be."""

    def encode(self, text: str) -> list[int]:
        return [IMAGE if byte == ord("@") else byte for byte in text.encode()]


def test_a_stray_image_token_stops() -> None:
    raw = asked(png(16, 16), question="<image>@", answer="a")
    outcome = try_encode(raw, DataConfig(), StrayTokenizer(), content=())
    assert isinstance(outcome, RejectedSample)
    assert "sample 'k' of memory: 2 image tokens for 1 rows of its images" in outcome.message


def test_longest_sample_fits_and_one_more_token_does_not() -> None:
    raw = asked(png(32, 32), question="<image>abc", answer="defg")
    needed = 4 + 3 + 1 + 4  # rows, question, end of question, answer; the end is a target only
    assert len(encode(raw, seq_length=needed).tokens) == needed + 1
    for content in ((), ("encoder",)):
        outcome = try_encode(raw, DataConfig(seq_length=needed - 1), TOKENIZER, content=content)
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
    raw = asked(png(16, 16), file, question="<image><image>", answer="a")
    with_pixels, without = (
        try_encode(raw, DataConfig(), TOKENIZER, content=content) for content in (("encoder",), ())
    )
    assert isinstance(with_pixels, EncodedSample) and isinstance(without, EncodedSample)
    assert with_pixels.tokens.tolist() == without.tokens.tolist()
    decoded, headers = images(with_pixels), images(without)
    assert [i.grids for i in decoded] == [i.grids for i in headers]
    assert without.flaw is None
    assert with_pixels.flaw is not None
    assert (with_pixels.flaw.key, with_pixels.flaw.kind) == ("k", "blank for an image")
    assert decoded[1].patches is not None
    assert set(decoded[1].patches.ravel().tolist()) == {128}


def test_without_patches_nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_image", None)
    raw = asked(png(16, 32), question="<image>", answer="a")
    sample = encode_sample(raw, DataConfig(), TOKENIZER, content=())
    assert sample.items == {"encoder": (EncodedImage(((4, 2),), 2, None),)}


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


@pytest.mark.parametrize("content", [("encoder",), ()])
def test_every_reader_skips_a_broken_image(content: tuple[str, ...]) -> None:
    raw = asked(png(40, 40)[:-30], question="<image>", answer="a", source="d")
    outcome = try_encode(raw, DataConfig(), TOKENIZER, content=content)
    assert isinstance(outcome, SkippedSample)
    assert (outcome.key, outcome.source, outcome.kind) == ("k", "d", "broken image")


def test_contradiction_is_a_value_too() -> None:
    raw = RawSample.asking(key="k", question="<image>", answer="a")
    outcome = try_encode(raw, DataConfig(), TOKENIZER, content=("encoder",))
    assert isinstance(outcome, RejectedSample)
    assert "1 <image> placeholders" in outcome.message


def test_the_dataset_is_told_from_the_shard() -> None:
    assert dataset_of(name_source("/d, shard of old/x", "train/0.tar")) == (
        "dataset /d, shard of old/x"
    )
    assert dataset_of("memory") == "memory"


def test_whatever_a_tokenizer_raises_names_the_sample() -> None:
    class Failing(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            raise KeyError(text)

    raw = asked(question="why", answer="so", source="d")
    outcome = try_encode(raw, DataConfig(), Failing(), content=())
    assert isinstance(outcome, RejectedSample)
    assert outcome.message.startswith("sample 'k' of d cannot be encoded (KeyError: 'why")


def unusable(*kinds: str) -> str:
    """The message for a source that has only samples of these kinds of damage."""
    outcomes = [
        SkippedSample(key=f"k{number}", source="dataset d", kind=kind, reason=f"is {kind}")
        for number, kind in enumerate(kinds)
    ]
    stopped = draw(iter(outcomes), "--data-path d", len(kinds))
    assert isinstance(stopped, RejectedSample)
    return stopped.message


def test_samples_that_are_too_long_do_not_make_a_broken_dataset() -> None:
    raw = asked(png(64, 64), question="<image>", answer="many words " * 9)
    outcome = try_encode(raw, DataConfig(seq_length=32), TOKENIZER, content=())
    stopped = draw(iter([outcome] * 5), "--data-path d", 5)
    assert isinstance(stopped, RejectedSample)
    assert re.fullmatch(
        r"--data-path d: --seq-length is too short for 5 samples in a row: the last one, 'k' of "
        r"memory, needs \d+ positions \(.*\), more than --seq-length 32: raise --seq-length, .*",
        stopped.message,
    )


def test_several_kinds_of_damage_are_counted() -> None:
    assert unusable("too long", "too long", "no answer") == (
        "--data-path d: 3 unusable samples in a row, the last one 'k2' of dataset d (is no "
        "answer); in all 2 too long, 1 no answer: raise --seq-length, and correct or rewrite the "
        "dataset"
    )
    assert unusable("no answer").endswith("in all 1 no answer: correct or rewrite the dataset")
