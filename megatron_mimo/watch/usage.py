"""Work and bytes of a rank in a step, from its data; all numbers are known on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_mimo.bridge.microbatch import MicrobatchPlan
from megatron_mimo.bridge.plan import RankPlan
from megatron_mimo.data.loader.batch import (
    Microbatch,
    ModuleDispatch,
    StepData,
    StepDispatch,
    TextBatch,
)
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.model.flops import ModelWork, no_work
from megatron_mimo.modules.families import source_adapter
from megatron_mimo.modules.flops import TextWork, Work, text_work

if TYPE_CHECKING:
    # Not imported at run time: megatron-core can only be imported after it was prepared.
    from megatron_mimo.topology.groups import Topology


@dataclass(frozen=True, slots=True)
class StepUsage:
    """Work and bytes of one rank in one step.

    Attributes:
        work: Work of the replicas that this rank reports, so that the sum over ranks is that of the
            step; it has every module of the model.
        bytes_sent: Number of bytes sent over bridges to other ranks: rows, and their gradients.
        microbatches: Number of microbatches of the step.
        dispatch: Source -> how its items were shared out, for the replica that this rank reports;
            only sources whose items are.
        exchanges: Start and end of each exchange of items for the step, in seconds of this rank's
            `time.perf_counter`; only on the rank that took part in it.
    """

    work: ModelWork
    bytes_sent: int
    microbatches: int = 1
    dispatch: Mapping[str, ModuleDispatch] = field(default_factory=dict)
    exchanges: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageMeter:
    """Meter of the work and bytes of this rank's steps.

    Attributes:
        topology: Grids and groups of this rank.
        architecture: Architecture of every module.
        row_bytes: Number of bytes of a row on a bridge.
        returning: Names of the sources that use gradients of their rows.
    """

    topology: "Topology"
    architecture: ModelConfig
    row_bytes: int
    returning: frozenset[str]

    def measure(self, data: StepData, plans: Sequence[MicrobatchPlan]) -> StepUsage:
        """Count a training step."""
        work = no_work(self.architecture)
        for microbatch in data.microbatches:
            work += ModelWork(self._of_microbatch(microbatch))
        rows = 0
        for source, edge in (pair for plan in plans for pair in plan.edges.items()):
            rows += self._rows_sent(edge.source)
            if source in self.returning:
                rows += self._rows_sent(edge.target)
        dispatch, exchanges = self._dispatched(data.dispatch)
        return StepUsage(work, rows * self.row_bytes, len(data.microbatches), dispatch, exchanges)

    def _dispatched(
        self, found: StepDispatch | None
    ) -> tuple[Mapping[str, ModuleDispatch], tuple[tuple[float, float], ...]]:
        """`dispatch` and `exchanges` of the usage."""
        if found is None:
            return {}, ()
        mine = {
            name: module
            for name, module in found.modules.items()
            if self.topology.modules[name].answers_for_replica
        }
        return mine, found.spans if found.reader == self.topology.rank else ()

    def _of_microbatch(self, microbatch: Microbatch) -> Mapping[str, Work]:
        """Work of this rank's modules in a microbatch, for the replicas that it reports."""
        found: dict[str, Work] = {}
        for name, groups in self.topology.modules.items():
            if not groups.answers_for_replica:
                continue
            if name == self.architecture.target_name:
                if microbatch.text is not None:
                    found[name] = _of_text(microbatch.text)
            elif name in microbatch.inputs:
                config = self.architecture.modules[name]
                found[name] = source_adapter(config).work(config, microbatch.inputs[name])
        return found

    def _rows_sent(self, plan: RankPlan | None) -> int:
        if plan is None:
            return 0
        return sum(m.rows for m in plan.sends if m.peer != self.topology.rank)


def _of_text(text: TextBatch) -> TextWork:
    if text.lengths is not None:
        return text_work(text.lengths)
    batch, length = text.input_ids.shape
    return text_work((length,) * batch, sequences=batch)
