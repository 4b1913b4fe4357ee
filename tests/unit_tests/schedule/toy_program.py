"""The toy as a program of the executor: rows times one weight per stage, squared and summed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_mimo.bridge.channels import TransportConfig
from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.bridge.microbatch import MicrobatchManifest
from megatron_mimo.schedule.executor import Executor, ExecutorConfig
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.schedule.laps import Note, ignore
from megatron_mimo.topology import SequenceSharding
from megatron_mimo.topology.groups import ModuleGroups, Topology
from tests.unit_tests.schedule.toy import WIDTH, manifests, name_of


@dataclass(frozen=True)
class Settings:
    """`still` names the sources that do not train, `fixed` those whose last stage alone does."""

    run_ahead: int = 1
    num_microbatches: int = 5
    still: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    target_trains: bool = True
    gradients: bool = True
    check: bool = False


class Toy:
    """Every rank knows all weights, so that it can tell what it should see and get."""

    def __init__(self, topology: Topology, sharding: SequenceSharding, settings: Settings) -> None:
        self.topology, self.sharding, self.settings = topology, sharding, settings
        layout = topology.layout
        self.target = layout.target.name
        self.sources = [source.name for source in layout.sources]
        returning = frozenset(self.sources) - settings.still
        self.flow = GradientFlow(returning=returning, inside=returning - settings.fixed)
        self.made = manifests(layout, settings.num_microbatches)
        self.weights = {
            grid.name: [
                _weight(
                    1.5 + k / 4 + j / 8,
                    grid.name in (returning if j == grid.pp - 1 else self.flow.inside),
                )
                for j in range(grid.pp)
            ]
            for k, grid in enumerate(layout.sources)
        }
        self.weights[self.target] = [
            _weight(0.5 + p / 8, settings.target_trains) for p in range(layout.target.pp)
        ]
        self.seen: list[int] = []
        self.executor = Executor(
            topology,
            ExecutorConfig(
                transport=TransportConfig(
                    row_width=WIDTH,
                    dtype=torch.float64,
                    device=torch.device("cpu"),
                    check=settings.check,
                ),
                sharding=sharding,
                flow=self.flow,
                target_trains=settings.target_trains,
                run_ahead=settings.run_ahead,
            ),
        )

    def run(self, note: Note = ignore) -> None:
        """One step from fresh gradients."""
        self.seen = []
        for weight in (weight for weights in self.weights.values() for weight in weights):
            weight.grad = None
        known = [self.executor.plan(MicrobatchManifest(entries=entries)) for entries in self.made]
        self.executor.run(self, known, gradients=self.settings.gradients, note=note)

    def check(self) -> None:
        """The loss is the sum of row^2 / 2 over all rows, each proportional to its weights."""
        num = self.settings.num_microbatches
        if self.target in self.topology.modules:
            assert self.seen == list(range(num))
        for name, module in self.topology.modules.items():
            mine = self.weights[name][module.place.pp]
            assert all(weight.grad is None for weight in self.weights[name] if weight is not mine)
            if not (self.settings.gradients and mine.requires_grad):
                assert mine.grad is None
                continue
            # Square of the factor and of the rows, for each source whose rows pass this weight.
            total = 0.0
            for source in self.sources if name == self.target else [name]:
                rows = self.used if name == self.target else self.held
                energy = sum(rows(source, m).square().sum().item() for m in range(num))
                total += self.factor(source).item() ** 2 * energy
            got = 0.0 if mine.grad is None else mine.grad.item()
            assert got == pytest.approx(total / mine.item())

    def factor(self, source: str) -> Tensor:
        """What a row of a source is multiplied by on its whole way."""
        return _product(self.weights[source]) * _product(self.weights[self.target])

    def forward(self, module: str, m: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `StepProgram.forward`."""
        groups = self.topology.modules[module]
        run = self._of_target if module == self.target else self._of_source
        return run(module, groups, m, inputs)

    def _of_source(
        self, module: str, groups: ModuleGroups, m: int, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        held = self.held(module, m)
        assert held.shape[0]
        stage = groups.place.pp
        if groups.is_first_stage:
            assert not inputs
            # One row more than what crosses the bridge.
            hidden = torch.cat([held, torch.ones(1, WIDTH)])
        else:
            hidden = inputs[module]
            assert torch.allclose(hidden[:-1], held * _product(self.weights[module][:stage]))
            assert hidden.requires_grad == (self.settings.gradients and module in self.flow.inside)
        hidden = hidden * self.weights[module][stage]
        return hidden[:-1] if groups.is_last_stage else hidden

    def _of_target(
        self, module: str, groups: ModuleGroups, m: int, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        self.seen.append(m)
        stage, gradients = groups.place.pp, self.settings.gradients
        fed = {e.module for e in self.made[m] if e.lane == groups.place.dp and e.rows}
        expected = torch.cat(
            [torch.zeros(0, WIDTH, dtype=torch.float64)]
            + [
                self.used(name, m)
                * _product(self.weights[name])
                * _product(self.weights[module][:stage])
                for name in self.sources
            ]
        )
        if groups.is_first_stage:
            assert set(inputs) == fed
            for name, rows in inputs.items():
                assert rows.shape == self.used(name, m).shape
                assert rows.requires_grad == (gradients and name in self.flow.returning)
            hidden = torch.zeros(self.hidden_rows(module, m), WIDTH, dtype=torch.float64)
            rows = [inputs[name] for name in self.sources if name in inputs]
            hidden = torch.cat([*rows, hidden[sum(map(len, rows)) :]])
        else:
            hidden = inputs[module]
            trains = self.settings.target_trains or bool(self.flow.returning & fed)
            assert hidden.requires_grad == (gradients and trains)
        assert torch.allclose(hidden[: expected.shape[0]], expected)
        hidden = hidden * self.weights[module][stage]
        return hidden.square().sum() / 2 if groups.is_last_stage else hidden

    def idle(self, module: str, backward: bool) -> None:
        """See `StepProgram.idle`."""

    def begin_last_backward(self, module: str) -> None:
        """Nothing is exchanged here."""

    def hidden_rows(self, module: str, m: int) -> int:
        """See `StepProgram.hidden_rows`."""
        if module == self.target:
            return 2 * self.sharding.shard_length
        return self.held(module, m).shape[0] + 1

    def held(self, source: str, m: int) -> Tensor:
        """Rows of this rank's replica of a source, before any weight."""
        dp = self.topology.modules[source].place.dp
        return self._named(source, m, lambda entry, _: entry.source_rank == dp)

    def used(self, source: str, m: int) -> Tensor:
        """A source's rows in this rank's shard of the sequence, before any weight."""
        place = self.topology.modules[self.target].place
        shard = self.sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
        mine = {p for low, high in self.sharding.of().intervals(shard) for p in range(low, high)}
        return self._named(source, m, lambda e, row: e.lane == place.dp and e.start + row in mine)

    def _named(self, source: str, m: int, keep: Callable[[ManifestEntry, int], bool]) -> Tensor:
        names = [
            name_of(entry, row, m)
            for entry in self.made[m]
            if entry.module == source
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
