"""Run a rank's actions: call the model, move rows and gradients, run autograd at the boundaries."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_mimo.bridge.plan import BridgePlanner, ModulePlan
from megatron_mimo.schedule.actions import Action, Kind, Module, build_schedule, role_of
from megatron_mimo.schedule.boundary import Boundary, neighbour_plan
from megatron_mimo.schedule.channels import (
    BoundaryConfig,
    begin_check,
    bridge_channels,
    pipeline_channels,
)
from megatron_mimo.schedule.crossing import Crossing, StepManifest, plan_crossing
from megatron_mimo.schedule.laps import Note, Phase, ignore
from megatron_mimo.schedule.stage import Stage
from megatron_mimo.topology.groups import ModuleGroups, Topology


class StepProgram(Protocol):
    """The model's part of a step."""

    def encode(self, microbatch: int, hidden: Tensor | None) -> Tensor:
        """Run this rank's encoder stage; called only where its dp rank has rows.

        Args:
            microbatch: Index within the step.
            hidden: [T, width] of the stage before; None on the first.

        Returns:
            [T, width] hidden states, or [R, H] rows on the last stage.
        """
        ...

    def forward(self, microbatch: int, inputs: Tensor | None) -> Tensor:
        """Run this rank's stage of the language model.

        Args:
            microbatch: Index within the step.
            inputs: On the first stage the rows [R, H] of this rank's shard of the sequence; R is 0
                where only other shards of the lane have rows, which must stay a part of the graph
                all the same, and it is None where the lane has none. On later stages the hidden
                states [N, H] of the stage before.

        Returns:
            [N, H] hidden states, or on the last stage the scalar to run backward from: the summed
            loss of this rank's lane.
        """
        ...

    def hidden_rows(self, module: Module, microbatch: int) -> int:
        """N of the hidden states [N, width] that stages of a module hand on."""
        ...

    def begin_last_backward(self, module: Module) -> None:
        """The step's last backward of a module follows."""
        ...


class Executor:
    """Runs steps over one topology."""

    def __init__(self, topology: Topology, config: BoundaryConfig) -> None:
        self._topology = topology
        self._config = config
        self._role = role_of(topology.layout, topology.rank)
        self._schedules: dict[tuple[int, bool], tuple[Action, ...]] = {}
        self.planner = BridgePlanner(topology.layout, config.sharding)
        self._bridge = bridge_channels(topology, config)
        self._pipelines = pipeline_channels(topology, config)

    def plan(self, manifest: StepManifest) -> Crossing:
        """Plan what a microbatch moves; needs no other rank, so it can be done ahead."""
        layout, rank = self._topology.layout, self._topology.rank
        return plan_crossing(layout, rank, self.planner, manifest)

    def run(
        self,
        program: StepProgram,
        crossings: Sequence[Crossing],
        *,
        gradients: bool,
        note: Note = ignore,
    ) -> None:
        """Run one step; every rank calls it with the same number of microbatches.

        Args:
            program: The model's part.
            crossings: Of each microbatch, from `plan`.
            gradients: False for evaluation: no backward, no autograd state.
            note: Told of each action as it begins.

        Raises:
            RuntimeError: The model produced another number of rows than a manifest names, or no
                gradient reached them.
        """
        stages = self._stages(program, crossings, gradients)
        handlers = {module: _handlers(stage) for module, stage in stages.items()}
        with torch.set_grad_enabled(gradients):
            for action in self.actions(len(crossings), gradients=gradients):
                note(action)
                if action.kind is Kind.BACKWARD and action.microbatch == len(crossings) - 1:
                    program.begin_last_backward(action.module)
                handlers[action.module][action.kind](action.microbatch)
            note(Phase.DRAIN)
            for stage in stages.values():
                stage.drain()

    def actions(self, num_microbatches: int, *, gradients: bool) -> tuple[Action, ...]:
        """The actions of this rank in a step."""
        key = (num_microbatches, gradients)
        if key not in self._schedules:
            schedule = build_schedule(
                self._topology.layout,
                num_microbatches=num_microbatches,
                run_ahead=self._config.run_ahead,
                gradients=gradients,
                flow=self._config.flow,
            )
            self._schedules[key] = schedule[self._role]
        return self._schedules[key]

    def bridge(self, crossings: Sequence[Crossing], *, gradients: bool) -> Boundary:
        """The bridge in one step; without plans on ranks of other stages."""
        begin_check(self._bridge, lambda m, lane, rows: crossings[m].manifest.view(lane, rows))
        encoder, llm = self._topology.encoder, self._topology.llm
        produces = encoder is not None and encoder.is_last_stage
        uses = llm is not None and llm.is_first_stage
        return Boundary(
            self._bridge,
            source=[crossing.source for crossing in crossings] if produces else None,
            target=[crossing.target for crossing in crossings] if uses else None,
            returns=[gradients and self._config.flow.bridge] * len(crossings),
        )

    def _stages(
        self, program: StepProgram, crossings: Sequence[Crossing], gradients: bool
    ) -> dict[Module, Stage]:
        topology, config, num = self._topology, self._config, len(crossings)
        bridge = None
        if topology.layout.encoder is not None:
            bridge = self.bridge(crossings, gradients=gradients)
        stages = {}
        if topology.encoder is not None:
            before, after = self._neighbours(
                topology.encoder,
                lambda m: program.hidden_rows(Module.ENCODER, m) if crossings[m].encodes else None,
                [gradients and config.flow.encoder] * num,
            )
            stages[Module.ENCODER] = Stage(
                program.encode,
                lambda m: crossings[m].encodes,
                before=before,
                after=after or bridge,
            )
        if topology.llm is not None:
            # A frozen language model has gradients to hand back only where there are rows.
            before, after = self._neighbours(
                topology.llm,
                lambda m: program.hidden_rows(Module.LLM, m),
                [
                    gradients
                    and (config.language_trains or (config.flow.bridge and crossing.takes_rows))
                    for crossing in crossings
                ],
            )
            stages[Module.LLM] = Stage(
                program.forward,
                lambda _: True,
                before=bridge if topology.llm.is_first_stage else before,
                after=after,
            )
        return stages

    def _neighbours(
        self,
        module: ModuleGroups,
        hidden_rows: Callable[[int], int | None],
        returns: Sequence[bool],
    ) -> tuple[Boundary | None, Boundary | None]:
        """The boundaries inside a module, in front of and behind this rank's stage."""
        spec, place = module.spec, module.place

        def plans(stage: int) -> list[ModulePlan | None]:
            peer = spec.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=stage)
            counts = [hidden_rows(m) for m in range(len(returns))]
            return [None if rows is None else neighbour_plan(peer, rows) for rows in counts]

        before = after = None
        if not module.is_first_stage:
            channels = self._pipelines[spec.name][(place.pp - 1) % 2]
            before = Boundary(channels, source=None, target=plans(place.pp - 1), returns=returns)
        if not module.is_last_stage:
            channels = self._pipelines[spec.name][place.pp % 2]
            after = Boundary(channels, source=plans(place.pp + 1), target=None, returns=returns)
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
