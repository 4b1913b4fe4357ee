import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.webdataset import read_shard, write_shard
from megatron_mimo.data.samples import dataset_folder
from megatron_mimo.data.samples.digits import (
    DigitsConfig,
    Split,
    plan_samples,
    read_digits_split,
    write_digits_dataset,
)
from megatron_mimo.data.samples.handwriting import draw, split_sources
from megatron_mimo.data.samples.sample import RawSample, encode_sample
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import decode_image

LABELS = [i % 10 for i in range(1797)]


@given(st.integers(2, 2000), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_every_handwritten_digit_is_in_one_split(num: int, fraction: float, seed: int) -> None:
    train, val = split_sources(num, fraction, seed)
    assert sorted(train + val) == list(range(num))
    assert train
    assert val


@given(st.integers(0, 2**31), st.sampled_from(["train", "val"]))
def test_plan_uses_its_own_sources_and_answers_right(seed: int, split: Split) -> None:
    config = DigitsConfig(num_train=50, num_val=50, seed=seed)
    sources = split_sources(1797, 0.01, seed)[split == "val"]
    plan = list(plan_samples(split, sources, LABELS, config))
    assert plan == list(plan_samples(split, sources, LABELS, config))
    for sample in plan:
        assert set(sample.sources) <= set(sources)
        shown = [str(LABELS[source]) for source in sample.sources]
        expected = {
            "single": shown[0],
            "list": " ".join(shown),
            "count": str(len(shown)),
            "leftmost": shown[0],
            "rightmost": shown[-1],
        }[sample.kind]
        assert sample.answer == expected
        assert sample.kind != "single" or len(shown) == 1
        assert sample.question.startswith("<image>")


def test_val_shows_each_held_out_digit_alone_first() -> None:
    plan = list(plan_samples("val", [3, 5, 8], LABELS, DigitsConfig(num_val=5)))
    assert [sample.sources for sample in plan[:3]] == [(3,), (5,), (8,)]
    assert [sample.kind for sample in plan[:3]] == ["single"] * 3
    assert "single" not in [sample.kind for sample in plan[3:]]


def test_written_splits_share_no_source(digits_path: Path) -> None:
    sources = {}
    for split in ("train", "val"):
        shard = read_shard(digits_path / split / "000000.tar")
        drawn = [json.loads(parts["json"])["sources"] for parts in shard.values()]
        sources[split] = {source for of_sample in drawn for source in of_sample}
    assert len(sources["val"]) == 14
    assert len(sources["train"]) > 20
    assert not sources["train"] & sources["val"]


def test_pictures_vary_and_fit_a_short_sequence(digits_path: Path) -> None:
    samples = read_digits_split(digits_path, "train") + read_digits_split(digits_path, "val")
    assert len(samples) == 90
    sizes = {decode_image(sample.items["encoder"][0]).size for sample in samples}
    assert len(sizes) > 45
    config = DataConfig(seq_length=64)
    for sample in samples:
        encode_sample(sample, config, ByteTokenizer(), content=())


@given(st.integers(0, 2**31))
def test_widest_picture_and_longest_answer_fit(seed: int) -> None:
    glyphs = [np.full((8, 8), 16.0)] * 4
    picture = np.asarray(draw(glyphs, np.random.default_rng(seed)).convert("RGB"))
    sample = RawSample.asking(
        key="k", question="<image>Which digits?", answer="1 2 3 4", items={"encoder": (picture,)}
    )
    encode_sample(sample, DataConfig(seq_length=64), ByteTokenizer(), content=())


def test_kind_selects_and_order_is_stored_order(digits_path: Path) -> None:
    everything = read_digits_split(digits_path, "val")
    single = read_digits_split(digits_path, "val", kind="single")
    assert [sample.key for sample in everything] == [f"val-{i:06d}" for i in range(30)]
    assert [sample.key for sample in single] == [f"val-{i:06d}" for i in range(14)]
    assert {sample.question for sample in single} == {"<image>Which digit is this?"}


def test_digits_are_read_as_samples_of_any_dataset(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    said = {"question": "\ufeff<image>\r\nWhich?", "answer": "\ufeff4", "kind": "single"}
    stored = [("a", {"png": b"p", "json": json.dumps(said).encode()})]
    write_shard(tmp_path / "val/0.tar", stored)
    (sample,) = read_digits_split(tmp_path, "val", kind="single")
    assert (sample.question, sample.answer) == ("<image>\nWhich?", "4")
    assert sample.items == {"encoder": (b"p",)}
    stored[0][1]["json"] = json.dumps({**said, "answer": "\ud83d"}).encode()
    write_shard(tmp_path / "val/0.tar", stored)
    with pytest.raises(ValueError, match="sample 'a' of dataset .* is not valid Unicode"):
        read_digits_split(tmp_path, "val")


def test_same_seed_same_shards(digits_path: Path, tmp_path: Path) -> None:
    config = DigitsConfig(num_train=60, num_val=30, val_fraction=14 / 1797, seed=5)
    again = write_digits_dataset(tmp_path / "again", config)
    for shard in ("train/000000.tar", "val/000000.tar"):
        assert (again / shard).read_bytes() == (digits_path / shard).read_bytes()


def test_folder_with_contents_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--out .* is not empty: .* --overwrite"):
        write_digits_dataset(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    out.mkdir()
    (out / "stale").touch()
    config = DigitsConfig(num_train=3, num_val=2, val_fraction=0.001)
    write_digits_dataset(out, config, overwrite=True)
    assert not (out / "stale").exists()
    assert len(read_digits_split(out, "train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(dataset_folder, "prepare", fail)
    with pytest.raises(OSError, match="No space left"):
        write_digits_dataset(tmp_path / "digits", DigitsConfig(num_train=3, num_val=2))
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out .*file is a file"):
        write_digits_dataset(tmp_path / "file")


def test_missing_split_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val split: write one with `megatron-mimo data digits"):
        read_digits_split(tmp_path, "val")


def test_a_missing_package_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="not installed: run `pip install scikit-learn`, or"):
        write_digits_dataset(tmp_path / "digits")
    assert not list(tmp_path.iterdir())
