"""What each rank does in a step, in order: a pure function of the layout and the microbatches.

The stages of the encoder and of the language model form one long pipeline. The language model runs
1F1B (PipeDream-Flush, Narayanan et al. 2021): stage `p` of `P` has at most `P - p` microbatches
forward without their backward. The encoder's last stage feeds the first of them and runs
`run_ahead` microbatches further ahead, so that it encodes while the language model computes; its
earlier stages are one more ahead each. A rank that holds a stage of both modules works through both
lists in the order in which they would become ready if every forward and backward took equally long.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_mimo.topology import Layout, ModuleGridSpec


class Module(StrEnum):
    """A module, by the name of its grid."""

    ENCODER = "encoder"
    LLM = "llm"


class Kind(StrEnum):
    """One kind of work of a stage."""

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
        kind: What to do.
        module: For which of the rank's stages.
        microbatch: Index within the step.
    """

    kind: Kind
    module: Module
    microbatch: int

    def __str__(self) -> str:
        return f"{self.module} {self.kind} {self.microbatch}"


@dataclass(frozen=True, slots=True)
class Role:
    """The pipeline stages that a rank holds.

    Attributes:
        encoder: Stage of the encoder, or None.
        llm: Stage of the language model, or None.
    """

    encoder: int | None
    llm: int | None

    def stage(self, module: Module) -> int | None:
        """The stage that is held of a module."""
        return self.encoder if module is Module.ENCODER else self.llm


@dataclass(frozen=True, slots=True)
class GradientFlow:
    """Where gradients go back; inside the language model they always do.

    Attributes:
        encoder: Between stages of the encoder: something before its last stage trains.
        bridge: Over the bridge: something on the encoder's side trains.
    """

    encoder: bool
    bridge: bool

    def __post_init__(self) -> None:
        assert self.bridge or not self.encoder, "gradients reach the encoder over the bridge only"


