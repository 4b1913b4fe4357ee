"""The actions of each rank in a step, in order: a pure function of layout and microbatches.

The stages of all modules form a tree: those of a module follow each other, and the last stage of
each source feeds the first of the target. The target runs 1F1B (PipeDream-Flush, Narayanan et al.
2021): stage `p` of `P` has at most `P - p` microbatches forward without their backward. A source's
last stage runs `run_ahead` microbatches further ahead than the target's first, so that it computes
while the target does; its earlier stages are one more ahead each. A rank that holds stages of
several modules works through their lists in the order in which they would become ready if every
forward and backward took equally long.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_mimo.schedule.graph import GradientFlow, StageGraph
from megatron_mimo.topology import Layout, StageId


class Kind(StrEnum):
    """Kind of work of a stage."""

    POST_INPUT = "post input"
    WAIT_INPUT = "wait input"
    FORWARD = "forward"
    SEND_OUTPUT = "send output"
    WAIT_SENT = "wait sent"
    POST_GRAD = "post grad"
    WAIT_GRAD = "wait grad"
    BACKWARD = "backward"
    SEND_GRAD = "send grad"


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a schedule.

    Attributes:
        kind: Kind of work.
        module: Name of the module whose stage does the work.
        microbatch: Index of the microbatch within the step.
    """

    kind: Kind
    module: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.module} {self.kind} {self.microbatch}"


# The stages that a rank holds, in the order of the modules. Ranks that hold the same do the same.
Role = tuple[StageId, ...]


def build_schedule(
    layout: Layout,
    *,
    num_microbatches: int,
    run_ahead: int,
    gradients: bool,
    flow: GradientFlow,
) -> dict[Role, tuple[Action, ...]]:
    """The actions of every role in one step.

    Args:
        layout: The grids of all modules.
        num_microbatches: Number of microbatches of the step, at least 1.
        run_ahead: Number of microbatches that a source may be ahead of the target's first stage.
            It has no effect on a source that shares ranks with the target, where no work can
            overlap.
        gradients: Whether there is a backward; False for evaluation.
        flow: Boundaries that gradients cross.

    Raises:
        ValueError: `num_microbatches` or `run_ahead` is out of range.
    """
    if num_microbatches < 1 or run_ahead < 0:
        raise ValueError(
            f"{num_microbatches} microbatches with a run-ahead of {run_ahead}: "
            f"expected at least 1 and 0"
        )
    graph = StageGraph(layout, run_ahead=run_ahead, gradients=gradients, flow=flow)
    roles = sorted({layout.stages_of(rank) for rank in range(layout.world_size)})
    passes = {
        role: tuple(_stage_order(graph, stage, num_microbatches) for stage in role)
        for role in roles
    }
    if all(len(role) == 1 for role in roles):
        orders = {role: order for role, (order,) in passes.items()}
    else:
        orders = _interleave(graph, passes)
    return {
        role: tuple(_actions(graph, role, order, num_microbatches))
        for role, order in orders.items()
    }


@dataclass(frozen=True, slots=True)
class _Pass:
    """One microbatch through one stage, forward or backward."""

    stage: StageId
    microbatch: int
    backward: bool


def _stage_order(graph: StageGraph, stage: StageId, num_microbatches: int) -> tuple[_Pass, ...]:
    """The passes of one stage: 1F1B, or forwards alone where it runs no backward."""
    forwards = [_Pass(stage, m, backward=False) for m in range(num_microbatches)]
    if not graph.runs_backward(stage):
        return tuple(forwards)
    depth = min(graph.depth(stage), num_microbatches)
    order = forwards[:depth]
    for m in range(num_microbatches):
        order.append(_Pass(stage, m, backward=True))
        order += forwards[m + depth : m + depth + 1]
    return tuple(order)


