"""Reading all lanes of a rank, ours by a few processes against one of energon's loaders per lane.

Both give every lane the same samples, one worker a lane, each with a shuffle buffer of 100 and two
samples read ahead, from 2400 JPEG pictures of 256 to 640 pixels in eight shards:

- *ours*: `train_streams`, four processes (two for four lanes);
- *the peer*: a `SavableDataLoader` for each lane, with energon's own settings and our task encoder,
  hence a process a lane.

Each side runs in a process of its own, in turns with the other. *Resident memory* is the
proportional set size of the reading process and its readers, while they read. Files that are
opened are counted by Python's audit events in all of these processes; metadata are those in
`.nv-meta`. *Processor time* is that of all of them; it says what reading costs also where other
work runs beside it, since there the system favours whoever has more processes. Time to the first
batch counts from imported modules and closed files.

Reading images by their headers, reading clips and videos by their packets, and packing, are
measured by `loader_reading.py`, `loader_recordings.py` and `loader_packing.py`.

    python benchmarks/bench_loader.py [--smoke | --quick] [--json FILE]
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import loader_packing
import loader_reading
import loader_recordings
from benchlib.ranks import turns
from benchlib.report import Row, Size, run_benchmark

# Lanes of a rank and processes that read them; repetitions; samples of a shard; and samples of
# each lane before and while time is taken.
CASES: dict[Size, tuple[tuple[tuple[int, int], ...], int, int, int, int]] = {
    "smoke": (((2, 1),), 1, 20, 2, 4),
    "quick": (((4, 2), (16, 4)), 1, 300, 20, 15),
    "full": (((4, 2), (16, 4)), 3, 300, 20, 60),
}
SHARDS = 8
FIRST_TARGET, MEMORY_TARGET, SAMPLES_TARGET = 0.35, 0.45, 1 / 1.1
JUDGED = 16
KINDS = ("shards", "indices of shards", "metadata")
# What the process of a side is to do, in its environment.
TASK = "BENCH_LOADER_TASK"


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case."""
    cases, repetitions, per_shard, warm_up, timed = CASES[size]
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        write_dataset(Path(folder), per_shard)
        for lanes, processes in cases:
            given = {
                "path": folder,
                "lanes": lanes,
                "processes": processes,
                "warm_up": warm_up,
                "timed": timed,
            }
            yield from compared(lanes, processes, measured(given, repetitions))
    yield from loader_reading.rows(size)
    yield from loader_recordings.rows(size)
    yield from loader_packing.rows(size)


def write_dataset(folder: Path, per_shard: int) -> None:
    """Noise that compresses like photographs."""
    import numpy as np
    from PIL import Image

    from megatron_mimo.data.reading.webdataset import prepare, write_shard

    random = np.random.default_rng(5)

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        width, height = (int(side) for side in random.integers(256, 641, 2))
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        text = {"question": "<image>What is it?", "answer": "x" * int(random.integers(20, 400))}
        return f"{number:06d}", {"jpg": buffer.getvalue(), "json": json.dumps(text).encode()}

    (folder / "train").mkdir()
    shards = [f"train/{shard}.tar" for shard in range(SHARDS)]
    for shard, name in enumerate(shards):
        first = shard * per_shard
        write_shard(folder / name, [sample(n) for n in range(first, first + per_shard)])
    prepare(folder, shards)


def measured(given: dict[str, Any], repetitions: int) -> dict[str, list[dict[str, Any]]]:
    """Both sides in turns, each time in new processes."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for repetition in range(repetitions):
        for side in turns(tuple(found), repetition):
            found[side].append(run_side(given | {"side": side}))
    assert found["ours"][0]["seen"] == found["peer"][0]["seen"], "the two read other samples"
    return found


def run_side(given: dict[str, Any]) -> dict[str, Any]:
    """What `work` measures in a new process; nothing that it started is left running."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = {TASK: json.dumps(given | {"answer": str(answer)})}
        ran = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | environment,
            start_new_session=True,
        )
        code = ran.wait()
        # Readers of the peer's outlive a parent that leaves at once.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ran.pid, signal.SIGKILL)
        if code:
            raise RuntimeError(f"{Path(__file__).name} ended with code {code}, given {given}")
        found: dict[str, Any] = json.loads(answer.read_text())
    return found


def compared(lanes: int, processes: int, found: dict[str, list[dict[str, Any]]]) -> Iterator[Row]:
    """The rows of one case."""

    def row(what: str, name: str, target: float | None, unit: str) -> Row:
        ours, peer = (tuple(result[name] for result in found[side]) for side in ("ours", "peer"))
        return Row(
            table="All lanes of a rank",
            line=what,
            column=f"{lanes} lanes, {processes} processes",
            ours=ours,
            peer=peer,
            target=target if lanes == JUDGED else None,
            unit=unit,
        )

    yield row("first batch on all lanes", "first", FIRST_TARGET, "s")
    yield row("resident memory", "memory", MEMORY_TARGET, "MB")
    yield row("time of a sample", "sample", SAMPLES_TARGET, "ms")
    yield row("processor time of a sample", "processor", None, "ms")
    for kind in KINDS:
        # Once for all lanes instead of once a lane.
        yield row(f"{kind} opened", kind, 1 / lanes if kind == "metadata" else None, "files")


