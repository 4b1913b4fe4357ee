"""Run a rank's actions: call the model, move rows and gradients, run autograd at the boundaries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_mimo.bridge.check import View
from megatron_mimo.bridge.manifest import Manifest
from megatron_mimo.bridge.plan import BridgePlanner, ModulePlan, NetworkRows
from megatron_mimo.schedule.actions import Action, Kind, Module, build_schedule, role_of
from megatron_mimo.schedule.boundary import Boundary, neighbour_plan
from megatron_mimo.schedule.channels import (
    BoundaryConfig,
    begin_check,
    bridge_channels,
    pipeline_channels,
)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepManifest:
    """What a rank knows of the rows of one microbatch.

    Attributes:
        entries: Of every lane that the rank takes part in.
        network_rows: Of every lane, where `BridgePlanner.needs_network_rows`.
        keys: Lane -> keys of its samples; the check compares them.
    """

    entries: Manifest
    network_rows: NetworkRows | None = None
    keys: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


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

    def run(
        self, program: StepProgram, manifests: Sequence[StepManifest], *, gradients: bool
    ) -> None:
        """Run one step; every rank calls it with the same number of microbatches.

        Args:
            program: The model's part.
            manifests: Of each microbatch, as this rank knows it.
            gradients: False for evaluation: no backward, no autograd state.

        Raises:
            RuntimeError: The model produced another number of rows than a manifest names, or no
                gradient reached them.
        """
        begin_check(self._bridge, lambda m, lane, rows: _view(manifests[m], lane, rows))
        stages = self._stages(program, manifests, gradients)
        handlers = {module: _handlers(stage) for module, stage in stages.items()}
        with torch.set_grad_enabled(gradients):
            for action in self.actions(len(manifests), gradients=gradients):
                handlers[action.module][action.kind](action.microbatch)
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

    def _stages(
        self, program: StepProgram, manifests: Sequence[StepManifest], gradients: bool
    ) -> dict[Module, Stage]:
        topology, flow = self._topology, self._config.flow
        num = len(manifests)
        # Which microbatches this rank's encoder has rows of, and which its lane takes rows in.
        busy, fed = [False] * num, [False] * num
        if topology.encoder is not None:
            dp = topology.encoder.place.dp
            busy = [any(e.rows for e in m.entries if e.encoder_rank == dp) for m in manifests]
        if topology.llm is not None:
            lane = topology.llm.place.dp
            fed = [any(e.rows for e in m.entries if e.lane == lane) for m in manifests]
        bridge = self._bridge_boundary(manifests, busy, fed, returns=gradients and flow.bridge)
        trains = self._config.language_trains
        stages = {}
        if topology.encoder is not None:
            before, after = self._neighbours(
                topology.encoder,
                [program.hidden_rows(Module.ENCODER, m) if busy[m] else None for m in range(num)],
                [gradients and flow.encoder] * num,
            )
            stages[Module.ENCODER] = Stage(
                program.encode, busy.__getitem__, before=before, after=after or bridge
            )
        if topology.llm is not None:
            before, after = self._neighbours(
                topology.llm,
                [program.hidden_rows(Module.LLM, m) for m in range(num)],
                [gradients and (trains or (flow.bridge and it)) for it in fed],
            )
            stages[Module.LLM] = Stage(
                program.forward, lambda _: True, before=before or bridge, after=after
            )
        return stages

    def _bridge_boundary(
        self,
        manifests: Sequence[StepManifest],
        busy: Sequence[bool],
        fed: Sequence[bool],
        *,
        returns: bool,
    ) -> Boundary | None:
        encoder, llm, rank = self._topology.encoder, self._topology.llm, self._topology.rank
        source: list[ModulePlan | None] | None = None
        target: list[ModulePlan | None] | None = None
        if encoder is not None and encoder.is_last_stage:
            source = [
                self.planner.encoder_plan(rank, m.entries) if it else None
                for m, it in zip(manifests, busy, strict=True)
            ]
        if self._topology.layout.encoder is not None and llm is not None and llm.is_first_stage:
            target = [
                self.planner.language_plan(rank, m.entries, m.network_rows) if it else None
                for m, it in zip(manifests, fed, strict=True)
            ]
        if source is None and target is None:
            return None
        return Boundary(
            self._bridge, source=source, target=target, returns=[returns] * len(manifests)
        )

    def _neighbours(
        self, module: ModuleGroups, hidden_rows: Sequence[int | None], returns: Sequence[bool]
    ) -> tuple[Boundary | None, Boundary | None]:
        """The boundaries inside a module, in front of and behind this rank's stage."""
        spec, place = module.spec, module.place

        def plans(stage: int) -> list[ModulePlan | None]:
            peer = spec.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=stage)
            return [None if rows is None else neighbour_plan(peer, rows) for rows in hidden_rows]

        before = after = None
        if not module.is_first_stage:
            channels = self._pipelines[spec.name][(place.pp - 1) % 2]
            before = Boundary(channels, source=None, target=plans(place.pp - 1), returns=returns)
        if not module.is_last_stage:
            channels = self._pipelines[spec.name][place.pp % 2]
            after = Boundary(channels, source=plans(place.pp + 1), target=None, returns=returns)
        return before, after


def _view(manifest: StepManifest, lane: int, rows: int) -> View:
    """What this rank believes of a message of a lane's rows."""
    return View(
        lane=lane,
        keys=manifest.keys.get(lane, ()),
        images=tuple(
            (entry.encoder_rank, entry.rows, entry.sequence, entry.start)
            for entry in manifest.entries
            if entry.lane == lane
        ),
        rows=rows,
    )


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