def _needs(graph: StageGraph, step: _Pass) -> Iterator[_Pass]:
    """The passes that must have run before a pass may, on every rank that holds their stage."""
    if step.backward:
        successor = graph.successor(step.stage)
        if successor is not None:
            yield _Pass(successor, step.microbatch, backward=True)
    else:
        for predecessor in graph.predecessors(step.stage):
            yield _Pass(predecessor, step.microbatch, backward=False)
    ahead = step.microbatch - graph.depth(step.stage)
    if ahead >= 0 and graph.is_source(step.stage) and not graph.runs_backward(step.stage):
        # No gradient limits this stage, so the target's progress does.
        yield _Pass(graph.first_of_target, ahead, backward=False)


def _interleave(
    graph: StageGraph, passes: Mapping[Role, tuple[tuple[_Pass, ...], ...]]
) -> dict[Role, tuple[_Pass, ...]]:
    """One list per role from the lists of its stages: list scheduling with unit costs.

    Always runs what can start first; of two that can start together a backward, which frees memory,
    then the earlier microbatch. The result is an order that was simulated, so it has no deadlock.
    """
    queues = [(role, deque(order)) for role, orders in passes.items() for order in orders]
    holders: dict[StageId, list[Role]] = {}
    for role in passes:
        for stage in role:
            holders.setdefault(stage, []).append(role)
    clock = dict.fromkeys(passes, 0)
    ends: dict[tuple[Role, _Pass], int] = {}
    merged: dict[Role, list[_Pass]] = {role: [] for role in passes}
    while queues:
        ready = []
        for index, (role, queue) in enumerate(queues):
            needs = [
                ends.get((other, need))
                for need in _needs(graph, queue[0])
                for other in holders[need.stage]
            ]
            if None not in needs:
                start = max([clock[role], *(end for end in needs if end is not None)])
                ready.append((start, not queue[0].backward, queue[0].microbatch, index))
        start, _, _, index = min(ready)
        role, queue = queues[index]
        step = queue.popleft()
        clock[role] = ends[role, step] = start + 1
        merged[role].append(step)
        if not queue:
            del queues[index]
    return {role: tuple(order) for role, order in merged.items()}


def _actions(
    graph: StageGraph, role: Role, order: Sequence[_Pass], num_microbatches: int
) -> Iterator[Action]:
    """Passes with what they wait for and what they send, receives posted one pass ahead."""
    posts = {stage.module for stage in role if graph.posts_input(stage, role)}
    for stage in role:
        if stage.module in posts:
            yield Action(Kind.POST_INPUT, stage.module, 0)
    for step in order:
        module, m = step.stage.module, step.microbatch
        if step.backward:
            yield from _backward(graph, step.stage, m)
            continue
        if module in posts and m + 1 < num_microbatches:
            yield Action(Kind.POST_INPUT, module, m + 1)
        yield from _forward(graph, role, step.stage, m)


def _forward(graph: StageGraph, role: Role, stage: StageId, m: int) -> Iterator[Action]:
    if graph.predecessors(stage):
        yield Action(Kind.WAIT_INPUT, stage.module, m)
    sends, returns = graph.successor(stage) is not None, graph.runs_backward(stage)
    ahead = m - graph.depth(stage)
    if sends and ahead >= 0 and not returns:
        # No gradient limits this stage, so the completion of its sends does.
        yield Action(Kind.WAIT_SENT, stage.module, ahead)
    yield Action(Kind.FORWARD, stage.module, m)
    if sends:
        yield Action(Kind.SEND_OUTPUT, stage.module, m)
        if returns and not graph.holds_both_ends(stage, role):
            yield Action(Kind.POST_GRAD, stage.module, m)


def _backward(graph: StageGraph, stage: StageId, m: int) -> Iterator[Action]:
    if graph.successor(stage) is not None:
        yield Action(Kind.WAIT_GRAD, stage.module, m)
    yield Action(Kind.BACKWARD, stage.module, m)
    if any(graph.runs_backward(before) for before in graph.predecessors(stage)):
        yield Action(Kind.SEND_GRAD, stage.module, m)
