"""A rank's readers against energon's own loader of each lane."""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, wraps
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.energon import WorkerConfig, get_train_dataset
from megatron.energon.savable_loader import SavableDataLoader
from PIL import Image

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.loader.stream_loader import build_train_loader
from megatron_mimo.data.reading.energon import VirtualWorker
from megatron_mimo.data.reading.readers import (
    Position,
    Routing,
    deal,
    eval_streams,
    num_processes,
    train_streams,
)
from megatron_mimo.data.reading.task_encoder import MimoTaskEncoder
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.role import DataRole, SourceRole
from megatron_mimo.data.samples.sample import Drawn, draw
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import ImageConfig, ImageInput
from tests.harness.slices import slow_but

TOKENIZER = ByteTokenizer()
# Over 32 workers 6 or 7 each, and shards of unequal length.
SHARDS = (90, 7, 61, 45)
NUM_SAMPLES = sum(SHARDS)
LANES = 16
# In packed sequences several samples are one draw.
PACKINGS = (None, 5)
# Whatever packed readers do right, single samples do too, and every test here starts processes.
MOSTLY_PACKED = (pytest.param(None, marks=pytest.mark.slow, id="None"), 5)
Draws = list[str]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of pictures and texts of many sizes."""
    folder = tmp_path_factory.mktemp("readers")
    (folder / "train").mkdir()
    numbers = iter(range(NUM_SAMPLES))
    shards = []
    for shard, size in enumerate(SHARDS):
        shards.append(f"train/{shard}.tar")
        write_shard(folder / shards[-1], [stored(n) for n in islice(numbers, size)])
    (folder / "val").mkdir()
    shards.append("val/0.tar")
    write_shard(folder / shards[-1], [stored(n) for n in range(1000, 1040)])
    prepare(folder, shards)
    return str(folder)


def stored(number: int) -> tuple[str, dict[str, bytes]]:
    """Its key, a text whose length goes by its number, and mostly an image."""
    parts = {"json": said(number, "<image>" if number % 4 else "")}
    if number % 4:
        buffer = io.BytesIO()
        size = 8 + number % 24
        Image.effect_noise((size, 40 - size), number).save(buffer, "PNG")
        parts["png"] = buffer.getvalue()
    return f"{number:04d}", parts


def said(number: int, image: str) -> bytes:
    return json.dumps({"question": image + "?" * (number % 17), "answer": str(number)}).encode()


def config(path: str, **fields: Any) -> DataConfig:
    sizes = {"shuffle_buffer_size": 5, "max_samples_per_sequence": 3, "seq_length": 96}
    return DataConfig(provider="energon", path=path, **(sizes | fields))


def role(lanes: Sequence[int], num_lanes: int, *, pixels: bool = True) -> DataRole:
    return DataRole(
        lanes=tuple(lanes),
        num_lanes=num_lanes,
        text_lane=None if pixels else lanes[0],
        sources={
            "encoder": SourceRole(
                rank=0 if pixels else None, serving={lane: (0,) for lane in range(num_lanes)}
            )
        },
    )


def identity(found: Any) -> str:
    """Differs when a token, a pixel, the grouping or anything left out does."""
    assert isinstance(found, Drawn), found
    digest = hashlib.blake2b(repr(found.skipped).encode(), digest_size=8)
    for document in found.documents:
        digest.update(document.tokens.tobytes() + document.targets.tobytes())
        for image in document.items.get("encoder", ()):
            digest.update(repr((image.grids, image.rows)).encode())
            digest.update(b"" if image.patches is None else image.patches.tobytes())
    return " ".join(document.key for document in found.documents) + " " + digest.hexdigest()


def keys(draws: Draws) -> list[str]:
    return [key for found in draws for key in found.split()[:-1]]


def take(streams: Mapping[int, Any], number: int) -> dict[int, Draws]:
    """So many of each lane, which are not asked in the order in which readers work."""
    found: dict[int, Draws] = {lane: [] for lane in streams}
    for turn in range(number):
        for lane in sorted(streams, reverse=turn % 2 == 1):
            found[lane].append(identity(next(streams[lane])))
    return found


def of_energon(settings: DataConfig, lane: int, num_lanes: int, number: int) -> Draws:
    """What a loader of energon's own gives a lane."""
    dataset: Any = get_train_dataset(
        settings.path,
        worker_config=WorkerConfig(
            rank=lane,
            world_size=num_lanes,
            num_workers=settings.num_workers,
            seed_offset=settings.seed,
        ),
        batch_size=None,
        shuffle_buffer_size=settings.shuffle_buffer_size or None,
        max_samples_per_sequence=settings.max_samples_per_sequence,
        packing_buffer_size=settings.packing_buffer_size,
        task_encoder=MimoTaskEncoder(settings, TOKENIZER, content=("encoder",)),
    )
    loader: Any = SavableDataLoader(
        dataset, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None
    )
    loader.pin_memory = False
    outcomes = iter(loader)
    found = [identity(draw(outcomes, "energon", 10)) for _ in range(number)]
    outcomes.close()
    return found


