"""Chrome traces of the work of ranks, on one clock."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo.runtime.output import named_errors
from megatron_mimo.schedule.actions import Action
from megatron_mimo.schedule.laps import Label, Lap

MERGED = "timeline.json"
_ROUNDS = 32
_ACTIONS, _STEPS, _EXCHANGES = 0, 1, 2


def clock_offset(group: dist.ProcessGroup, rank: int, ranks: Iterable[int]) -> float:
    """Seconds to add to this rank's `time.perf_counter` for the common clock.

    The common clock is that of rank 0, and is 0 when this is called. Each rank asks for the time
    repeatedly, and assumes that the fastest answer was given halfway between question and answer,
    as NTP does. Collective over rank 0 and `ranks`.

    Args:
        group: Group of all ranks with the gloo backend.
        rank: Global rank of this process, 0 or one of `ranks`.
        ranks: Ranks that need the offset.
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
    rank: int,
    role: str,
    laps: Sequence[Lap],
    offset: float,
    part_of: Callable[[Label], str],
    exchanges: Sequence[tuple[int, float, float]] = (),
) -> dict[str, Any]:
    """A rank's laps in the Trace Event Format that Chrome and Perfetto read.

    Args:
        rank: Global rank, which is the process of the trace.
        role: Description of the rank, which is the name of that process.
        laps: Laps of the rank, in order.
        offset: Seconds from `clock_offset`.
        part_of: Function that gives the part of a step that a lap's time counts as in the curves.
        exchanges: Iteration, start and end of each exchange of items ahead of a step, in seconds of
            the rank's clock.
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
    if exchanges:
        events.append(_name("thread_name", rank, _EXCHANGES, {"name": "items ahead"}))
    for iteration, start, end in exchanges:
        name = f"items of iteration {iteration}"
        events.append(_span(name, "exchange", rank, _EXCHANGES, start + offset, end - start))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def timeline_file(folder: Path, rank: int) -> Path:
    """Path to the timeline of a rank."""
    return folder / f"timeline-rank-{rank:05}.json"


def timeline_files(folder: Path) -> list[Path]:
    """Files to read in a folder: the merged timeline, or, where there is none, each rank's."""
    merged = folder / MERGED
    return [merged] if merged.is_file() else sorted(folder.glob("timeline-rank-*.json"))


def profile_file(folder: Path, rank: int) -> Path:
    """Path to the trace of torch's profiler of a rank."""
    return folder / f"profile-rank-{rank:05}.json"


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write a trace.

    Raises:
        RuntimeError: The file cannot be written.
    """
    with named_trace_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(trace, separators=(",", ":")) + "\n")
            file.flush()
            # Some file systems tell of a full disk only here.
            os.fsync(file.fileno())


def named_trace_errors(folder: Path) -> contextlib.AbstractContextManager[None]:
    """`runtime.output.named_errors` for files in the folder of traces."""
    return named_errors(
        f"the timeline to --timeline-dir {folder}",
        otherwise="name another folder, or train without it",
    )


def merge_timelines(folder: Path, ranks: Iterable[int]) -> Path:
    """Merge those timelines of some ranks that this machine can read; returns the path."""
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
