"""What every rank tells of a log interval, and the numbers that follow for the whole run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from enum import StrEnum

from megatron_mimo.model.flops import ModelFlops, Work
from megatron_mimo.schedule.actions import Action, Kind, Module, role_of
from megatron_mimo.schedule.laps import Label, Lap, Phase
from megatron_mimo.topology import Layout
from megatron_mimo.training.usage import StepUsage


class Part(StrEnum):
    """What the time of a step goes into."""

    COMPUTE = "compute"
    BRIDGE = "bridge"
    PIPELINE = "pipeline"
    DATA = "data"
    AGREEMENT = "agreement"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    OTHER = "other"


# A part of the time of one module's stage, or of the whole rank.
Slot = tuple[Module | None, Part]
_OF_STAGES = (Part.COMPUTE, Part.BRIDGE, Part.PIPELINE)
_OF_RANKS = tuple(part for part in Part if part not in _OF_STAGES)
SLOTS: tuple[Slot, ...] = (
    *((module, part) for module in Module for part in _OF_STAGES),
    *((None, part) for part in _OF_RANKS),
)
_PARTS = {
    Phase.DATA: Part.DATA,
    Phase.AGREEMENT: Part.AGREEMENT,
    Phase.GRADIENTS: Part.GRADIENTS,
    Phase.OPTIMIZER: Part.OPTIMIZER,
}
_AT_INPUT = (Kind.POST_INPUT, Kind.WAIT_INPUT, Kind.SEND_GRAD)
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """A log interval of one rank.

    Attributes:
        seconds: Of each of `SLOTS`, summed over the interval.
        work: Of the replicas for which the rank answers, summed over the interval.
        bytes_sent: Over the bridge, summed over the interval.
        skipped: Samples left out so far of the lane for which the rank answers.
        peak_memory: Bytes, so far.
        rows: Of each step, of the encoder replica for which the rank answers.
        patches: The same.
    """

    seconds: tuple[float, ...]
    work: Work
    bytes_sent: int
    skipped: int
    peak_memory: int
    rows: tuple[int, ...]
    patches: tuple[int, ...]

    def to_numbers(self) -> list[float]:
        """As many numbers on every rank; float64 holds them exactly."""
        return [
            *self.seconds,
            *astuple(self.work),
            self.bytes_sent,
            self.skipped,
            self.peak_memory,
            *self.rows,
            *self.patches,
        ]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> "RankReport":
        """Read what `to_numbers` wrote."""
        rest = iter(numbers)

        def take(count: int) -> tuple[int, ...]:
            return tuple(int(next(rest)) for _ in range(count))

        seconds = tuple(next(rest) for _ in SLOTS)
        names = [field.name for field in fields(Work)]
        work = Work(**dict(zip(names, take(len(names)), strict=True)))
        bytes_sent, skipped, peak_memory = take(3)
        steps = (len(numbers) - len(SLOTS) - len(names) - 3) // 2
        return cls(
            seconds=seconds,
            work=work,
            bytes_sent=bytes_sent,
            skipped=skipped,
            peak_memory=peak_memory,
            rows=take(steps),
            patches=take(steps),
        )


def slot_of(what: Label, layout: Layout, rank: int) -> Slot:
    """What the time of a lap counts as."""
    if not isinstance(what, Action):
        return None, _PARTS.get(what, Part.OTHER)
    module = what.module
    if what.kind in (Kind.FORWARD, Kind.BACKWARD):
        return module, Part.COMPUTE
    stage = role_of(layout, rank).stage(module)
    encoder = layout.encoder
    if module is Module.LLM:
        at_bridge = what.kind in _AT_INPUT and stage == 0
    else:
        assert encoder is not None
        at_bridge = what.kind not in _AT_INPUT and stage == encoder.pp - 1
    return module, Part.BRIDGE if at_bridge else Part.PIPELINE


def rank_report(
    laps: Iterable[Lap],
    usages: Sequence[StepUsage],
    layout: Layout,
    rank: int,
    *,
    skipped: int,
    peak_memory: int,
) -> RankReport:
    """Sum up a rank's log interval.

    Args:
        laps: Of the interval.
        usages: Of its steps.
        layout: Both grids.
        rank: Global rank.
        skipped: Samples left out so far.
        peak_memory: Bytes.
    """
    # Few labels, many laps.
    by_label: dict[Label, float] = {}
    for lap in laps:
        by_label[lap.what] = by_label.get(lap.what, 0.0) + lap.seconds
    seconds = dict.fromkeys(SLOTS, 0.0)
    for what, spent in by_label.items():
        seconds[slot_of(what, layout, rank)] += spent
    return RankReport(
        seconds=tuple(seconds.values()),
        work=sum((usage.work for usage in usages), Work()),
        bytes_sent=sum(usage.bytes_sent for usage in usages),
        skipped=skipped,
        peak_memory=peak_memory,
        rows=tuple(usage.work.rows for usage in usages),
        patches=tuple(usage.work.patches for usage in usages),
    )


def run_scalars(
    reports: Sequence[RankReport],
    layout: Layout,
    flops: Callable[[Work], ModelFlops],
    *,
    seconds_per_step: float,
    tokens_per_step: int,
    peak_tflops: float | None,
) -> dict[str, float]:
    """Scalars of a log interval by TensorBoard tag; all of them per step.

    Args:
        reports: Of every rank, in order.
        layout: Both grids.
        flops: Of some work.
        seconds_per_step: Wall time.
        tokens_per_step: Positions of a global batch.
        peak_tflops: Of a GPU; None leaves the utilisation out.
    """
    steps = len(reports[0].rows)
    scalars: dict[str, float] = {}
    for grid in layout.grids:
        module = Module(grid.name)
        scalars |= _times([reports[rank] for rank in grid.ranks], module, steps)
    if layout.encoder is not None:
        answering = [reports[layout.encoder.rank(dp=dp)] for dp in range(layout.encoder.dp)]
        for name, counts in (
            ("rows", [report.rows for report in answering]),
            ("patches", [report.patches for report in answering]),
        ):
            imbalance = max_over_mean(counts)
            if imbalance is not None:
                scalars[f"balance/encoder {name} max over mean"] = imbalance
        scalars["bridge/rows"] = sum(sum(report.rows) for report in answering) / steps
        scalars["bridge/bytes"] = sum(report.bytes_sent for report in reports) / steps
    scalars["speed/tokens per s"] = tokens_per_step / seconds_per_step
    scalars["speed/tokens per s per GPU"] = scalars["speed/tokens per s"] / layout.world_size
    done = flops(sum((report.work for report in reports), Work()))
    ranks = {"llm": layout.llm.size, "model": layout.world_size}
    operations = {"llm": done.language.total, "model": done.total}
    if layout.encoder is not None:
        ranks["encoder"], operations["encoder"] = layout.encoder.size, done.encoder.total
    for name, count in operations.items():
        speed = count / steps / seconds_per_step / ranks[name] / 1e12
        scalars[f"speed/{name} TFLOP per s per GPU"] = speed
        if peak_tflops is not None:
            scalars[f"speed/{name} MFU"] = speed / peak_tflops
    scalars["data/skipped samples"] = sum(report.skipped for report in reports)
    for grid in layout.grids:
        most = max(reports[rank].peak_memory for rank in grid.ranks)
        scalars[f"memory/{grid.name} peak GiB"] = most / _GIB
    return scalars


def max_over_mean(counts: Sequence[Sequence[int]]) -> float | None:
    """The most that one of several has over their mean, averaged over steps in which any has some.

    Args:
        counts: Of each of them, by step.

    Returns:
        1 where all have the same; None where none ever has any.
    """
    found = [max(step) * len(step) / sum(step) for step in zip(*counts, strict=True) if sum(step)]
    return sum(found) / len(found) if found else None


def _times(reports: Sequence[RankReport], module: Module, steps: int) -> Mapping[str, float]:
    """Mean over the ranks of a module, milliseconds of a step."""
    scalars = {}
    for part in Part:
        slot: Slot = (module if part in _OF_STAGES else None, part)
        index = SLOTS.index(slot)
        mean = sum(report.seconds[index] for report in reports) / len(reports)
        scalars[f"time/{module} {part} ms"] = mean * 1000 / steps
    return scalars
