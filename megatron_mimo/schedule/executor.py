"""Run a rank's actions: call the model, transfer rows and gradients, run autograd."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_mimo.bridge.boundary import Traffic, neighbour_plan
from megatron_mimo.bridge.channels import TransportConfig, begin_check, open_bridges, open_pipelines
from megatron_mimo.bridge.microbatch import MicrobatchManifest, MicrobatchPlan, plan_microbatch
from megatron_mimo.bridge.plan import BridgePlanner, RankPlan
from megatron_mimo.schedule.actions import Action, Kind, build_schedule
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.schedule.laps import Note, Phase, ignore
from megatron_mimo.schedule.stage import Stage
from megatron_mimo.topology import SequenceSharding
from megatron_mimo.topology.groups import ModuleGroups, Topology


class StepProgram(Protocol):
    """The model's part of a step."""

    def forward(self, module: str, microbatch: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run this rank's stage of a module.

        A source's stage is called only for microbatches in which its dp rank has rows.

        Args:
            module: Name of the module.
            microbatch: Index within the step.
            inputs: Inputs by the name of the module that they come from, in the dtype of rows. On
                later stages the hidden states [N, width] of the module's previous stage. On the
                target's first stage the rows [R, H] of each source whose rows the lane uses: those
                of this rank's shard of the sequence. R is 0 where only other shards of the lane
                have rows; such an input must still be a part of the autograd graph.

        Returns:
            Hidden states [N, width]; on the last stage of a source rows [R, H]; on the last stage
            of the target the scalar to run backward from: the summed loss of this rank's lane.
        """
        ...

    def idle(self, module: str, backward: bool) -> None:
        """Take part in what replicas of a source do together, on a rank without rows.

        Args:
            module: Name of the source.
            backward: Whether the others run a backward.
        """
        ...

    def hidden_rows(self, module: str, microbatch: int) -> int:
        """Number N of the hidden states [N, width] that stages of a module send to the next."""
        ...

    def begin_last_backward(self, module: str) -> None:
        """Prepare for the last backward of a module in this step, which follows."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorConfig:
    """Settings of a step, equal on every rank.

    Attributes:
        transport: Properties of the transfers between stages.
        sharding: Positions of a sequence that each rank of the target holds.
        flow: Boundaries that gradients cross.
        target_trains: Whether any part of the target trains.
        run_ahead: Number of microbatches that a source may be ahead of the target.
    """

    transport: TransportConfig
    sharding: SequenceSharding
    flow: GradientFlow = field(default_factory=GradientFlow)
    target_trains: bool = True
    run_ahead: int = 1


class Executor:
    """Runs steps over one topology.

    Args:
        topology: Grids and groups of this rank.
        config: Settings of a step.

    Attributes:
        planners: Source name -> planner of its bridge.
    """

    def __init__(self, topology: Topology, config: ExecutorConfig) -> None:
        self._topology = topology
        self._config = config
        self._schedules: dict[tuple[int, bool], tuple[Action, ...]] = {}
        self.planners = {
            source.name: BridgePlanner(topology.layout, source.name, config.sharding)
            for source in topology.layout.sources
        }
        self._bridges = open_bridges(topology, config.transport)
        self._pipelines = open_pipelines(topology, config.transport)

    def plan(self, manifest: MicrobatchManifest) -> MicrobatchPlan:
        """Plan the transfers of a microbatch; needs no other rank, so it can be done ahead."""
        layout, rank = self._topology.layout, self._topology.rank
        return plan_microbatch(layout, rank, self.planners, manifest)

    def run(
        self,
        program: StepProgram,
        plans: Sequence[MicrobatchPlan],
        *,
        gradients: bool,
        note: Note = ignore,
    ) -> None:
        """Run one step; every rank calls it with the same number of microbatches.

        Args:
            program: The model's part of the step.
            plans: Plan of each microbatch, from `plan`.
            gradients: Whether to run backward; False for evaluation, which keeps no autograd state.
            note: Function that is called with each action as it begins.

        Raises:
            RuntimeError: The model produced another number of rows than a manifest names, or no
                gradient reached them.
        """
        stages = self._stages(program, plans, gradients)
        handlers = {module: _handlers(stage) for module, stage in stages.items()}
        with torch.set_grad_enabled(gradients):
            for action in self.actions(len(plans), gradients=gradients):
                note(action)
                if action.kind is Kind.BACKWARD and action.microbatch == len(plans) - 1:
                    program.begin_last_backward(action.module)
                handlers[action.module][action.kind](action.microbatch)
            note(Phase.DRAIN)
            for stage in stages.values():
                stage.drain()

    def actions(self, num_microbatches: int, *, gradients: bool) -> tuple[Action, ...]:
        """The actions of this rank in a step."""
        key = (num_microbatches, gradients)
        if key not in self._schedules:
            layout = self._topology.layout
            schedule = build_schedule(
                layout,
                num_microbatches=num_microbatches,
                run_ahead=self._config.run_ahead,
                gradients=gradients,
                flow=self._config.flow,
            )
            self._schedules[key] = schedule[layout.stages_of(self._topology.rank)]
        return self._schedules[key]

    def bridge_traffic(
        self, source: str, plans: Sequence[MicrobatchPlan], *, gradients: bool
    ) -> Traffic:
        """Transfers over a bridge in one step; this rank holds at least one end of it."""
        bridge = self._bridges[source]
        begin_check(bridge, lambda m, lane, rows: plans[m].manifest.view(source, lane, rows))
        producer, user = self._topology.modules.get(source), self._topology.target
        produces = producer is not None and producer.is_last_stage
        uses = user is not None and user.is_first_stage
        return Traffic(
            bridge,
            source=[plan.edges[source].source for plan in plans] if produces else None,
            target=[plan.edges[source].target for plan in plans] if uses else None,
            returns=[gradients and source in self._config.flow.returning] * len(plans),
        )

    def _stages(
        self, program: StepProgram, plans: Sequence[MicrobatchPlan], gradients: bool
    ) -> dict[str, Stage]:
        bridges = {
            source: self.bridge_traffic(source, plans, gradients=gradients)
            for source in self._bridges
        }
        target = self._topology.layout.target.name
        return {
            name: (
                self._target_stage(name, groups, program, plans, gradients, bridges)
                if name == target
                else self._source_stage(name, groups, program, plans, gradients, bridges)
            )
            for name, groups in self._topology.modules.items()
        }

    def _source_stage(
        self,
        name: str,
        groups: ModuleGroups,
        program: StepProgram,
        plans: Sequence[MicrobatchPlan],
        gradients: bool,
        bridges: Mapping[str, Traffic],
    ) -> Stage:
        before, after = self._neighbours(
            groups,
            lambda m: program.hidden_rows(name, m) if plans[m].edges[name].produces else None,
            [gradients and name in self._config.flow.inside] * len(plans),
        )
        return Stage(
            lambda m, inputs: program.forward(name, m, inputs),
            lambda m: plans[m].edges[name].produces,
            before={} if before is None else {name: before},
            after=after or bridges[name],
            idle=lambda backward: program.idle(name, backward),
        )

    def _target_stage(
        self,
        name: str,
        groups: ModuleGroups,
        program: StepProgram,
        plans: Sequence[MicrobatchPlan],
        gradients: bool,
        bridges: Mapping[str, Traffic],
    ) -> Stage:
        config = self._config

        def returns(plan: MicrobatchPlan) -> bool:
            # A frozen target returns gradients only where there are rows that need them.
            takes = any(plan.edges[source].takes for source in config.flow.returning)
            return gradients and (config.target_trains or takes)

        before, after = self._neighbours(
            groups, lambda m: program.hidden_rows(name, m), [returns(plan) for plan in plans]
        )
        return Stage(
            lambda m, inputs: program.forward(name, m, inputs),
            lambda _: True,
            before=bridges if before is None else {name: before},
            after=after,
        )

    def _neighbours(
        self,
        module: ModuleGroups,
        hidden_rows: Callable[[int], int | None],
        returns: Sequence[bool],
    ) -> tuple[Traffic | None, Traffic | None]:
        """The traffic inside a module, before and after this rank's stage."""
        spec, place = module.spec, module.place

        def plans(stage: int) -> list[RankPlan | None]:
            peer = spec.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=stage)
            counts = [hidden_rows(m) for m in range(len(returns))]
            return [None if rows is None else neighbour_plan(peer, rows) for rows in counts]

        before = after = None
        if not module.is_first_stage:
            boundary = self._pipelines[spec.name][(place.pp - 1) % 2]
            before = Traffic(boundary, source=None, target=plans(place.pp - 1), returns=returns)
        if not module.is_last_stage:
            boundary = self._pipelines[spec.name][place.pp % 2]
            after = Traffic(boundary, source=plans(place.pp + 1), target=None, returns=returns)
        return before, after


def _handlers(stage: Stage) -> dict[Kind, Callable[[int], None]]:
    return {
        Kind.POST_INPUT: stage.post_input,
        Kind.WAIT_INPUT: stage.wait_input,
        Kind.FORWARD: stage.forward,
        Kind.SEND_OUTPUT: stage.send_output,
        Kind.WAIT_SENT: stage.wait_sent,
        Kind.POST_GRAD: stage.post_grad,
        Kind.WAIT_GRAD: stage.wait_grad,
        Kind.BACKWARD: stage.backward,
        Kind.SEND_GRAD: stage.send_grad,
    }