# -- one side, in its own process ------------------------------------------------------------------


def work() -> None:
    """Measure one side."""
    import gc

    import megatron.energon  # noqa: F401

    import megatron_mimo.data.reading.readers  # noqa: F401

    given = json.loads(os.environ[TASK])
    opened = count_opened(given["path"])
    draw = {"ours": our_draws, "peer": peer_draws}[given["side"]](given)
    lanes = range(given["lanes"])
    gc.collect()
    began = time.perf_counter()
    seen = [[draw(lane)] for lane in lanes]
    first = time.perf_counter() - began
    for _ in range(given["warm_up"]):
        for lane in lanes:
            seen[lane].append(draw(lane))
    began, busy = time.perf_counter(), processor_s()
    for _ in range(given["timed"]):
        for lane in lanes:
            seen[lane].append(draw(lane))
    samples = given["timed"] * len(lanes)
    answer = {
        "first": first,
        "sample": 1e3 * (time.perf_counter() - began) / samples,
        "processor": 1e3 * (processor_s() - busy) / samples,
        "memory": resident_mb(),
        "seen": seen,
    }
    answer |= dict(zip(KINDS, opened, strict=True))
    Path(given["answer"]).write_text(json.dumps(answer))
    # Closing sixteen loaders in turn would take a while.
    os._exit(0)


def settings(given: dict[str, Any]) -> Any:
    """Data configuration of both sides."""
    from megatron_mimo.data import DataConfig
    from megatron_mimo.media.images import ImageConfig, ImageInput

    return DataConfig(
        provider="energon",
        path=given["path"],
        seq_length=8192,
        num_workers=1,
        loader_processes=given["processes"],
        inputs={"encoder": ImageInput(config=ImageConfig(patch_dim=16, max_patches=1024))},
    )


def our_draws(given: dict[str, Any]) -> Callable[[int], str]:
    """The key of a lane's next sample."""
    from megatron_mimo.data import ByteTokenizer, DataRole, SourceRole
    from megatron_mimo.data.reading.readers import train_streams

    lanes = tuple(range(given["lanes"]))
    role = DataRole(
        lanes=lanes,
        num_lanes=len(lanes),
        text_lane=None,
        sources={"encoder": SourceRole(rank=0, serving=dict.fromkeys(lanes, (0,)))},
    )
    streams: dict[int, Any] = {}

    def draw(lane: int) -> str:
        if not streams:
            streams.update(train_streams(settings(given), role, ByteTokenizer()))
        key: str = next(streams[lane]).documents[0].key
        return key

    return draw


def peer_draws(given: dict[str, Any]) -> Callable[[int], str]:
    """The same by a loader for each lane."""
    from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.data.reading.task_encoder import MimoTaskEncoder

    config, tokenizer = settings(given), ByteTokenizer()
    samples: dict[int, Any] = {}

    def draw(lane: int) -> str:
        if lane not in samples:
            dataset = get_train_dataset(
                config.path,
                worker_config=WorkerConfig(
                    rank=lane, world_size=given["lanes"], num_workers=1, seed_offset=config.seed
                ),
                batch_size=None,
                shuffle_buffer_size=config.shuffle_buffer_size,
                max_samples_per_sequence=config.max_samples_per_sequence,
                task_encoder=MimoTaskEncoder(config, tokenizer, content=("encoder",)),
            )
            loader = get_savable_loader(dataset)
            loader.pin_memory = False
            samples[lane] = iter(loader)
        key: str = next(samples[lane]).key
        return key

    return draw


def count_opened(path: str) -> Any:
    """Counts of files opened below a folder, by kind, in this process and those it forks."""
    # Processes may count at the same moment; one in a hundred thousand is lost.
    counts = RawArray("q", len(KINDS))
    endings = (".tar", ".tar.idx")

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event not in ("open", "sqlite3.connect") or not str(given[0]).startswith(path):
            return
        name = str(given[0])
        for kind, ending in enumerate(endings):
            if name.endswith(ending):
                counts[kind] += 1
        if ".nv-meta" in name:
            counts[2] += 1

    sys.addaudithook(note)
    return counts


def processor_s() -> float:
    """Seconds that this process and all below it have computed, those of the system included."""
    ticks = 0
    for pid in family():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mb() -> float:
    """Proportional set size of this process and all below it."""
    kilobytes = 0
    for pid in family():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kilobytes += int(rollup.split("\nPss:")[1].split()[0])
    return kilobytes / 1e3


def family() -> set[int]:
    """This process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


if __name__ == "__main__":
    work() if TASK in os.environ else run_benchmark(__doc__, measure, threads=1)