def role_of(layout: Layout, rank: int) -> Role:
    """The stages that a global rank holds."""
    return Role(
        encoder=_stage(layout.encoder, rank),
        llm=_stage(layout.llm, rank),
    )


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
        layout: Both grids.
        num_microbatches: Microbatches of the step, at least 1.
        run_ahead: Microbatches that the encoder may be ahead of the language model's first stage.
            Without effect on ranks that hold both modules: they have nothing to overlap.
        gradients: False for evaluation.
        flow: Where gradients go back.

    Raises:
        ValueError: A number is out of range.
    """
    if num_microbatches < 1 or run_ahead < 0:
        raise ValueError(
            f"{num_microbatches} microbatches with a run-ahead of {run_ahead}: "
            f"expected at least 1 and 0"
        )
    stages = _Stages(
        encoder=layout.encoder.pp if layout.encoder else 0,
        llm=layout.llm.pp,
        num_microbatches=num_microbatches,
        run_ahead=0 if layout.colocated else run_ahead,
        gradients=gradients,
        flow=flow,
    )
    roles = sorted({role_of(layout, rank) for rank in range(layout.world_size)}, key=str)
    passes = {role: stages.passes(role) for role in roles}
    orders = (
        _interleave(stages, passes)
        if layout.colocated
        else {role: order for role, (order,) in passes.items()}
    )
    return {role: tuple(stages.actions(role, order)) for role, order in orders.items()}


@dataclass(frozen=True, slots=True)
class _Pass:
    """One microbatch through one stage, forward or backward."""

    module: Module
    microbatch: int
    backward: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stages:
    """What the schedule of every stage follows from."""

    encoder: int
    llm: int
    num_microbatches: int
    run_ahead: int
    gradients: bool
    flow: GradientFlow

    def depth(self, module: Module, stage: int) -> int:
        """Microbatches that a stage may have forward without their backward."""
        if module is Module.LLM:
            return self.llm - stage
        return self.llm + self.run_ahead + self.encoder - 1 - stage

    def returns(self, module: Module, stage: int) -> bool:
        """Whether a stage runs backward."""
        if module is Module.LLM:
            return self.gradients
        last = stage == self.encoder - 1
        return self.gradients and (self.flow.bridge if last else self.flow.encoder)

    def input_returns(self, module: Module, stage: int) -> bool:
        """Whether a stage sends gradients to the one before."""
        if module is Module.LLM and stage == 0:
            return self.encoder > 0 and self.gradients and self.flow.bridge
        return stage > 0 and self.returns(module, stage - 1)

    def passes(self, role: Role) -> tuple[tuple[_Pass, ...], ...]:
        """The passes of each module that a role holds, in order."""
        held = ((module, role.stage(module)) for module in Module)
        return tuple(self._order(module, stage) for module, stage in held if stage is not None)

    def needs(self, role: Role, step: _Pass) -> Iterator[tuple[int, _Pass]]:
        """The stages and their passes that must have run before a pass may."""
        stage = role.stage(step.module)
        assert stage is not None
        line = [(Module.ENCODER, j) for j in range(self.encoder)]
        line += [(Module.LLM, p) for p in range(self.llm)]
        index = line.index((step.module, stage)) + (1 if step.backward else -1)
        if 0 <= index < len(line):
            module, neighbour = line[index]
            yield neighbour, _Pass(module, step.microbatch, step.backward)
        ahead = step.microbatch - self.depth(step.module, stage)
        if step.module is Module.ENCODER and ahead >= 0 and not self.returns(step.module, stage):
            # No gradient holds this stage back, so the language model's progress does.
            yield 0, _Pass(Module.LLM, ahead, backward=False)

    def _order(self, module: Module, stage: int) -> tuple[_Pass, ...]:
        forwards = [_Pass(module, m, backward=False) for m in range(self.num_microbatches)]
        if not self.returns(module, stage):
            return tuple(forwards)
        depth = min(self.depth(module, stage), self.num_microbatches)
        order = forwards[:depth]
        for m in range(self.num_microbatches):
            order.append(_Pass(module, m, backward=True))
            order += forwards[m + depth : m + depth + 1]
        return tuple(order)

    def actions(self, role: Role, order: Sequence[_Pass]) -> Iterator[Action]:
        """Passes with what they wait for and what they send, receives posted one pass ahead."""
        # Both ends of the bridge on one rank: a microbatch's transfers are posted together, when it
        # has something to send. See `bridge.transport`.
        both_ends = role.encoder == self.encoder - 1 and role.llm == 0
        for module in Module:
            stage = role.stage(module)
            if stage is not None and self._has_input(module, stage, both_ends):
                yield Action(Kind.POST_INPUT, module, 0)
        for step in order:
            stage = role.stage(step.module)
            assert stage is not None
            run = self._backward if step.backward else self._forward
            yield from run(step.module, stage, step.microbatch, both_ends)

    def _forward(self, module: Module, stage: int, m: int, both_ends: bool) -> Iterator[Action]:
        if self._has_input(module, stage, both_ends) and m + 1 < self.num_microbatches:
            yield Action(Kind.POST_INPUT, module, m + 1)
        if not self._is_first(module, stage):
            yield Action(Kind.WAIT_INPUT, module, m)
        sends = not (module is Module.LLM and stage == self.llm - 1)
        ahead = m - self.depth(module, stage)
        if sends and ahead >= 0 and not self.returns(module, stage):
            # No gradient holds this stage back, so what it has sent does.
            yield Action(Kind.WAIT_SENT, module, ahead)
        yield Action(Kind.FORWARD, module, m)
        if sends:
            yield Action(Kind.SEND_OUTPUT, module, m)
            if self.returns(module, stage) and not (both_ends and module is Module.ENCODER):
                yield Action(Kind.POST_GRAD, module, m)

    def _backward(self, module: Module, stage: int, m: int, both_ends: bool) -> Iterator[Action]:
        if not (module is Module.LLM and stage == self.llm - 1):
            yield Action(Kind.WAIT_GRAD, module, m)
        yield Action(Kind.BACKWARD, module, m)
        if self.input_returns(module, stage):
            yield Action(Kind.SEND_GRAD, module, m)

    def _is_first(self, module: Module, stage: int) -> bool:
        """Whether a stage has no stage before it."""
        return stage == 0 and (module is Module.ENCODER or self.encoder == 0)

    def _has_input(self, module: Module, stage: int, both_ends: bool) -> bool:
        """Whether a stage posts its input by itself."""
        over_bridge = module is Module.LLM and stage == 0
        return not self._is_first(module, stage) and not (both_ends and over_bridge)


def _interleave(
    stages: _Stages, passes: Mapping[Role, tuple[tuple[_Pass, ...], ...]]
) -> dict[Role, tuple[_Pass, ...]]:
    """One list per role from the lists of its modules: list scheduling with unit costs.

    Always runs what can start first; of two that can start together a backward, which frees memory,
    then the earlier microbatch. The result is an order that was executed, so it has no deadlock.
    """
    queues = [(role, deque(order)) for role, both in passes.items() for order in both]
    clock = dict.fromkeys(passes, 0)
    ends: dict[tuple[Role, _Pass], int] = {}
    merged: dict[Role, list[_Pass]] = {role: [] for role in passes}
    while queues:
        ready = []
        for index, (role, queue) in enumerate(queues):
            needs = [
                ends.get((other, need))
                for need_stage, need in stages.needs(role, queue[0])
                for other in passes
                if other.stage(need.module) == need_stage
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


def _stage(grid: ModuleGridSpec | None, rank: int) -> int | None:
    return grid.coordinates(rank).pp if grid is not None and rank in grid.ranks else None
