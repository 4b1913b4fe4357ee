"""Chrome traces of what ranks did, on one clock."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo.schedule.actions import Action
from megatron_mimo.schedule.laps import Label, Lap

MERGED = "timeline.json"
_ROUNDS = 32
_ACTIONS, _STEPS = 0, 1


def clock_offset(group: dist.ProcessGroup, rank: int, ranks: Iterable[int]) -> float:
    """Seconds to add to this rank's `time.perf_counter` for the common clock.

    The common clock is rank 0's, from 0 when this is called. Each rank asks it some times, and
    takes the fastest answer to be from the middle between question and answer, as NTP does.
    Collective over rank 0 and `ranks`.

    Args:
        group: gloo group of the world.
        rank: This global rank, 0 or one of `ranks`.
        ranks: That want to know.
    """
    now = torch.zeros(1, dtype=torch.float64)
    if rank == 0:
        origin = time.perf_counter()
        for other in sorted(set(ranks) - {0}):
            for _ in range(_ROUNDS):
                dist.recv(now, other, group=group)
                now[0] = time.perf_counter() - origin
                dist.send(now, other, group=group)
        return -origin
    fastest, offset = float("inf"), 0.0
    for _ in range(_ROUNDS):
        asked = time.perf_counter()
        dist.send(now, 0, group=group)
        dist.recv(now, 0, group=group)
        answered = time.perf_counter()
        if answered - asked < fastest:
            fastest, offset = answered - asked, float(now) - (asked + answered) / 2
    return offset


def chrome_trace(
    rank: int, role: str, laps: Sequence[Lap], offset: float, part_of: Callable[[Label], str]
) -> dict[str, Any]:
    """A rank's laps in the Trace Event Format that Chrome and Perfetto read.

    Args:
        rank: Global rank, the process of the trace.
        role: In words, its name.
        laps: In order.
        offset: Of `clock_offset`.
        part_of: What the time of a lap counts as in the curves.
    """
    events: list[dict[str, Any]] = [
        _name("process_name", rank, None, {"name": f"rank {rank}: {role}"}),
        _name("process_sort_index", rank, None, {"sort_index": rank}),
        _name("thread_name", rank, _ACTIONS, {"name": "actions"}),
        _name("thread_name", rank, _STEPS, {"name": "iterations"}),
    ]
    bounds: dict[int, tuple[float, float]] = {}
    for lap in laps:
        start, _ = bounds.get(lap.iteration, (lap.start, 0.0))
        bounds[lap.iteration] = (start, lap.end)
        details: dict[str, Any] = {"iteration": lap.iteration, "part": part_of(lap.what)}
        category = "step"
        if isinstance(lap.what, Action):
            category = str(lap.what.kind)
            details |= {"module": str(lap.what.module), "microbatch": lap.what.microbatch}
        events.append(
            _span(str(lap.what), category, rank, _ACTIONS, lap.start + offset, lap.seconds)
            | {"args": details}
        )
    for iteration, (start, end) in bounds.items():
        name = f"iteration {iteration}"
        events.append(_span(name, "iteration", rank, _STEPS, start + offset, end - start))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def timeline_file(folder: Path, rank: int) -> Path:
    """Where a rank's timeline stands."""
    return folder / f"timeline-rank-{rank:05}.json"


def timeline_files(folder: Path) -> list[Path]:
    """What to read of a folder: the ranks' timelines as one, or, where there is none, each."""
    merged = folder / MERGED
    return [merged] if merged.is_file() else sorted(folder.glob("timeline-rank-*.json"))


def profile_file(folder: Path, rank: int) -> Path:
    """Where the trace of torch's profiler of a rank stands."""
    return folder / f"profile-rank-{rank:05}.json"


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write a trace.

    Raises:
        RuntimeError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(trace, separators=(",", ":")) + "\n", encoding="utf-8")
    except OSError as error:
        raise RuntimeError(
            f"cannot write the timeline to --timeline-dir {path.parent}: "
            f"{error.strerror or error}; name another folder, or train without it"
        ) from error


def merge_timelines(folder: Path, ranks: Iterable[int]) -> Path:
    """Put the timelines of some ranks that can be seen from here into one file, and name it."""
    events: list[Any] = []
    for rank in sorted(ranks):
        path = timeline_file(folder, rank)
        if path.exists():
            events += json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    write_trace(folder / MERGED, {"traceEvents": events, "displayTimeUnit": "ms"})
    return folder / MERGED


def _span(
    name: str, category: str, rank: int, thread: int, start: float, seconds: float
) -> dict[str, Any]:
    # The format counts microseconds.
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": start * 1e6,
        "dur": seconds * 1e6,
        "pid": rank,
        "tid": thread,
    }


def _name(what: str, rank: int, thread: int | None, details: dict[str, Any]) -> dict[str, Any]:
    place = {"pid": rank} if thread is None else {"pid": rank, "tid": thread}
    return {"name": what, "ph": "M", "args": details} | place