@cache
def by_energon(
    path: str, lane: int, num_lanes: int, num_workers: int, packing: int | None
) -> Draws:
    """What a lane gets over two epochs."""
    # Energon gives the same by one worker as by none, see below, and without sixteen processes.
    started = 0 if num_workers == 1 and num_lanes == LANES else num_workers
    settings = config(path, num_workers=started, packing_buffer_size=packing)
    return of_energon(settings, lane, num_lanes, two_epochs(num_lanes, num_workers, packing))


def two_epochs(num_lanes: int, num_workers: int, packing: int | None = None) -> int:
    """Sequences of a lane; packed ones hold three samples or so."""
    per_lane = max(1, num_workers)
    samples = 2 * -(-NUM_SAMPLES // (num_lanes * per_lane))
    return per_lane * (samples if packing is None else -(-samples // 3))


# -- lane by lane ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "lanes",
    slow_but([(5,), (6, 7), (2, 3, 4, 5), tuple(range(LANES))], (5,), (2, 3, 4, 5)),
)
def test_every_lane_sees_what_a_loader_of_its_own_gives(
    path: str, lanes: tuple[int, ...], num_workers: int, packing: int | None
) -> None:
    settings = config(
        path, num_workers=num_workers, packing_buffer_size=packing, loader_processes=3
    )
    number = two_epochs(LANES, num_workers, packing)
    found = take(train_streams(settings, role(lanes, LANES), TOKENIZER), number)
    assert found == {lane: by_energon(path, lane, LANES, num_workers, packing) for lane in lanes}
    assert len({sample for draws in found.values() for sample in keys(draws)}) > 10 * len(lanes)


@pytest.mark.parametrize("packing", MOSTLY_PACKED)
def test_uneven_shares_of_lanes(path: str, packing: int | None) -> None:
    settings = config(path, num_workers=2, packing_buffer_size=packing, loader_processes=2)
    number = two_epochs(4, 2, packing)
    found: dict[int, Draws] = {}
    for lanes in ((0, 1, 2), (3,)):
        found |= take(train_streams(settings, role(lanes, 4), TOKENIZER), number)
    assert found == {lane: by_energon(path, lane, 4, 2, packing) for lane in range(4)}


@pytest.mark.parametrize("processes", [0, 1, 2, 5, 99])
def test_the_number_of_processes_decides_nothing(path: str, processes: int) -> None:
    settings = config(path, num_workers=2, loader_processes=processes)
    found = take(train_streams(settings, role((0, 1, 2), 4), TOKENIZER), 30)
    assert found == {lane: by_energon(path, lane, 4, 2, None)[:30] for lane in range(3)}


def test_without_workers_reads_as_one_does(path: str) -> None:
    streams = train_streams(config(path, num_workers=0), role((1, 2), 4), TOKENIZER)
    wanted = {lane: by_energon(path, lane, 4, 1, None) for lane in (1, 2)}
    assert take(streams, 50) == {lane: draws[:50] for lane, draws in wanted.items()}
    assert wanted == {lane: by_energon(path, lane, 4, 0, None) for lane in (1, 2)}


def test_large_arrays_cross_whole(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((1200, 1000), 90).save(buffer, "PNG")
    write_shard(
        tmp_path / "train/0.tar",
        [(str(n), {"json": said(n, "<image>"), "png": buffer.getvalue()}) for n in range(4)],
    )
    prepare(tmp_path, ["train/0.tar"])
    settings = config(str(tmp_path), num_workers=1, loader_processes=2, seq_length=10_000)
    settings = replace(settings, inputs={"encoder": ImageInput(config=ImageConfig(max_patches=0))})
    (found, here) = (
        take(train_streams(replace(settings, **change), role((0, 1), 2), TOKENIZER), 3)
        for change in ({}, {"loader_processes": 0})
    )
    assert found == here


# -- epochs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_lanes", "num_workers"), [(2, 1), (4, 2), (3, 3), (16, 2)])
def test_an_epoch_ends_without_loss(path: str, num_lanes: int, num_workers: int) -> None:
    """The share of each worker comes once in each epoch, whatever its length."""
    settings = config(path, num_workers=num_workers, shuffle_buffer_size=0, loader_processes=2)
    streams = train_streams(settings, role(range(num_lanes), num_lanes), TOKENIZER)
    number = two_epochs(num_lanes, num_workers)
    shares = set()
    for draws in take(streams, number).values():
        for worker in range(num_workers):
            read = keys(draws[worker::num_workers])
            share = list(dict.fromkeys(read))
            assert sorted(read[: len(share)]) == sorted(share)
            assert sorted(read[len(share) : 2 * len(share)]) == sorted(share)
            assert not shares & set(share)
            shares |= set(share)
    assert len(shares) == NUM_SAMPLES


@pytest.mark.parametrize("packing", MOSTLY_PACKED)
def test_both_grids_stay_aligned_over_epochs(path: str, packing: int | None) -> None:
    settings = config(
        path, num_workers=2, loader_processes=2, packing_buffer_size=packing, global_batch_size=3
    )
    roles = [role((0, 1), 3), role((2,), 3), *(role((lane,), 3, pixels=False) for lane in range(3))]
    loaders = [build_train_loader(settings, given, TOKENIZER) for given in roles]
    # Three epochs or so; packed, three samples are one sequence.
    for _ in range(NUM_SAMPLES if packing is None else NUM_SAMPLES // 3):
        digests: dict[int, set[int]] = {}
        for loader in loaders:
            for lane, digest in loader.next_step().lane_digest.items():
                digests.setdefault(lane, set()).add(digest)
        assert [len(of_lane) for of_lane in digests.values()] == [1, 1, 1]


def test_evaluation_begins_in_stored_order_at_each_call(path: str) -> None:
    settings = config(path, num_workers=2)
    first, again = (take(eval_streams(settings, role((0, 1), 2), TOKENIZER), 45) for _ in range(2))
    assert first == again
    assert keys(first[0][:20]) == [f"{n}" for n in range(1000, 1020)]
    assert first[1][20:40] == first[1][:20]


# -- stopping and going on -------------------------------------------------------------------------

Cut = tuple[tuple[int, ...], ...]


def states_after(path: str, cut: Cut, number: int, **fields: Any) -> list[Any]:
    """The states of all lanes after so many sequences of each."""
    num_lanes = sum(map(len, cut))
    states: dict[int, Any] = {}
    for lanes in cut:
        streams = train_streams(config(path, **fields), role(lanes, num_lanes), TOKENIZER)
        take(streams, number)
        states |= {lane: stream.state() for lane, stream in streams.items()}
    return [states[lane] for lane in range(num_lanes)]


def resumed(path: str, states: list[Any], cut: Cut, **fields: Any) -> dict[int, Any]:
    """Streams that go on, reader by reader."""
    num_lanes = sum(map(len, cut))
    streams: dict[int, Any] = {}
    for lanes in cut:
        mine = train_streams(config(path, **fields), role(lanes, num_lanes), TOKENIZER)
        for lane, stream in mine.items():
            stream.restore(lane, states)
        streams |= mine
    return streams


@pytest.mark.parametrize("packing", MOSTLY_PACKED)
@pytest.mark.parametrize("number", slow_but([0, 1, 64, 131], 64))
def test_goes_on_as_if_it_had_not_stopped(path: str, number: int, packing: int | None) -> None:
    data = {"num_workers": 2, "packing_buffer_size": packing}
    wanted = take(train_streams(config(path, **data), role((0, 1), 2), TOKENIZER), number + 90)
    states = states_after(path, ((0, 1),), number, loader_processes=3, **data)
    # A checkpoint was written meanwhile, and is not changed by going on from it.
    for _ in range(2):
        streams = resumed(path, states, ((0,), (1,)), loader_processes=1, **data)
        found = take(streams, 45)
        assert found == {lane: draws[number : number + 45] for lane, draws in wanted.items()}
    # Again, further on.
    later = [stream.state() for stream in streams.values()]
    found = take(resumed(path, later, ((0, 1),), loader_processes=0, **data), 45)
    assert found == {lane: draws[number + 45 :] for lane, draws in wanted.items()}


def test_the_error_over_other_lanes_says_with_which_workers_it_works(path: str) -> None:
    states = states_after(path, ((0, 1),), 1)
    with pytest.raises(ValueError) as error:
        resumed(path, states, ((0, 1, 2, 3),))
    assert str(error.value).endswith(
        "shared by --llm-dp 2 x --num-workers 1, and the product must stay 2: set --llm-dp to one "
        "of 1, 2, and --num-workers to 2 divided by it; for other lanes only --finetune, which "
        "begins with the first sample, is left. A run that begins with --num-workers 4 on 2 lanes "
        "continues with any --llm-dp that divides 8"
    )
    states = states_after(path, ((0, 1),), 1, num_workers=4, loader_processes=0)
    for lanes in (1, 4, 8):
        others = {"num_workers": 8 // lanes, "loader_processes": 0}
        take(resumed(path, states, (tuple(range(lanes)),), **others), 1)


def test_a_state_taken_before_the_first_sequence_is_the_one_restored(path: str) -> None:
    states = states_after(path, ((0, 1),), 70, num_workers=1)
    streams = resumed(path, states, ((0, 1),), num_workers=1)
    assert [stream.state() for stream in streams.values()] == states


def per_worker(streams: Mapping[int, Any], number: int) -> dict[int, Draws]:
    """So many sequences of each lane, by global worker id."""

    def drawn(stream: Any) -> dict[int, int]:
        return {worker: at["drawn"] for worker, at in stream.state()["workers"].items()}

    found: dict[int, Draws] = {}
    for _ in range(number):
        for lane, stream in streams.items():
            before = drawn(stream)
            draws = take({lane: stream}, 1)[lane]
            (worker,) = (
                worker for worker, count in drawn(stream).items() if count != before[worker]
            )
            found.setdefault(worker, []).extend(draws)
    return found


@pytest.mark.parametrize("packing", MOSTLY_PACKED)
@pytest.mark.parametrize(
    ("before", "workers", "after", "workers_after", "number"),
    [
        (((0, 1), (2, 3)), 1, ((0,), (1,)), 2, 8),
        (((0,), (1,)), 2, ((0, 1, 2), (3,)), 1, 11),
        (((0,),), 4, ((0, 1),), 2, 70),
        (((0, 1, 2),), 2, ((0, 1),), 3, 9),
        (((0, 1), (2, 3)), 1, ((0, 1), (2, 3)), 0, 5),
    ],
)
def test_other_lanes_take_the_workers_over(
    path: str,
    before: Cut,
    workers: int,
    after: Cut,
    workers_after: int,
    number: int,
    packing: int | None,
) -> None:
    """Each worker's own order goes on, so that nothing is lost and nothing comes twice."""
    data = {"packing_buffer_size": packing, "loader_processes": 2}
    states = states_after(path, before, number, num_workers=workers, **data)
    streams = resumed(path, states, after, num_workers=workers_after, **data)
    drawn = {w: at["drawn"] for s in streams.values() for w, at in s.state()["workers"].items()}
    total = sum(map(len, before)) * workers
    assert sorted(drawn) == list(range(total))
    assert sum(drawn.values()) == number * sum(map(len, before))
    # One lane for each worker.
    settings = config(path, num_workers=1, packing_buffer_size=packing, loader_processes=0)
    alone = train_streams(settings, role(range(total), total), TOKENIZER)
    wanted = take(alone, max(drawn.values()) + 12)
    for worker, draws in per_worker(streams, 12).items():
        assert 12 // max(1, workers_after) - 1 <= len(draws) <= 12
        assert draws == wanted[worker][drawn[worker] : drawn[worker] + len(draws)]


@pytest.mark.parametrize(
    ("lanes", "workers", "remedy"),
    [
        (1, 2, "must stay 4: set --num-workers 4"),
        (4, 2, "must stay 4: set --num-workers 1"),
        (3, 1, "must stay 4: set --llm-dp to one of 1, 2, 4, and --num-workers to 4 divided by it"),
    ],
)
def test_other_products_say_what_to_keep(path: str, lanes: int, workers: int, remedy: str) -> None:
    states = states_after(path, ((0, 1),), 1, num_workers=2)
    with pytest.raises(ValueError, match=rf"by --llm-dp 2 x --num-workers 2, .*{remedy}"):
        resumed(path, states, (tuple(range(lanes)),), num_workers=workers)


def test_another_dataset_says_so(path: str) -> None:
    states = states_after(path, ((0,),), 1)
    states[0]["num_samples"] = (5, 6)
    with pytest.raises(ValueError, match=f"has {NUM_SAMPLES} samples, and had 5, 6 when"):
        resumed(path, states, ((0,),))


def test_samples_of_another_provider_say_so(path: str) -> None:
    with pytest.raises(ValueError, match="was not read with energon; use --finetune"):
        resumed(path, [{"drawn": 4}], ((0,),))


@pytest.mark.parametrize("processes", [0, 1])
def test_another_pipeline_says_what_to_keep(path: str, processes: int) -> None:
    states = states_after(path, ((0,),), 70, num_workers=1)
    settings = {"num_workers": 1, "loader_processes": processes, "shuffle_buffer_size": 0}
    (found,) = resumed(path, states, ((0,),), **settings).values()
    assert "keep the dataset, --shuffle-buffer-size" in next(found).message


# -- readers that do not read ----------------------------------------------------------------------


def process_named(start: str) -> int:
    """Its id."""
    (process,) = (p for p in multiprocessing.active_children() if p.name.startswith(start))
    assert process.pid is not None
    return process.pid


def test_a_dead_reader_is_named_with_its_lanes(path: str) -> None:
    streams = train_streams(
        config(path, num_workers=2, loader_processes=2), role((4, 5), 8), TOKENIZER
    )
    take(streams, 1)
    name = "reader process 1 of 2 of encoder dp rank 0, with global workers 10, 11 of lanes 5"
    os.kill(process_named(name), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=rf"^{name} \(pid \d+\) was killed by SIGKILL"):
        take(streams, 50)


def test_a_slow_reader_is_named_with_its_worker(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = MimoTaskEncoder.encode_sample

    @wraps(encode)
    def stuck(self: Any, sample: Any) -> Any:
        if WorkerConfig.active_worker_config.rank == 5:
            time.sleep(600)
        return encode(self, sample)

    monkeypatch.setattr(MimoTaskEncoder, "encode_sample", stuck)
    settings = config(
        path, num_workers=2, loader_processes=2, slow_reader_s=1.0, stuck_reader_s=3.0
    )
    streams = train_streams(settings, role((1, 2), 4), TOKENIZER)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RuntimeError, match=r"nothing for 3 s, busy with global worker 5 \(lane 2\)"),
    ):
        take(streams, 2)
    (warning,) = caplog.messages
    assert (
        "reader process 1 of 2 of encoder dp rank 0, with global workers 4, 5 of lanes 2" in warning
    )


def test_a_reader_that_fails_shows_its_traceback(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: VirtualWorker) -> Any:
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(VirtualWorker, "draw", broken)
    streams = train_streams(
        config(path, num_workers=1, loader_processes=1), role((0,), 1), TOKENIZER
    )
    with pytest.raises(
        RuntimeError, match=r"(?s)^reader process 0 of 1 .* failed, busy .*a planted fault"
    ):
        next(streams[0])


# -- routing ---------------------------------------------------------------------------------------


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 30),
    st.lists(st.integers(0, 3), min_size=24, max_size=24),
)
def test_workers_are_dealt_once_and_by_their_turn(
    num_lanes: int, per_lane: int, wanted: int, drawn: list[int]
) -> None:
    routing = Routing(tuple(range(num_lanes)), num_lanes, per_lane)
    processes = num_processes(
        DataConfig(num_workers=per_lane, loader_processes=wanted), routing, cores=1
    )
    positions = {worker: Position(drawn[worker]) for worker in routing.workers}
    dealt = deal(routing, positions, processes)
    assert sorted(worker for workers in dealt for worker in workers) == list(routing.workers)
    sizes = [len(workers) for workers in dealt]
    assert max(sizes) - min(sizes) <= 1
    for workers in dealt:
        counts = [positions[worker].drawn for worker in workers]
        assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("chosen", "workers", "cores", "expected"),
    [(None, 2, 5, 4), (None, 2, 1, 1), (None, 2, 99, 8), (3, 2, 1, 3), (0, 2, 9, 0), (3, 0, 9, 0)],
)
def test_processes_go_by_the_cores(
    chosen: int | None, workers: int, cores: int, expected: int
) -> None:
    routing = Routing((0, 1, 2, 3), 4, max(1, workers))
    settings = DataConfig(num_workers=workers, loader_processes=chosen)
    assert num_processes(settings, routing, cores) == expected


@pytest.mark.parametrize("batch", [1, 4])
def test_lanes_that_are_not_drawn_in_step_are_an_error(path: str, batch: int) -> None:
    settings = config(
        path,
        num_workers=2,
        loader_processes=2,
        micro_batch_size=batch,
        global_batch_size=3 * batch,
    )
    streams = train_streams(settings, role((0, 1, 2), 3), TOKENIZER)
    # A microbatch apart, as a loader draws them, they may be.
    for _ in range(5):
        for stream in streams.values():
            assert len(list(islice(stream, batch))) == batch
    with pytest.raises(
        RuntimeError,
        match=r"^encoder dp rank 0: \d+ sequences of global worker \d \(lane [12]\) wait while "
        r"more of global worker [01] \(lane 0\) are asked for",
    ):
        list(islice(streams[0], 20 * batch))
