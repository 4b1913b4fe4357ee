"""Schedules are checked by running all ranks' lists against each other without any process."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.schedule.actions import (
    Action,
    GradientFlow,
    Kind,
    Module,
    Role,
    build_schedule,
    role_of,
)
from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.unit_tests.schedule.toy import grids

ALL = GradientFlow(encoder=True, bridge=True)
FLOWS = [ALL, GradientFlow(encoder=False, bridge=True), GradientFlow(encoder=False, bridge=False)]

Schedule = dict[Role, tuple[Action, ...]]


def schedule(layout: Layout, **changes: object) -> Schedule:
    chosen = {"num_microbatches": 5, "run_ahead": 1, "gradients": True, "flow": ALL} | changes
    return build_schedule(layout, **chosen)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    encoder = {"pp": draw(st.integers(1, 4)), "dp": draw(st.integers(1, 2))}
    if draw(st.booleans()):
        size = encoder["pp"] * encoder["dp"]
        pp = draw(st.sampled_from([pp for pp in range(1, size + 1) if size % pp == 0]))
        return grids(encoder, {"pp": pp, "dp": size // pp}, colocated=True)
    return grids(
        None if draw(st.booleans()) else encoder,
        {"pp": draw(st.integers(1, 4)), "dp": draw(st.integers(1, 2))},
    )


def run_together(layout: Layout, lists: Schedule) -> None:
    """Advance every role until none can. A wait needs the other end's send, or its post.

    All ranks of a stage count as one: what they wait for is what all ranks of the other stage sent.
    """
    done: set[tuple[Role, Action]] = set()
    position = dict.fromkeys(lists, 0)
    line = [(Module.ENCODER, j) for j in range(layout.encoder.pp if layout.encoder else 0)]
    line += [(Module.LLM, p) for p in range(layout.llm.pp)]

    def neighbours(role: Role, action: Action, step: int) -> list[tuple[Role, Module]]:
        stage = role.stage(action.module)
        module, wanted = line[line.index((action.module, stage)) + step]
        return [(other, module) for other in lists if other.stage(module) == wanted]

    def happened(role: Role, action: Action, kind: Kind, step: int) -> bool:
        return all(
            (other, Action(kind, module, action.microbatch)) in done
            for other, module in neighbours(role, action, step)
        )

    def may_run(role: Role, action: Action) -> bool:
        match action.kind:
            case Kind.WAIT_INPUT:
                return happened(role, action, Kind.SEND_OUTPUT, -1)
            case Kind.WAIT_GRAD:
                return happened(role, action, Kind.SEND_GRAD, +1)
            case Kind.WAIT_SENT:
                # A role with both ends posts what it receives when it sends.
                return all(
                    (other, Action(Kind.POST_INPUT, module, action.microbatch)) in done
                    or (other, Action(Kind.SEND_OUTPUT, action.module, action.microbatch)) in done
                    for other, module in neighbours(role, action, +1)
                )
        return True

    moved = True
    while moved:
        moved = False
        for role, todo in lists.items():
            while position[role] < len(todo) and may_run(role, todo[position[role]]):
                done.add((role, todo[position[role]]))
                position[role] += 1
                moved = True
    stuck = {
        role: todo[position[role]] for role, todo in lists.items() if position[role] < len(todo)
    }
    assert not stuck


def most_alive(todo: tuple[Action, ...], module: Module) -> int:
    """The most microbatches of a module that are forward without their backward."""
    alive = highest = 0
    for action in todo:
        if action.module is module:
            alive += {Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(action.kind, 0)
            highest = max(highest, alive)
    return highest


@settings(max_examples=300)
@given(
    layouts(),
    st.integers(1, 9),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(FLOWS),
)
def test_every_schedule_reaches_its_end(
    layout: Layout, num_microbatches: int, run_ahead: int, gradients: bool, flow: GradientFlow
) -> None:
    lists = schedule(
        layout,
        num_microbatches=num_microbatches,
        run_ahead=run_ahead,
        gradients=gradients,
        flow=flow,
    )
    assert set(lists) == {role_of(layout, rank) for rank in range(layout.world_size)}
    run_together(layout, lists)
    for role, todo in lists.items():
        assert len(set(todo)) == len(todo)
        for module in Module:
            forwards = [a.microbatch for a in todo if a.kind is Kind.FORWARD and a.module is module]
            held = role.stage(module) is not None
            assert forwards == (list(range(num_microbatches)) if held else [])


@settings(max_examples=200)
@given(layouts(), st.integers(1, 9), st.integers(0, 4))
def test_no_stage_holds_more_microbatches_than_its_depth(
    layout: Layout, num_microbatches: int, run_ahead: int
) -> None:
    lists = schedule(layout, num_microbatches=num_microbatches, run_ahead=run_ahead)
    ahead = 0 if layout.colocated else run_ahead
    for role, todo in lists.items():
        if role.llm is not None:
            depth = layout.llm.pp - role.llm
            assert most_alive(todo, Module.LLM) == min(depth, num_microbatches)
        if role.encoder is not None:
            assert layout.encoder is not None
            depth = layout.llm.pp + ahead + layout.encoder.pp - 1 - role.encoder
            assert most_alive(todo, Module.ENCODER) == min(depth, num_microbatches)


@settings(max_examples=200)
@given(layouts(), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_a_frozen_encoder_side_is_held_back_too(
    layout: Layout, num_microbatches: int, run_ahead: int, gradients: bool
) -> None:
    """At most depth outputs have not been asked for by the stage behind."""
    lists = schedule(
        layout,
        num_microbatches=num_microbatches,
        run_ahead=run_ahead,
        gradients=gradients,
        flow=FLOWS[2],
    )
    for role, todo in lists.items():
        if role.encoder is None:
            continue
        assert layout.encoder is not None
        ahead = 0 if layout.colocated else run_ahead
        depth = layout.llm.pp + ahead + layout.encoder.pp - 1 - role.encoder
        sent = waited = encoded = used = 0
        for action in todo:
            if action.module is Module.ENCODER:
                sent += action.kind is Kind.SEND_OUTPUT
                waited += action.kind is Kind.WAIT_SENT
                encoded += action.kind is Kind.FORWARD
            elif action.kind is Kind.FORWARD:
                used += 1
            # On a rank that also uses the rows, what it sent has always been asked for.
            assert role.llm != 0 or encoded - used <= depth
        assert sent - waited == min(depth, num_microbatches)


def test_both_modules_on_one_rank_take_turns() -> None:
    (todo,) = schedule(grids({}, {}, colocated=True), num_microbatches=2).values()
    assert [str(a) for a in todo if a.kind in (Kind.FORWARD, Kind.BACKWARD)] == [
        "encoder forward 0",
        "llm forward 0",
        "llm backward 0",
        "encoder backward 0",
        "encoder forward 1",
        "llm forward 1",
        "llm backward 1",
        "encoder backward 1",
    ]


def test_a_rank_with_both_ends_posts_them_together() -> None:
    (todo,) = schedule(grids({"dp": 2}, {"tp": 2}, colocated=True)).values()
    assert not {action.kind for action in todo} & {Kind.POST_INPUT, Kind.POST_GRAD}


def test_the_next_rows_are_asked_for_before_the_forward() -> None:
    todo = schedule(grids({}, {}))[Role(encoder=None, llm=0)]
    posted = todo.index(Action(Kind.POST_INPUT, Module.LLM, 3))
    assert posted < todo.index(Action(Kind.FORWARD, Module.LLM, 2))


def test_messages_leave_in_the_order_in_which_they_are_expected() -> None:
    """NCCL matches messages between two ranks by their order."""
    for layout in (
        grids({"pp": 2}, {"pp": 3}),
        grids({"pp": 2, "dp": 2}, {"pp": 2, "dp": 2}, colocated=True),
    ):
        for todo in schedule(layout, run_ahead=2).values():
            for module in Module:
                for kind in (Kind.SEND_OUTPUT, Kind.POST_INPUT, Kind.SEND_GRAD, Kind.POST_GRAD):
                    order = [a.microbatch for a in todo if (a.kind, a.module) == (kind, module)]
                    assert order in ([], [0, 1, 2, 3, 4])


def test_a_frozen_vision_encoder_gets_no_gradient_but_its_projector_does() -> None:
    lists = schedule(grids({"pp": 2}, {}), flow=FLOWS[1])
    first, last = (lists[Role(encoder=j, llm=None)] for j in range(2))
    assert Kind.BACKWARD not in {action.kind for action in first}
    counts = Counter(action.kind for action in last)
    assert counts[Kind.BACKWARD] == 5
    assert counts[Kind.SEND_GRAD] == 0


def test_a_frozen_encoder_side_gets_no_gradient() -> None:
    lists = schedule(grids({"pp": 2}, {}), flow=FLOWS[2])
    kinds = {action.kind for todo in lists.values() for action in todo}
    assert not kinds & {Kind.SEND_GRAD, Kind.POST_GRAD, Kind.WAIT_GRAD}
    assert Kind.BACKWARD in kinds


def test_evaluation_runs_forward_only() -> None:
    lists = schedule(grids({"pp": 2}, {"pp": 2}), gradients=False)
    kinds = {action.kind for todo in lists.values() for action in todo}
    assert Kind.FORWARD in kinds
    assert not kinds & {Kind.BACKWARD, Kind.SEND_GRAD, Kind.POST_GRAD, Kind.WAIT_GRAD}


def test_numbers_out_of_range_are_refused() -> None:
    layout = Layout(encoder=None, llm=ModuleGridSpec(name="llm"), world_size=1)
    with pytest.raises(ValueError, match="0 microbatches with a run-ahead of 1"):
        schedule(layout, num_microbatches=0)
