import json
import pickle
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.samples.sample import EncodedSample, RejectedSample, SkippedSample
from megatron_mimo.data.text.tokenizer import ByteTokenizer

SEQ_LENGTH = 64
TRAIN, VAL = 90, 40


def text(length: int) -> bytes:
    """A sample that takes about so many positions."""
    return json.dumps({"question": "?", "answer": "a" * length}).encode()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of many lengths; two samples of each split do not parse."""
    out = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    shards = []
    for split, number in (("train", TRAIN), ("val", VAL)):
        (out / split).mkdir()
        for shard in range(2):
            shards.append(f"{split}/{shard:06d}.tar")
            lengths = random.integers(1, 60, number // 2).tolist()
            samples: list[tuple[str, Mapping[str, bytes]]] = [
                (f"{split}-{shard}-{i:03d}", {"json": b"{" if i == 7 else text(length)})
                for i, length in enumerate(lengths)
            ]
            write_shard(out / shards[-1], samples)
    prepare(out, shards)
    return out


def settings(path: Path, buffer_size: int | None = 16) -> DataConfig:
    return DataConfig(
        provider="energon",
        path=str(path),
        seq_length=SEQ_LENGTH,
        packing_buffer_size=buffer_size,
    )


def images(sample: EncodedSample) -> tuple[Any, ...]:
    return sample.items.get("encoder", ())


class Reader(Iterator[Any]):
    """One of two workers, without a loader around it: those make lists of tuples."""

    def __init__(self, config: DataConfig, split: str, *, content: tuple[str, ...] = ()) -> None:
        from megatron.energon import WorkerConfig, get_train_dataset, get_val_dataset

        from megatron_mimo.data.reading.task_encoder import MimoTaskEncoder

        self.worker = WorkerConfig(rank=0, world_size=2, num_workers=0, seed_offset=3)
        common: dict[str, Any] = {
            "worker_config": self.worker,
            "batch_size": None,
            "packing_buffer_size": config.packing_buffer_size,
            "task_encoder": MimoTaskEncoder(config, ByteTokenizer(), content=content),
        }
        assert config.path is not None
        if split == "train":
            common |= {"max_samples_per_sequence": None, "shuffle_buffer_size": 8}
        make = get_train_dataset if split == "train" else get_val_dataset
        self.dataset: Any = make(config.path, **common)
        self.outcomes: Iterator[Any] | None = None

    def __next__(self) -> Any:
        self.worker.worker_activate(0)
        try:
            if self.outcomes is None:
                self.outcomes = iter(self.dataset)
            outcome = next(self.outcomes)
            return getattr(outcome, "outcome", outcome)
        finally:
            self.worker.worker_deactivate()

    def state(self) -> Any:
        self.worker.worker_activate(0)
        try:
            return pickle.loads(pickle.dumps(self.dataset.save_state()))
        finally:
            self.worker.worker_deactivate()


def keys(outcomes: Iterator[Any]) -> list[Any]:
    return [
        tuple(document.key for document in outcome) if isinstance(outcome, tuple) else outcome.key
        for outcome in outcomes
    ]


def test_a_pass_holds_every_sample_once_and_in_order_of_arrival(path: Path) -> None:
    outcomes = list(Reader(settings(path), "val"))
    single = keys(Reader(settings(path, None), "val"))
    sequences = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    found = [key for sequence in keys(iter(sequences)) for key in sequence]
    skipped = [outcome for outcome in outcomes if isinstance(outcome, SkippedSample)]
    assert [outcome.key for outcome in skipped] == ["val-0-007"]
    assert sorted(found) == sorted(set(single) - {"val-0-007"})
    for sequence in sequences:
        assert all(isinstance(document, EncodedSample) for document in sequence)
        assert sum(document.num_positions for document in sequence) <= SEQ_LENGTH
        arrivals = [single.index(document.key) for document in sequence]
        assert arrivals == sorted(arrivals)
    # The buffer looks no further than its size, and the next round's.
    assert max(single.index(key) for key in keys(iter(sequences))[0]) < 16
    filled = sum(d.num_positions for sequence in sequences[:-1] for d in sequence)
    assert filled / (SEQ_LENGTH * (len(sequences) - 1)) > 0.8


def test_training_goes_on_where_it_was_saved(path: Path) -> None:
    """At every step: between rounds and within, before and behind the end of an epoch."""
    reference = Reader(settings(path), "train")
    wanted = keys(islice(reference, 60))
    assert any(isinstance(key, str) for key in wanted)
    for done in range(0, 40, 3):
        before = Reader(settings(path), "train")
        assert keys(islice(before, done)) == wanted[:done]
        after = Reader(settings(path), "train")
        after.dataset.restore_state(before.state())
        assert keys(islice(after, 60 - done)) == wanted[done:]


def test_no_sample_is_left_behind_for_long(path: Path) -> None:
    drawn = keys(islice(Reader(settings(path), "train"), 80))
    counts: dict[str, int] = {}
    for key in drawn:
        for one in [key] if isinstance(key, str) else key:
            counts[one] = counts.get(one, 0) + 1
    assert len(counts) == TRAIN // 2
    assert max(counts.values()) - min(counts.values()) <= 2


def test_images_are_decoded_when_their_sequence_leaves(digits_path: Path) -> None:
    """Not while they wait; and readers without pixels pack alike."""
    config = settings(digits_path)
    pixels, headers = (Reader(config, "train", content=wanted) for wanted in (("encoder",), ()))
    single = islice(Reader(settings(digits_path, None), "train", content=("encoder",)), 40)
    known = {sample.key: sample for sample in single}
    compared = 0
    for sequence, same in zip(islice(pixels, 10), headers, strict=False):
        assert len(sequence) == len(same)
        for document, other in zip(sequence, same, strict=True):
            assert document.key == other.key
            assert [i.rows for i in images(document)] == [i.rows for i in images(other)]
            assert all(image.patches is None for image in images(other))
            if document.key in known:
                compared += 1
                wanted = known[document.key]
                assert np.array_equal(document.tokens, wanted.tokens)
                for image, decoded in zip(images(document), images(wanted), strict=True):
                    assert np.array_equal(image.patches, decoded.patches)
    assert compared > 10
    waiting = [*pixels.dataset._waiting.buffer, *pixels.dataset._leaving.buffer]
    assert len(waiting) > 10
    assert all(i.patches is None for sample in waiting for i in images(sample.outcome))


def test_a_rejected_sample_passes_through(path: Path, tmp_path: Path) -> None:
    shards = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shards.append(f"{split}/000000.tar")
        unknown = {"json": text(5), "exe": b""}
        samples = [(f"{split}-{i}", unknown if i % 2 else {"json": text(9)}) for i in range(4)]
        write_shard(tmp_path / shards[-1], samples)
    prepare(tmp_path, shards)
    outcomes = list(Reader(settings(tmp_path), "val"))
    assert any(isinstance(outcome, RejectedSample) for outcome in outcomes)


def test_bad_samples_are_spread_between_the_sequences() -> None:
    """Else a large buffer's would come in a row, which looks like a broken dataset."""
    from megatron_mimo.data.loader.sequences import _spread

    found = list(_spread([10, 11, 12, 13, 14], [(0,), (1, 2)]))
    assert found == [(10,), (11,), (0,), (12,), (13,), (14,), (1, 2)]
    assert list(_spread([3, 4], [])) == [(3,), (4,)]
