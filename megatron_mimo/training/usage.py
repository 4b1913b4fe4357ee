"""What the data of a step makes a rank compute and send; numbers that the host knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mimo.bridge.plan import ModulePlan
from megatron_mimo.data.batch import StepData, TextBatch
from megatron_mimo.encoders.radio.config import RadioConfig
from megatron_mimo.model.flops import Work, image_work, text_work
from megatron_mimo.schedule.crossing import Crossing

if TYPE_CHECKING:
    # Without megatron-core, which imports only once it is prepared, the numbers are pure.
    from megatron_mimo.topology.groups import ModuleGroups, Topology


@dataclass(frozen=True, slots=True)
class StepUsage:
    """One step of one rank.

    Attributes:
        work: Of the replicas for which this rank answers, so that the sum over ranks is the step's.
        bytes_sent: Over the bridge to other ranks: rows, and gradients of rows.
    """

    work: Work
    bytes_sent: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageMeter:
    """Counts what steps bring to this rank.

    Attributes:
        topology: Grids and groups.
        vision: The encoder's architecture.
        row_bytes: Of a row on the bridge.
        returns: Whether gradients of rows go back.
    """

    topology: "Topology"
    vision: RadioConfig
    row_bytes: int
    returns: bool

    def measure(self, data: StepData, crossings: Sequence[Crossing]) -> StepUsage:
        """Count a training step."""
        work = Work()
        for microbatch in data.microbatches:
            if _answers(self.topology.encoder) and microbatch.images is not None:
                work += image_work(microbatch.images.lengths, self.vision)
            if _answers(self.topology.llm) and microbatch.text is not None:
                work += _of_text(microbatch.text)
        rows = sum(self._rows_sent(crossing.source) for crossing in crossings)
        if self.returns:
            rows += sum(self._rows_sent(crossing.target) for crossing in crossings)
        return StepUsage(work, rows * self.row_bytes)

    def _rows_sent(self, plan: ModulePlan | None) -> int:
        if plan is None:
            return 0
        return sum(m.rows for m in plan.sends if m.peer != self.topology.rank)


def _answers(module: "ModuleGroups | None") -> bool:
    """Whether this rank speaks for its data-parallel replica of a module."""
    return module is not None and (module.place.tp, module.place.cp, module.place.pp) == (0, 0, 0)


def _of_text(text: TextBatch) -> Work:
    if text.lengths is not None:
        return text_work(text.lengths)
    batch, length = text.input_ids.shape
    return text_work((length,) * batch, sequences=batch)
