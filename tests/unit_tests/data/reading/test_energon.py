import io
import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.loader.stream_loader import (
    StreamLoader,
    build_eval_loader,
    build_train_loader,
)
from megatron_mimo.data.reading.readers import train_streams
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.role import DataRole, SourceRole
from megatron_mimo.data.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
LANES = 2
SERVING = {0: (0,), 1: (0,)}
ENCODER = DataRole(
    lanes=(0, 1),
    num_lanes=LANES,
    text_lane=None,
    sources={"encoder": SourceRole(rank=0, serving=SERVING)},
)


def llm(lane: int) -> DataRole:
    return DataRole(
        lanes=(lane,),
        num_lanes=LANES,
        text_lane=lane,
        sources={"encoder": SourceRole(rank=None, serving=SERVING)},
    )


def config(path: Path, **fields: int) -> DataConfig:
    sizes = {"micro_batch_size": 2, "global_batch_size": 8, "shuffle_buffer_size": 0}
    return DataConfig(provider="energon", path=str(path), **(sizes | fields))  # type: ignore[arg-type]


def keys(loader: StreamLoader, number: int) -> list[str]:
    steps = [loader.next_step() for _ in range(number)]
    return [key for step in steps for m in step.microbatches for key in m.text.sample_keys]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_encoder_and_language_model_read_the_same_samples(
    digits_path: Path, num_workers: int
) -> None:
    settings = config(digits_path, num_workers=num_workers, shuffle_buffer_size=20)
    encoder = build_train_loader(settings, ENCODER, TOKENIZER)
    lanes = [build_train_loader(settings, llm(lane), TOKENIZER) for lane in range(LANES)]
    seen: set[int] = set()
    for _ in range(10):  # more than an epoch
        pixels, tokens = encoder.next_step(), [loader.next_step() for loader in lanes]
        for lane, of_lane in enumerate(tokens):
            assert of_lane.lane_digest[lane] == pixels.lane_digest[lane]
            assert of_lane.lane_target_tokens[lane] == pixels.lane_target_tokens[lane]
            for here, there in zip(pixels.microbatches, of_lane.microbatches, strict=True):
                assert [e for e in here.manifest if e.lane == lane] == list(there.manifest)
        seen |= set(pixels.lane_digest.values())
    assert len(seen) == 20


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lanes_share_an_epoch_without_overlap(digits_path: Path, num_workers: int) -> None:
    settings = config(digits_path, num_workers=num_workers)
    epoch = [
        {document.key for drawn in islice(stream, 30) for document in drawn.documents}
        for stream in (train_streams(settings, llm(lane), TOKENIZER)[lane] for lane in range(LANES))
    ]
    assert epoch[0] | epoch[1] == {f"train-{i:06d}" for i in range(60)}
    assert not epoch[0] & epoch[1]


