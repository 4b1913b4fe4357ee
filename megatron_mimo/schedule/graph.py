"""The stages of all modules as a graph, and what follows from it for each stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mimo.topology import Layout, StageId


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientFlow:
    """Boundaries that gradients cross; they always cross those between stages of the target.

    Attributes:
        returning: Names of the sources that use gradients of their rows: a part of them trains.
        inside: Names of the sources between whose stages gradients are sent: a part before their
            last stage trains.
    """

    returning: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.inside <= self.returning, "gradients reach a source over its bridge only"


class StageGraph:
    """The tree of stages that a step runs over.

    Args:
        layout: The grids of all modules.
        run_ahead: Number of microbatches that a source may be ahead of the target.
        gradients: Whether there is a backward.
        flow: Boundaries that gradients cross.

    Attributes:
        first_of_target: First stage of the target, which all sources feed.
    """

    def __init__(
        self, layout: Layout, *, run_ahead: int, gradients: bool, flow: GradientFlow
    ) -> None:
        self._layout = layout
        self._target = layout.target
        self._sources = {grid.name: grid for grid in layout.sources}
        self._run_ahead = {
            name: 0 if layout.shares_ranks(name, self._target.name) else run_ahead
            for name in self._sources
        }
        self._gradients = gradients
        self._flow = flow
        self.first_of_target = StageId(self._target.name, 0)

    def is_source(self, stage: StageId) -> bool:
        """Whether a stage belongs to a source."""
        return stage.module in self._sources

    def predecessors(self, stage: StageId) -> tuple[StageId, ...]:
        """The stages that feed a stage."""
        if stage.stage:
            return (StageId(stage.module, stage.stage - 1),)
        if stage != self.first_of_target:
            return ()
        return tuple(StageId(name, grid.pp - 1) for name, grid in self._sources.items())

    def successor(self, stage: StageId) -> StageId | None:
        """The stage that a stage feeds; None for the target's last stage, which has the loss."""
        if stage.stage + 1 < self._layout.modules[stage.module].pp:
            return StageId(stage.module, stage.stage + 1)
        return self.first_of_target if self.is_source(stage) else None

    def depth(self, stage: StageId) -> int:
        """Largest number of microbatches that a stage may have run forward but not yet backward."""
        if not self.is_source(stage):
            return self._target.pp - stage.stage
        behind = self._sources[stage.module].pp - 1 - stage.stage
        return self._target.pp + self._run_ahead[stage.module] + behind

    def runs_backward(self, stage: StageId) -> bool:
        """Whether a stage receives gradients of its output and runs backward."""
        if not self.is_source(stage):
            return self._gradients
        is_last = stage.stage == self._sources[stage.module].pp - 1
        takers = self._flow.returning if is_last else self._flow.inside
        return self._gradients and stage.module in takers

    def holds_both_ends(self, source_stage: StageId, role: Sequence[StageId]) -> bool:
        """Whether a rank that holds `role` has both ends of the bridge after a source's stage.

        Such a rank posts what it receives together with what it sends: see `bridge.transport`.
        """
        return self.successor(source_stage) == self.first_of_target and (
            self.first_of_target in role
        )

    def posts_input(self, stage: StageId, role: Sequence[StageId]) -> bool:
        """Whether a stage posts receives of input that are separate from its rank's sends."""
        return any(
            not (before in role and self.holds_both_ends(before, role))
            for before in self.predecessors(stage)
        )
