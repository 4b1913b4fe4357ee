"""Timelines of ranks: one clock, and files that Perfetto opens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mimo.schedule.actions import Action, Kind
from megatron_mimo.schedule.laps import Label, Lap, Phase
from megatron_mimo.watch.traces import (
    chrome_trace,
    merge_timelines,
    timeline_file,
    write_trace,
)

LAPS = [
    Lap(7, Phase.DATA, 10.0, 10.5),
    Lap(7, Action(Kind.FORWARD, "llm", 3), 10.5, 10.75),
    Lap(8, Phase.DATA, 11.0, 11.25),
]


def part(what: Label) -> str:
    return "compute" if isinstance(what, Action) else "other"


def test_a_lap_is_an_event_in_microseconds() -> None:
    trace = chrome_trace(2, "llm dp 0", LAPS, -10.0, part)
    events = trace["traceEvents"]
    names = {e["name"]: e["args"] for e in events if e["ph"] == "M"}
    assert names["process_name"] == {"name": "rank 2: llm dp 0"}
    assert {event["pid"] for event in events} == {2}
    actions = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert [(e["name"], e["ts"], e["dur"]) for e in actions] == [
        ("data", 0.0, 5e5),
        ("llm forward 3", 5e5, 2.5e5),
        ("data", 1e6, 2.5e5),
    ]
    assert actions[0]["args"] == {"iteration": 7, "part": "other"}
    assert actions[1]["args"] == {
        "iteration": 7,
        "part": "compute",
        "module": "llm",
        "microbatch": 3,
    }
    steps = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == 1]
    assert steps == [("iteration 7", 0.0, 7.5e5), ("iteration 8", 1e6, 2.5e5)]


def test_exchanges_of_items_are_beside_the_steps() -> None:
    trace = chrome_trace(0, "encoder dp 0", LAPS, -10.0, part, [(8, 10.25, 10.75)])
    (event,) = [e for e in trace["traceEvents"] if e.get("cat") == "exchange"]
    assert (event["name"], event["ts"], event["dur"]) == ("items of iteration 8", 2.5e5, 5e5)
    # Without details: a report on a run does not take it for a part of a step.
    assert event["tid"] == 2 and "args" not in event


def test_timelines_merge_without_those_of_other_runs(tmp_path: Path) -> None:
    for rank in range(3):
        path = timeline_file(tmp_path / "traces", rank)
        write_trace(path, chrome_trace(rank, "any", LAPS, 0.0, part))
    merged = merge_timelines(tmp_path / "traces", [2, 0, 5])
    events = json.loads(merged.read_text())["traceEvents"]
    assert sorted({event["pid"] for event in events}) == [0, 2]
    assert len([event for event in events if event["ph"] == "X"]) == 2 * 5


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = timeline_file(tmp_path / "file", 0)
    with pytest.raises(RuntimeError, match=f"--timeline-dir {tmp_path}/file: "):
        write_trace(path, {})


def common_time(shifts: list[float], ranks: list[int]) -> float:
    """The common clock's time of one moment, as a rank with a wrong clock tells it."""
    import time

    import torch.distributed as dist

    from megatron_mimo.watch.traces import clock_offset

    real, shift = time.perf_counter, shifts[dist.get_rank()]
    time.perf_counter = lambda: real() + shift
    try:
        offset = None
        if dist.get_rank() in {0, *ranks}:
            offset = clock_offset(dist.group.WORLD, dist.get_rank(), ranks)
    finally:
        time.perf_counter = real
    # Ranks of one machine share this clock: what they say of its zero must agree.
    return 0.0 if offset is None else shift + offset


def test_ranks_agree_on_the_time_whatever_their_clocks(run_ranks: Callable[..., list]) -> None:
    zero, first, second, _ = run_ranks(4, common_time, [0.0, 1000.0, -50.0, 7.0], [0, 1, 2])
    assert first == pytest.approx(zero, abs=0.02)
    assert second == pytest.approx(zero, abs=0.02)