def test_training_is_shuffled_by_the_seed(digits_path: Path) -> None:
    orders = [
        keys(build_train_loader(settings, llm(0), TOKENIZER), 3)
        for settings in (
            config(digits_path, seed=seed, shuffle_buffer_size=20) for seed in (1, 1, 2)
        )
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_evaluation_is_in_stored_order_and_goes_round(digits_path: Path) -> None:
    settings = config(digits_path, num_workers=2)
    first, again = (keys(build_eval_loader(settings, llm(0), TOKENIZER), 10) for _ in range(2))
    assert first == again
    assert first[:15] == [f"val-{i:06d}" for i in range(15)]
    assert first[15:30] == first[:15]


# -- broken data -----------------------------------------------------------------------------------


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((24, 24), 50).save(buffer, "PNG")
    return buffer.getvalue()


def text(question: str = "<image>What?", answer: str = "this") -> bytes:
    return json.dumps({"question": question, "answer": answer}).encode()


Write = Callable[[Mapping[str, Mapping[str, bytes]]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a dataset whose train and val split hold the given samples."""

    def write(samples: Mapping[str, Mapping[str, bytes]]) -> Path:
        shards = []
        for split in ("train", "val"):
            (tmp_path / split).mkdir()
            shards.append(f"{split}/000000.tar")
            named = [(f"{split}-{key}", parts) for key, parts in samples.items()]
            write_shard(tmp_path / shards[-1], named)
        prepare(tmp_path, shards)
        return tmp_path

    return write


@pytest.mark.parametrize("num_workers", [0, 1])
def test_both_readers_skip_the_same_broken_images(write: Write, num_workers: int) -> None:
    samples = {f"{i:02d}": {"png": png(), "json": text()} for i in range(24)}
    for broken, keep in (("03", 40), ("11", 0), ("20", 200)):
        samples[broken]["png"] = samples[broken]["png"][:keep]
    samples["07"]["json"] = b'{"question": '
    settings = config(write(samples), num_workers=num_workers)
    encoder = build_train_loader(settings, ENCODER, TOKENIZER)
    lanes = [build_train_loader(settings, llm(lane), TOKENIZER) for lane in range(LANES)]
    seen = []
    for _ in range(6):
        pixels = encoder.next_step()
        for lane, loader in enumerate(lanes):
            step = loader.next_step()
            assert step.lane_digest[lane] == pixels.lane_digest[lane]
            seen += [k for m in step.microbatches for k in m.text.sample_keys]
    assert {key[-2:] for key in seen} == {f"{i:02d}" for i in range(24)} - {"03", "07", "11", "20"}
    assert encoder.skips.num_skipped == sum(loader.skips.num_skipped for loader in lanes) > 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mismatch_names_key_dataset_and_shard(write: Write, num_workers: int) -> None:
    path = write({"a": {"png": png(), "json": text("<image><image>Which?")}})
    role = DataRole(
        lanes=(0,),
        num_lanes=1,
        text_lane=0,
        sources={"encoder": SourceRole(rank=0, serving={0: (0,)})},
    )
    loader = build_train_loader(config(path, num_workers=num_workers), role, TOKENIZER)
    with pytest.raises(ValueError, match="2 <image> placeholders .* 1 image:") as caught:
        loader.next_step()
    assert f"sample 'train-a' of dataset {path}, shard train/000000.tar" in str(caught.value)


def test_dataset_of_broken_images_stops(write: Write) -> None:
    path = write({f"{i}": {"png": b"", "json": text()} for i in range(3)})
    role = DataRole(
        lanes=(0,),
        num_lanes=1,
        text_lane=0,
        sources={"encoder": SourceRole(rank=0, serving={0: (0,)})},
    )
    with pytest.raises(ValueError, match="9 unusable samples in a row"):
        build_train_loader(config(path, max_skips_in_row=9), role, TOKENIZER).next_step()


def test_more_lanes_than_samples_is_an_error(write: Write) -> None:
    path = write({"only": {"png": png(), "json": text()}})
    with pytest.raises(ValueError, match=r"lane \d of 2 ran out of samples"):
        build_eval_loader(config(path), ENCODER, TOKENIZER).next_step()


def test_missing_dataset_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--data-path .*nowhere does not exist: .* `megatron-mimo data digits"
    ):
        build_train_loader(config(tmp_path / "nowhere"), llm(0), TOKENIZER)


def test_unprepared_dataset_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is not prepared for Energon: .* run `megatron-mimo data prep"
    ):
        build_train_loader(config(tmp_path), llm(0), TOKENIZER)


def test_file_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="is a file that Energon cannot train from"):
        build_train_loader(config(tmp_path / "a.txt"), llm(0), TOKENIZER)


def test_missing_split_names_it(digits_path: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train/0.tar", [("a", {"json": text("q")})])
    prepare(tmp_path, ["train/0.tar"])
    with pytest.raises(ValueError, match="the val split cannot be opened"):
        build_eval_loader(config(tmp_path), llm(0), TOKENIZER)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("kept", "reason"), [(None, "No such file"), (0, "empty file|end of tar")])
def test_a_dataset_that_cannot_be_read_stops(
    write: Write, kept: int | None, reason: str, num_workers: int
) -> None:
    path = write({f"{i}": {"json": text("q")} for i in range(9)})
    shard = path / "train/000000.tar"
    shard.unlink()
    if kept is not None:
        shard.touch()
    loader = build_train_loader(config(path, num_workers=num_workers), llm(0), TOKENIZER)
    with pytest.raises(
        ValueError,
        match=rf"100 unusable samples in a row, .* of dataset {path}, shard train/000000.tar "
        rf"\(its shard cannot be read: .*({reason})",
    ):
        keys(loader, 1)
