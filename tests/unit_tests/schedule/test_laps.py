"""What a rank did when: laps from notes, and the notes of the executor."""

from collections.abc import Callable
from typing import Any

from megatron_mimo.schedule.actions import Action, Kind
from megatron_mimo.schedule.laps import Lap, Phase, Recorder
from megatron_mimo.topology import Layout
from tests.unit_tests.schedule.toy import grids, sharding_of

FORWARD = Action(Kind.FORWARD, "llm", 0)


class Counter:
    """A stopwatch that advances by a second with each mark."""

    def __init__(self) -> None:
        self.now = 0
        self.marks: list[float] = []

    def mark(self) -> None:
        self.now += 1
        self.marks.append(self.now)

    def read(self) -> list[float]:
        marks, self.marks = self.marks, []
        return marks


def record(recorder: Recorder, iteration: int) -> None:
    recorder.begin_step(iteration)
    for what in (Phase.DATA, FORWARD, Phase.BETWEEN):
        recorder.note(what)


def test_each_lap_ends_where_the_next_begins() -> None:
    recorder = Recorder(Counter())
    record(recorder, 4)
    record(recorder, 5)
    assert recorder.take() == [
        Lap(4, Phase.DATA, 1, 2),
        Lap(4, FORWARD, 2, 3),
        Lap(5, Phase.DATA, 4, 5),
        Lap(5, FORWARD, 5, 6),
    ]
    assert recorder.take() == []
    record(recorder, 6)
    assert recorder.take() == [Lap(6, Phase.DATA, 7, 8), Lap(6, FORWARD, 8, 9)]


def noted(layout: Layout, sequence_parallel: bool) -> tuple[list[Any], list[Any]]:
    """What a rank's executor noted, and what it should."""
    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.schedule.toy_program import Settings, Toy

    toy = Toy(build_topology(layout), sharding_of(layout, sequence_parallel), Settings())
    seen: list[Any] = []
    toy.run(note=seen.append)
    toy.check()
    return seen, [*toy.executor.actions(5, gradients=True), Phase.DRAIN]


def test_the_executor_notes_its_actions_in_order(run_ranks: Callable[..., list]) -> None:
    layout = grids({"dp": 2}, {"pp": 2})
    found = run_ranks(layout.world_size, noted, layout, False)
    for seen, expected in found:
        assert seen == expected
    assert len({len(seen) for seen, _ in found}) > 1
