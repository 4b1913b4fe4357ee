"""The toy as a program of the executor: rows times one weight per stage, squared and summed."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.schedule.actions import GradientFlow, Module
from megatron_mimo.schedule.channels import BoundaryConfig
from megatron_mimo.schedule.crossing import StepManifest
from megatron_mimo.schedule.executor import Executor
from megatron_mimo.schedule.laps import Note, ignore
from megatron_mimo.topology import SequenceSharding
from megatron_mimo.topology.groups import Topology
from tests.unit_tests.schedule.toy import WIDTH, manifests, name_of


@dataclass(frozen=True)
class Settings:
    run_ahead: int = 1
    num_microbatches: int = 5
    encoder_flow: bool = True
    bridge_flow: bool = True
    language_trains: bool = True
    gradients: bool = True
    check: bool = False


class Toy:
    """Every rank knows all weights, so that it can tell what it should see and get."""

    def __init__(self, topology: Topology, sharding: SequenceSharding, settings: Settings) -> None:
        self.encoder, self.llm = topology.encoder, topology.llm
        self.sharding, self.settings = sharding, settings
        self.flow = GradientFlow(
            encoder=settings.encoder_flow and settings.bridge_flow, bridge=settings.bridge_flow
        )
        layout = topology.layout
        self.made = manifests(layout, settings.num_microbatches)
        stages = layout.encoder.pp if layout.encoder else 0
        self.encoder_weights = [
            _weight(1.5 + j / 8, self.flow.bridge if j == stages - 1 else self.flow.encoder)
            for j in range(stages)
        ]
        self.llm_weights = [
            _weight(0.5 + p / 8, settings.language_trains) for p in range(layout.llm.pp)
        ]
        self.seen: list[int] = []
        self.executor = Executor(
            topology,
            BoundaryConfig(
                sharding=sharding,
                row_width=WIDTH,
                encoder_width=WIDTH,
                dtype=torch.float64,
                device=torch.device("cpu"),
                flow=self.flow,
                language_trains=settings.language_trains,
                run_ahead=settings.run_ahead,
                check=settings.check,
            ),
        )

    def run(self, note: Note = ignore) -> None:
        """One step from fresh gradients."""
        self.seen = []
        for weight in (*self.encoder_weights, *self.llm_weights):
            weight.grad = None
        known = [self.executor.plan(StepManifest(entries=entries)) for entries in self.made]
        self.executor.run(self, known, gradients=self.settings.gradients, note=note)

    def check(self) -> None:
        """The loss is the sum of row^2 / 2 over all rows, each proportional to every weight."""
        num = self.settings.num_microbatches
        if self.llm is not None:
            assert self.seen == list(range(num))
        scale = (_product(self.encoder_weights) * _product(self.llm_weights)).item() ** 2
        for module, weights, rows in (
            (self.encoder, self.encoder_weights, self.held),
            (self.llm, self.llm_weights, self.used),
        ):
            if module is None:
                continue
            mine = weights[module.place.pp]
            assert all(weight.grad is None for weight in weights if weight is not mine)
            if not (self.settings.gradients and mine.requires_grad):
                assert mine.grad is None
                continue
            energy = sum(rows(m).square().sum().item() for m in range(num))
            got = 0.0 if mine.grad is None else mine.grad.item()
            assert got == pytest.approx(scale * energy / mine.item())

    def encode(self, m: int, hidden: Tensor | None) -> Tensor:
        """See `StepProgram.encode`."""
        assert self.encoder is not None
        assert self.held(m).shape[0]
        stage = self.encoder.place.pp
        if hidden is None:
            assert self.encoder.is_first_stage
            # One row more than what crosses the bridge.
            hidden = torch.cat([self.held(m), torch.ones(1, WIDTH)])
        else:
            expected = self.held(m) * _product(self.encoder_weights[:stage])
            assert torch.allclose(hidden[:-1], expected)
            assert hidden.requires_grad == (self.settings.gradients and self.flow.encoder)
        hidden = hidden * self.encoder_weights[stage]
        return hidden[:-1] if self.encoder.is_last_stage else hidden

    def forward(self, m: int, inputs: Tensor | None) -> Tensor:
        """See `StepProgram.forward`."""
        assert self.llm is not None
        self.seen.append(m)
        stage, gradients = self.llm.place.pp, self.settings.gradients
        fed = any(e.rows for e in self.made[m] if e.lane == self.llm.place.dp)
        expected = (
            self.used(m) * _product(self.encoder_weights) * _product(self.llm_weights[:stage])
        )
        if self.llm.is_first_stage:
            hidden = torch.zeros(self.hidden_rows(Module.LLM, m), WIDTH, dtype=torch.float64)
            assert (inputs is not None) == fed
            if inputs is not None:
                assert inputs.shape == expected.shape
                assert inputs.requires_grad == (gradients and self.flow.bridge)
                hidden = torch.cat([inputs, hidden[inputs.shape[0] :]])
        else:
            assert inputs is not None
            trains = self.settings.language_trains or (self.flow.bridge and fed)
            assert inputs.requires_grad == (gradients and trains)
            hidden = inputs
        assert torch.allclose(hidden[: expected.shape[0]], expected)
        hidden = hidden * self.llm_weights[stage]
        return hidden.square().sum() / 2 if self.llm.is_last_stage else hidden

    def begin_last_backward(self, module: Module) -> None:
        """Nothing is exchanged here."""

    def hidden_rows(self, module: Module, m: int) -> int:
        """See `StepProgram.hidden_rows`."""
        if module is Module.ENCODER:
            return self.held(m).shape[0] + 1
        return 2 * self.sharding.shard_length

    def held(self, m: int) -> Tensor:
        """Rows of this rank's encoder, before any weight."""
        assert self.encoder is not None
        dp = self.encoder.place.dp
        return self._named(m, lambda entry, _: entry.encoder_rank == dp)

    def used(self, m: int) -> Tensor:
        """Rows of this rank's shard of the sequence, before any weight."""
        assert self.llm is not None
        place = self.llm.place
        shard = self.sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
        mine = {p for low, high in self.sharding.intervals(shard) for p in range(low, high)}
        return self._named(m, lambda e, row: e.lane == place.dp and e.start + row in mine)

    def _named(self, m: int, keep: Callable[[ManifestEntry, int], bool]) -> Tensor:
        names = [
            name_of(entry, row, m)
            for entry in self.made[m]
            for row in range(entry.rows)
            if keep(entry, row)
        ]
        return torch.tensor(names, dtype=torch.float64).unsqueeze(1) * torch.arange(1, WIDTH + 1)


def _weight(value: float, trains: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64), requires_grad=trains)


def _product(weights: list[torch.nn.Parameter]) -> Tensor:
    return (
        torch.stack([weight.detach() for weight in weights]).prod() if weights else torch.ones(())
    )
