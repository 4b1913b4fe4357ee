"""What the conclusions on a run are drawn from: its curves, its flags, its layout."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from megatron_mimo.config.flags import from_values
from megatron_mimo.config.layout import grids
from megatron_mimo.tools.curves import Curve, RunCurves
from megatron_mimo.tools.report.timeline import Timeline
from megatron_mimo.topology import Layout, ModuleGridSpec
from megatron_mimo.watch.rank_report import Part
from megatron_mimo.watch.start_record import StartRecord

LEAST_ITERATIONS = 20
"""Number of iterations below which nothing is concluded."""
LEAST_POINTS = 4
"""Number of logged values below which nothing is concluded from a curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measurements of a run.

    Attributes:
        curves: Curves of the whole run by TensorBoard tag.
        steady: Curves since the last start, without the first logged interval, in which a run warms
            up.
        since_start: Number of iterations since the last start.
        modules: Names of the modules whose time was measured, the language model last.
        flags: Value of every flag of the last start; empty where none was recorded.
        layout: The grids of the last start; None where they are not known.
        fixed_offsets: Whether the user may have set first ranks of grids, so that grids do not move
            when another one shrinks.
        timeline: Timeline of traced iterations; None where there is none.
    """

    curves: Mapping[str, Curve]
    steady: Mapping[str, Curve]
    since_start: int
    modules: tuple[str, ...]
    flags: Mapping[str, Any]
    layout: Layout | None
    fixed_offsets: bool
    timeline: Timeline | None

    @property
    def is_long_enough(self) -> bool:
        """Whether there are enough iterations to conclude anything from their times."""
        points = len(self.steady.get("lm loss", {}))
        return points >= LEAST_POINTS and self.since_start >= LEAST_ITERATIONS

    @property
    def iterations(self) -> int:
        """Number of the last iteration."""
        return max(self.curves["lm loss"])

    @property
    def disjoint_sources(self) -> tuple[ModuleGridSpec, ...]:
        """Grids of the sources that share no rank with another module."""
        layout = self.layout
        if layout is None:
            return ()
        return tuple(
            source
            for source in layout.sources
            if not any(
                layout.shares_ranks(source.name, other)
                for other in layout.modules
                if other != source.name
            )
        )

    @property
    def microbatches(self) -> int | None:
        """Number of microbatches of a step on each lane; None where it is not known."""
        if self.layout is None or not self.flags.get("global-batch-size"):
            return None
        per_round = int(self.flags["micro-batch-size"]) * self.layout.num_lanes
        return int(self.flags["global-batch-size"]) // per_round

    def share(self, module: str, part: Part) -> float:
        """Share of a step's time that the ranks of a module spend in a part, 0 to 1; a median.

        Only the ranks of the stage at the bridge wait there, which the mean over all stages hides:
        the share of the bridge is that of this stage.
        """
        curves = {each: self.steady.get(f"time/{module} {each} ms", {}) for each in Part}
        shares = []
        for iteration, spent in curves[part].items():
            total = sum(curve.get(iteration, 0.0) for curve in curves.values())
            if total > 0:
                shares.append(spent / total)
        if len(shares) < LEAST_POINTS:
            return 0.0
        stages = 1
        if part is Part.BRIDGE and self.layout is not None:
            stages = self.layout.modules[module].pp
        return min(1.0, statistics.median(shares) * stages)

    def median(self, tag: str) -> float | None:
        """Median of a curve's finite steady values; None where there are too few."""
        values = [value for value in self.steady.get(tag, {}).values() if isfinite(value)]
        return statistics.median(values) if len(values) >= LEAST_POINTS else None

    def matching(self, prefix: str, suffix: str) -> Iterator[tuple[str, str]]:
        """The names between a prefix and a suffix of tags, and the tags."""
        for tag in self.steady:
            if tag.startswith(prefix) and tag.endswith(suffix):
                yield tag.removeprefix(prefix).removesuffix(suffix), tag


def measured(run: RunCurves, starts: Sequence[StartRecord], timeline: Timeline | None) -> Measured:
    """Measurements of a run.

    Args:
        run: Curves of the run.
        starts: Starts of the run, in order; empty where the run recorded none.
        timeline: Timeline of traced iterations; None where there is none.
    """
    modules = timed_modules(run.curves)
    last = starts[-1] if starts else None
    begin = last.iteration if last else 0
    # The interval that a start ends in began before it, and the one after it warms up.
    warm = next((iteration for iteration in run.loss if iteration > begin), begin)
    return Measured(
        curves=run.curves,
        steady={
            tag: {iteration: value for iteration, value in curve.items() if iteration > warm}
            for tag, curve in run.curves.items()
        },
        since_start=max(run.loss) - begin,
        modules=modules,
        flags=last.flags if last else {},
        layout=_layout(last, modules) if last else None,
        fixed_offsets=last is not None
        and any("offset" in token or token.startswith("--config") for token in last.command),
        timeline=timeline,
    )


def typical(curve: Curve) -> float | None:
    """Median of finite values without the first one, in which a run warms up; None for none."""
    values = [value for value in list(curve.values())[1:] or curve.values() if isfinite(value)]
    return statistics.median(values) if values else None


def timed_modules(tags: Mapping[str, Curve]) -> tuple[str, ...]:
    """Names of the modules whose time was measured, in the order of the tags."""
    suffix = f" {Part.COMPUTE} ms"
    return tuple(
        tag.removeprefix("time/").removesuffix(suffix)
        for tag in tags
        if tag.startswith("time/") and tag.endswith(suffix)
    )


def _layout(start: StartRecord, modules: Sequence[str]) -> Layout | None:
    """The grids of a start; None where the times of no module, or flags of another version."""
    if not modules:
        return None
    try:
        section = from_values(start.flags, "starts.jsonl").grids
        return grids(section, modules, start.world_size)
    except ValueError:
        return None
