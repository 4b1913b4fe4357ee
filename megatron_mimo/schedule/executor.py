"""Run a rank's actions: call the model, move rows and gradients, run autograd at the boundary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_mimo.bridge.manifest import Manifest
from megatron_mimo.bridge.plan import ModulePlan, encoder_plan, language_plan
from megatron_mimo.bridge.transport import (
    Direction,
    LocalRows,
    Receive,
    Send,
    post_receive,
    post_send,
)
from megatron_mimo.schedule.actions import Kind, step_actions
from megatron_mimo.topology.groups import Topology


class StepProgram(Protocol):
    """The model's part of a step."""

    def encode(self, microbatch: int) -> Tensor:
        """Rows [R, H] of this rank's images; called only where there are rows."""
        ...

    def forward(self, microbatch: int, rows: Tensor | None) -> Tensor:
        """Scalar to run backward from: the summed loss of this rank's lane.

        Args:
            microbatch: Index within the step.
            rows: [R, H] of the lane's images; None without images.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryConfig:
    """What crosses the bridge, the same on every rank.

    Attributes:
        width: H, elements per row.
        dtype: Of the rows and their gradients.
        device: Where they live.
        encoder_trains: Whether gradients go back.
        run_ahead: Microbatches that the encoder may be ahead.
    """

    width: int
    dtype: torch.dtype
    device: torch.device
    encoder_trains: bool
    run_ahead: int = 1


class Executor:
    """Runs steps over one topology."""

    def __init__(self, topology: Topology, boundary: BoundaryConfig) -> None:
        self._topology = topology
        self._boundary = boundary
        local = LocalRows()
        self._rows = Direction(name="rows", group=topology.rows_group, local=local)
        self._grads = Direction(name="grads", group=topology.grads_group, local=local)

    def run(self, program: StepProgram, manifests: Sequence[Manifest], *, gradients: bool) -> None:
        """Run one step; every rank calls it with the same number of microbatches.

        Args:
            program: The model's part.
            manifests: Of each microbatch, as this rank knows it.
            gradients: False for evaluation: no backward, no autograd state.
        """
        actions = step_actions(
            encoder=self._topology.encoder is not None,
            language=self._topology.llm is not None,
            num_microbatches=len(manifests),
            run_ahead=self._boundary.run_ahead,
            gradients=gradients,
            encoder_trains=self._boundary.encoder_trains,
        )
        run = _Run(
            self._topology,
            self._boundary,
            self._rows,
            self._grads,
            program,
            manifests,
            gradients=gradients,
        )
        with torch.set_grad_enabled(gradients):
            for action in actions:
                run.do(action.kind, action.microbatch)
            run.drain()


class _Run:
    """The state of one step; everything is keyed by microbatch and dropped when used."""

    def __init__(
        self,
        topology: Topology,
        boundary: BoundaryConfig,
        rows: Direction,
        grads: Direction,
        program: StepProgram,
        manifests: Sequence[Manifest],
        *,
        gradients: bool,
    ) -> None:
        layout, rank = topology.layout, topology.rank
        self.rank = rank
        self.boundary = boundary
        self.gradients = gradients
        self.returns = gradients and boundary.encoder_trains
        self.rows = rows
        self.grads = grads
        self.program = program
        self.encoder_plans: list[ModulePlan] = (
            [encoder_plan(layout, rank, manifest) for manifest in manifests]
            if topology.encoder
            else []
        )
        self.language_plans: list[ModulePlan] = (
            [language_plan(layout, rank, manifest) for manifest in manifests]
            if topology.llm
            else []
        )
        self.encoded: dict[int, Tensor] = {}
        self.posted: dict[tuple[str, int], Receive] = {}
        self.received: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}
        self.returned: dict[int, Tensor] = {}
        self.sends: list[Send] = []
        self.handlers = {
            Kind.ENCODE: self.encode,
            Kind.SEND_ROWS: self.send_rows,
            Kind.POST_ROWS: self.post_rows,
            Kind.WAIT_ROWS: self.wait_rows,
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.SEND_GRADS: self.send_grads,
            Kind.POST_GRADS: self.post_grads,
            Kind.WAIT_GRADS: self.wait_grads,
            Kind.ENCODE_BACKWARD: self.encode_backward,
        }

    def do(self, kind: Kind, m: int) -> None:
        """Run one action."""
        self.handlers[kind](m)

    def drain(self) -> None:
        """Wait until every row has left."""
        for send in self.sends:
            send.wait()

    def encode(self, m: int) -> None:
        if self.encoder_plans[m].num_rows:
            self.encoded[m] = self.program.encode(m)

    def send_rows(self, m: int) -> None:
        if m in self.encoded:
            # Kept for the backward only where there will be one.
            rows = self.encoded[m] if self.returns else self.encoded.pop(m)
            self._send(self.encoder_plans[m], self.rows, m, rows.detach())

    def post_rows(self, m: int) -> None:
        if self.language_plans[m].num_rows:
            self.posted["rows", m] = self._receive(self.language_plans[m], self.rows, m)

    def wait_rows(self, m: int) -> None:
        if ("rows", m) in self.posted:
            rows = self.posted.pop(("rows", m)).wait()
            # A leaf of the language model's graph: its gradient is what goes back.
            self.received[m] = rows.detach().requires_grad_(self.returns)

    def forward(self, m: int) -> None:
        rows = self.received.get(m) if self.returns else self.received.pop(m, None)
        loss = self.program.forward(m, rows)
        if self.gradients:
            self.losses[m] = loss

    def backward(self, m: int) -> None:
        loss = self.losses.pop(m)
        # A frozen language model has nothing to do for a microbatch without images.
        if loss.requires_grad:
            loss.backward()

    def send_grads(self, m: int) -> None:
        if m in self.received:
            grad = self.received.pop(m).grad
            assert grad is not None
            self._send(self.language_plans[m], self.grads, m, grad)

    def post_grads(self, m: int) -> None:
        if self.encoder_plans[m].num_rows:
            self.posted["grads", m] = self._receive(self.encoder_plans[m], self.grads, m)

    def wait_grads(self, m: int) -> None:
        if ("grads", m) in self.posted:
            self.returned[m] = self.posted.pop(("grads", m)).wait()

    def encode_backward(self, m: int) -> None:
        if m in self.returned:
            torch.autograd.backward(self.encoded.pop(m), self.returned.pop(m))

    def _send(self, plan: ModulePlan, direction: Direction, m: int, rows: Tensor) -> None:
        self.sends = [send for send in self.sends if not send.is_completed()]
        self.sends.append(post_send(plan, direction, m, rows, rank=self.rank))

    def _receive(self, plan: ModulePlan, direction: Direction, m: int) -> Receive:
        return post_receive(
            plan,
            direction,
            m,
            rank=self.rank,
            width=self.boundary.width,
            dtype=self.boundary.dtype,
            device=self.boundary.device,
        )
