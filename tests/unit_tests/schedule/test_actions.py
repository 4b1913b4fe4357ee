"""Schedules are checked by running all ranks' lists against each other without any process."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.schedule.actions import Action, Kind, Role, build_schedule
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.topology import Layout, ModuleGridSpec, StageId
from tests.unit_tests.schedule.toy import flow_of, grids, modules, random_graphs

ALL = flow_of(("encoder",), ("encoder",))
FLOWS = [ALL, flow_of(("encoder",)), flow_of()]

Schedule = dict[Role, tuple[Action, ...]]


def schedule(layout: Layout, **changes: object) -> Schedule:
    chosen = {"num_microbatches": 5, "run_ahead": 1, "gradients": True, "flow": ALL} | changes
    return build_schedule(layout, **chosen)


class Neighbours:
    """Roles and modules at the ends of the boundaries of a schedule."""

    def __init__(self, layout: Layout, roles: Iterable[Role]) -> None:
        self.layout, self.roles = layout, list(roles)

    def holders(self, stage: StageId) -> list[tuple[Role, str]]:
        return [(role, stage.module) for role in self.roles if stage in role]

    def before(self, role: Role, module: str) -> list[tuple[Role, str]]:
        stage = dict(role)[module]
        if stage:
            return self.holders(StageId(module, stage - 1))
        if module != self.layout.target.name:
            return []
        ends = [StageId(source.name, source.pp - 1) for source in self.layout.sources]
        return [holder for end in ends for holder in self.holders(end)]

    def behind(self, role: Role, module: str) -> list[tuple[Role, str]]:
        stage, target = dict(role)[module] + 1, self.layout.target
        if stage < self.layout.modules[module].pp:
            return self.holders(StageId(module, stage))
        return [] if module == target.name else self.holders(StageId(target.name, 0))


def run_together(layout: Layout, lists: Schedule) -> None:
    """Advance every role until none can. A wait needs the other end's send, or its post.

    All ranks of a stage count as one: what they wait for is what all ranks of the other stage sent.
    """
    done: set[tuple[Role, Action]] = set()
    position = dict.fromkeys(lists, 0)
    neighbours = Neighbours(layout, lists)

    def may_run(role: Role, action: Action) -> bool:
        module, m = action.module, action.microbatch
        behind = neighbours.behind(role, module)
        match action.kind:
            case Kind.WAIT_INPUT:
                ends = neighbours.before(role, module)
                return all((other, Action(Kind.SEND_OUTPUT, of, m)) in done for other, of in ends)
            case Kind.WAIT_GRAD:
                return all((other, Action(Kind.SEND_GRAD, of, m)) in done for other, of in behind)
            case Kind.WAIT_SENT:
                # A role with both ends posts what it receives when it sends.
                return all(
                    (other, Action(Kind.POST_INPUT, of, m)) in done
                    or (other, Action(Kind.SEND_OUTPUT, module, m)) in done
                    for other, of in behind
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


def most_alive(todo: tuple[Action, ...], module: str) -> int:
    """The most microbatches of a module that are forward without their backward."""
    alive = highest = 0
    for action in todo:
        if action.module == module:
            alive += {Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(action.kind, 0)
            highest = max(highest, alive)
    return highest


def depth_of(layout: Layout, stage: StageId, run_ahead: int) -> int:
    """Microbatches that a stage may be ahead, by the words of the module's documentation."""
    target = layout.target
    if stage.module == target.name:
        return target.pp - stage.stage
    ahead = 0 if layout.shares_ranks(stage.module, target.name) else run_ahead
    return target.pp + ahead + layout.modules[stage.module].pp - 1 - stage.stage


@settings(max_examples=300, deadline=None)
@given(random_graphs(), st.integers(1, 9), st.integers(0, 4), st.booleans())
def test_every_schedule_reaches_its_end(
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
    assert set(lists) == {layout.stages_of(rank) for rank in range(layout.world_size)}
    run_together(layout, lists)
    for role, todo in lists.items():
        assert len(set(todo)) == len(todo)
        for module in layout.modules:
            forwards = [a.microbatch for a in todo if a.kind is Kind.FORWARD and a.module == module]
            held = module in dict(role)
            assert forwards == (list(range(num_microbatches)) if held else [])


@settings(max_examples=200, deadline=None)
@given(random_graphs(), st.integers(1, 9), st.integers(0, 4))
def test_no_stage_holds_more_microbatches_than_its_depth(
    graph: tuple[Layout, GradientFlow], num_microbatches: int, run_ahead: int
) -> None:
    layout, _ = graph
    everything = flow_of(*2 * ([source.name for source in layout.sources],))
    lists = schedule(
        layout, num_microbatches=num_microbatches, run_ahead=run_ahead, flow=everything
    )
    for role, todo in lists.items():
        for stage in role:
            depth = depth_of(layout, stage, run_ahead)
            assert most_alive(todo, stage.module) == min(depth, num_microbatches)


@settings(max_examples=200, deadline=None)
@given(random_graphs(), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_a_frozen_source_is_held_back_too(
    graph: tuple[Layout, GradientFlow], num_microbatches: int, run_ahead: int, gradients: bool
) -> None:
    """At most depth outputs have not been asked for by the stage behind."""
    layout, _ = graph
    lists = schedule(
        layout,
        num_microbatches=num_microbatches,
        run_ahead=run_ahead,
        gradients=gradients,
        flow=flow_of(),
    )
    for role, todo in lists.items():
        for stage in role:
            if stage.module == "llm":
                continue
            depth = depth_of(layout, stage, run_ahead)
            sent = waited = encoded = used = 0
            for action in todo:
                if action.module == stage.module:
                    sent += action.kind is Kind.SEND_OUTPUT
                    waited += action.kind is Kind.WAIT_SENT
                    encoded += action.kind is Kind.FORWARD
                elif action.module == "llm" and action.kind is Kind.FORWARD:
                    used += 1
                # On a rank that also uses the rows, what it sent has always been asked for.
                assert dict(role).get("llm") != 0 or encoded - used <= depth
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
    todo = schedule(grids({}, {}))[(StageId("llm", 0),)]
    posted = todo.index(Action(Kind.POST_INPUT, "llm", 3))
    assert posted < todo.index(Action(Kind.FORWARD, "llm", 2))


def test_messages_leave_in_the_order_in_which_they_are_expected() -> None:
    """NCCL matches messages between two ranks by their order."""
    for layout in (
        grids({"pp": 2}, {"pp": 3}),
        grids({"pp": 2, "dp": 2}, {"pp": 2, "dp": 2}, colocated=True),
        modules(encoder={"pp": 2}, audio={"offset": 1, "dp": 2}, llm={"offset": 2, "pp": 3}),
    ):
        for todo in schedule(layout, run_ahead=2).values():
            for module in layout.modules:
                for kind in (Kind.SEND_OUTPUT, Kind.POST_INPUT, Kind.SEND_GRAD, Kind.POST_GRAD):
                    order = [a.microbatch for a in todo if (a.kind, a.module) == (kind, module)]
                    assert order in ([], [0, 1, 2, 3, 4])


def test_a_frozen_vision_encoder_gets_no_gradient_but_its_projector_does() -> None:
    lists = schedule(grids({"pp": 2}, {}), flow=FLOWS[1])
    first, last = (lists[(StageId("encoder", j),)] for j in range(2))
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
    layout = Layout.of(ModuleGridSpec(name="llm"), world_size=1)
    with pytest.raises(ValueError, match="0 microbatches with a run-ahead of 1"):
        schedule(layout, num_microbatches=0)
