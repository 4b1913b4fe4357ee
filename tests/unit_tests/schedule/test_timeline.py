"""Schedules on paper: against the textbook, and against what must hold for any of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.schedule.actions import Action, Kind, Role, build_schedule
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.schedule.timeline import timeline
from megatron_mimo.topology import Layout, ModuleGridSpec, StageId
from tests.unit_tests.schedule.toy import flow_of, grids, random_graphs

FLOWS = [
    flow_of(returning=("encoder",), inside=("encoder",)),
    flow_of(returning=("encoder",)),
    flow_of(),
]


def cost(rank: int, action: Action) -> float:
    return 2.0 if action.kind is Kind.BACKWARD else 1.0


def schedule(layout: Layout, **changes: object) -> dict[Role, tuple[Action, ...]]:
    chosen = {"num_microbatches": 6, "run_ahead": 1, "gradients": True, "flow": FLOWS[0]} | changes
    return build_schedule(layout, **chosen)


@settings(max_examples=200, deadline=None)
@given(random_graphs(), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_every_schedule_ends_and_keeps_to_its_causes(
    graph: tuple[Layout, GradientFlow], num_microbatches: int, run_ahead: int, gradients: bool
) -> None:
    layout, flow = graph
    lists = schedule(
        layout,
        num_microbatches=num_microbatches,
        run_ahead=run_ahead,
        gradients=gradients,
        flow=flow,
    )
    step = timeline(layout, lists, cost)
    assert len(step.events) == sum(
        len(lists[layout.stages_of(rank)]) for rank in range(layout.world_size)
    )
    for event in step.events.values():
        assert event.cause is None or step.events[event.cause].end == event.start
    assert step.makespan >= max(step.busy(rank) for rank in range(layout.world_size))
    # Nothing but the chain of causes makes the step long.
    path = step.critical_path()
    assert sum(event.end - event.start for event in path) == step.makespan


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("num_microbatches", [4, 9])
def test_one_module_takes_what_the_textbook_says(stages: int, num_microbatches: int) -> None:
    layout = Layout.of(ModuleGridSpec(name="llm", pp=stages), world_size=stages)
    step = timeline(layout, schedule(layout, num_microbatches=num_microbatches), cost)
    assert step.makespan == (num_microbatches + stages - 1) * 3


def test_running_ahead_hides_slow_microbatches() -> None:
    layout = grids({}, {})

    def uneven(rank: int, action: Action) -> float:
        slow = action.module == "encoder" and action.microbatch % 3 == 0
        return cost(rank, action) * (1.6 if slow else 0.4 if rank == 0 else 1.0)

    spans = [
        timeline(layout, schedule(layout, run_ahead=ahead, num_microbatches=9), uneven).makespan
        for ahead in (0, 1, 2)
    ]
    assert spans[0] > spans[1] > spans[2]


def test_a_deadlock_is_named() -> None:
    layout = grids({}, {})
    lists = schedule(layout, num_microbatches=1)
    llm = (StageId("llm", 0),)
    lists[llm] = tuple(a for a in lists[llm] if a.kind is not Kind.SEND_GRAD)
    with pytest.raises(RuntimeError, match="never ends: rank 0 at encoder wait grad 0 waits"):
        timeline(layout, lists, cost)
