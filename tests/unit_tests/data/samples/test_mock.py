import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.samples.mock import Split, check_mock_items, mock_sample
from megatron_mimo.data.samples.sample import RawSample, encode_sample
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import ImageConfig, ImageInput
from megatron_mimo.media.images.config import GridRule

indices = st.integers(0, 10**6)


def pictures(sample: RawSample) -> tuple[Any, ...]:
    return sample.items.get("encoder", ())


def same(a: RawSample, b: RawSample) -> bool:
    return (a.key, a.question, a.answer) == (b.key, b.question, b.answer) and all(
        np.array_equal(x, y) for x, y in zip(pictures(a), pictures(b), strict=True)
    )


def test_samples_of_images_alone_are_what_they_have_always_been() -> None:
    """Checkpoints and curves of before would not compare otherwise."""
    config = DataConfig(seed=1234, text_only_fraction=0.5, micro_batch_size=2)
    digest = hashlib.blake2b(digest_size=8)
    for split in Split:
        for index in range(40):
            raw = mock_sample(index, split, config)
            digest.update(repr((raw.key, raw.question, raw.answer)).encode())
            for picture in pictures(raw):
                digest.update(repr(picture.shape).encode() + picture.tobytes())
            sample = encode_sample(raw, config, ByteTokenizer(), content=("encoder",))
            digest.update(sample.tokens.tobytes() + sample.targets.tobytes())
    assert digest.hexdigest() == "113044fe0a3206ce"


@given(st.lists(indices, min_size=1, max_size=6), st.integers(0, 2**31))
def test_sample_depends_on_seed_and_index_alone(drawn: list[int], seed: int) -> None:
    config = DataConfig(seed=seed, text_only_fraction=0.3)
    forwards = [mock_sample(i, Split.TRAIN, config) for i in drawn]
    backwards = [mock_sample(i, Split.TRAIN, config) for i in reversed(drawn)]
    assert all(same(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_other_seeds_splits_and_indices_differ() -> None:
    config, other = DataConfig(seed=1), DataConfig(seed=2)
    drawn = [
        pictures(mock_sample(0, Split.TRAIN, config))[0].tobytes(),
        pictures(mock_sample(0, Split.TRAIN, other))[0].tobytes(),
        pictures(mock_sample(0, Split.VAL, config))[0].tobytes(),
        pictures(mock_sample(1, Split.TRAIN, config))[0].tobytes(),
    ]
    assert len(set(drawn)) == 4


def test_samples_repeat_after_the_dataset_size() -> None:
    config = DataConfig(mock_dataset_size=5)
    assert same(mock_sample(2, Split.TRAIN, config), mock_sample(7, Split.TRAIN, config))


def test_text_only_fraction_is_kept() -> None:
    for fraction in (0.0, 0.5, 1.0):
        config = DataConfig(text_only_fraction=fraction)
        without = sum(not pictures(mock_sample(i, Split.TRAIN, config)) for i in range(400))
        assert abs(without / 400 - fraction) < 0.08, (fraction, without)
        if fraction in (0.0, 1.0):
            assert without == 400 * fraction


def test_colour_of_the_picture_decides_the_answer() -> None:
    config = DataConfig()
    means: dict[str, list[np.ndarray]] = {}
    for i in range(200):
        sample = mock_sample(i, Split.TRAIN, config)
        for name, image in zip(sample.answer.split(), pictures(sample), strict=True):
            means.setdefault(name, []).append(image.mean(axis=(0, 1)))
    centres = {name: np.mean(values, axis=0) for name, values in means.items()}
    assert len(centres) == 8
    for name, values in means.items():
        for value in values:
            nearest = min(centres, key=lambda other: np.linalg.norm(centres[other] - value))
            assert nearest == name


@given(indices, st.integers(60, 200), st.booleans(), st.sampled_from([8, 16]), st.booleans())
def test_samples_fit_their_sequence(
    index: int, length: int, shuffle: bool, patch: int, tags: bool
) -> None:
    rules: tuple[GridRule, ...] = ("nearest", "nemotron-omni")
    for rule in rules:
        image = ImageConfig(pixel_shuffle=shuffle, patch_dim=patch, min_patches=1, grid_rule=rule)
        images = ImageInput(config=image, tag_type="internvl" if tags else None)
        config = DataConfig(seq_length=length, inputs={"encoder": images})
        raw = mock_sample(index, Split.TRAIN, config)
        encode_sample(raw, config, ByteTokenizer(), content=())


@given(indices, st.integers(1, 40), st.integers(40, 200))
def test_images_have_the_rows_that_are_asked_for(index: int, rows: int, length: int) -> None:
    images = ImageInput(config=ImageConfig(min_patches=1), mock_rows=rows)
    config = DataConfig(seq_length=length, inputs={"encoder": images})
    if rows > length - 34:
        with pytest.raises(ValueError, match=f"--image-seq-length {rows}: .* raise it"):
            check_mock_items(config)
        return
    check_mock_items(config)
    raw = mock_sample(index, Split.TRAIN, config)
    sample = encode_sample(raw, config, ByteTokenizer(), content=())
    assert {image.rows for image in sample.items["encoder"]} == {rows}


def test_rows_that_the_image_settings_do_not_make_are_refused() -> None:
    images = ImageInput(config=ImageConfig(max_patches=16), mock_rows=7)
    config = DataConfig(seq_length=256, inputs={"encoder": images})
    with pytest.raises(ValueError, match=r"--image-seq-length 7: .* has [1-4] rows"):
        check_mock_items(config)


def test_sizes_and_numbers_of_images_vary() -> None:
    drawn = [mock_sample(i, Split.TRAIN, DataConfig()) for i in range(50)]
    assert {len(pictures(sample)) for sample in drawn} == {1, 2}
    assert len({image.shape for sample in drawn for image in pictures(sample)}) > 30
