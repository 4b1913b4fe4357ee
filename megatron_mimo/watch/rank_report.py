"""Report of every rank on a log interval, and the resulting numbers of the whole run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_mimo.data.loader.batch import ModuleDispatch
from megatron_mimo.model.flops import ModelFlops, ModelWork
from megatron_mimo.schedule.actions import Action, Kind
from megatron_mimo.schedule.laps import Label, Lap, Phase
from megatron_mimo.topology import Layout
from megatron_mimo.watch.usage import StepUsage


class Part(StrEnum):
    """Part of the time of a step."""

    COMPUTE = "compute"
    BRIDGE = "bridge"
    PIPELINE = "pipeline"
    DATA = "data"
    AGREEMENT = "agreement"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    OTHER = "other"


class Share(StrEnum):
    """Operations of a source's replica in a microbatch, where items are shared out."""

    BY_LANE = "by lane"
    AS_RUN = "as run"
    LARGEST = "largest"


# A part of the time of one module's stage, or of the whole rank.
Slot = tuple[str | None, Part]
_OF_STAGES = (Part.COMPUTE, Part.BRIDGE, Part.PIPELINE)
_OF_RANKS = tuple(part for part in Part if part not in _OF_STAGES)
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
    """Report of one rank on a log interval.

    Attributes:
        seconds: Time of each slot, in seconds summed over the interval; every rank has all slots.
        work: Work of the replicas that the rank reports, summed over the interval; it has every
            module.
        bytes_sent: Number of bytes sent over bridges, summed over the interval.
        skipped: Number of samples skipped so far of the lane that the rank reports.
        peak_memory: Largest number of bytes of memory so far.
        counts: (source, name of a count) -> that count of each step, for the replica that the rank
            reports; they show the balance of its work.
        shares: (source, share) -> operations of each microbatch of each step, for the replica that
            the rank reports; sources of several replicas only, and zeros where lanes decide which
            replica runs an item.
        received: Source -> number of bytes of items that the replica got from other ranks, summed
            over the interval; the same sources.
        exchange: Time in which this rank exchanged items ahead, seconds summed over the interval.
        exposed: Part of that time in which the step already waited for its data, seconds.
    """

    seconds: Mapping[Slot, float]
    work: ModelWork
    bytes_sent: int
    skipped: int
    peak_memory: int
    counts: Mapping[tuple[str, str], tuple[int, ...]]
    shares: Mapping[tuple[str, Share], tuple[int, ...]] = field(default_factory=dict)
    received: Mapping[str, int] = field(default_factory=dict)
    exchange: float = 0.0
    exposed: float = 0.0

    def to_numbers(self) -> list[float]:
        """The report as numbers, equally many on every rank; float64 holds them exactly."""
        return [
            *self.seconds.values(),
            self.bytes_sent,
            self.skipped,
            self.peak_memory,
            *(number for counts in self.counts.values() for number in counts),
            *(number for shares in self.shares.values() for number in shares),
            *self.received.values(),
            self.exchange,
            self.exposed,
            *self.work.numbers(),
        ]

    def read(self, numbers: Sequence[float]) -> "RankReport":
        """The report of another rank, from the numbers of its `to_numbers`."""
        rest = iter(numbers)

        def take(count: int) -> tuple[int, ...]:
            return tuple(int(next(rest)) for _ in range(count))

        seconds = {slot: next(rest) for slot in self.seconds}
        bytes_sent, skipped, peak_memory = take(3)
        return RankReport(
            seconds=seconds,
            bytes_sent=bytes_sent,
            skipped=skipped,
            peak_memory=peak_memory,
            counts={key: take(len(counts)) for key, counts in self.counts.items()},
            shares={key: take(len(shares)) for key, shares in self.shares.items()},
            received=dict(zip(self.received, take(len(self.received)), strict=True)),
            exchange=next(rest),
            exposed=next(rest),
            work=self.work.filled(rest),
        )


def slots_of(layout: Layout) -> tuple[Slot, ...]:
    """Every slot of a layout's ranks."""
    of_stages = [(module, part) for module in layout.modules for part in _OF_STAGES]
    return (*of_stages, *((None, part) for part in _OF_RANKS))


def slot_of(what: Label, layout: Layout, rank: int) -> Slot:
    """Slot to which the time of a lap is added."""
    if not isinstance(what, Action):
        return None, _PARTS.get(what, Part.OTHER)
    module = what.module
    if what.kind in (Kind.FORWARD, Kind.BACKWARD):
        return module, Part.COMPUTE
    grid = layout.modules[module]
    stage = grid.coordinates(rank).pp
    if grid is layout.target:
        at_bridge = what.kind in _AT_INPUT and stage == 0
    else:
        at_bridge = what.kind not in _AT_INPUT and stage == grid.pp - 1
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
    """Summarise a rank's log interval.

    Args:
        laps: Laps of the interval.
        usages: Usage of each of its steps, at least one.
        layout: The grids of all modules.
        rank: Global rank.
        skipped: Number of samples skipped so far.
        peak_memory: Largest number of bytes of memory so far.
    """
    laps = tuple(laps)
    # Few labels, many laps.
    by_label: dict[Label, float] = {}
    for lap in laps:
        by_label[lap.what] = by_label.get(lap.what, 0.0) + lap.seconds
    seconds = dict.fromkeys(slots_of(layout), 0.0)
    for what, spent in by_label.items():
        seconds[slot_of(what, layout, rank)] += spent
    several = [source.name for source in layout.sources if source.dp > 1]
    works = {
        source.name: [usage.work.modules[source.name] for usage in usages]
        for source in layout.sources
    }
    return RankReport(
        seconds=seconds,
        work=sum((usage.work for usage in usages), ModelWork()),
        bytes_sent=sum(usage.bytes_sent for usage in usages),
        skipped=skipped,
        peak_memory=peak_memory,
        counts={
            (source, count): tuple(getattr(work, count) for work in of_steps)
            for source, of_steps in works.items()
            for count in of_steps[0].balanced
        },
        shares=_shares(usages, several),
        received={
            name: sum(usage.dispatch[name].received for usage in usages if name in usage.dispatch)
            for name in several
        },
        exchange=sum(end - start for usage in usages for start, end in usage.exchanges),
        exposed=_exposed(laps, usages),
    )


def _shares(
    usages: Sequence[StepUsage], sources: Sequence[str]
) -> dict[tuple[str, Share], tuple[int, ...]]:
    """Operations by source, share, step and microbatch; zeros for replicas of other ranks."""
    found: dict[tuple[str, Share], tuple[int, ...]] = {}
    for name in sources:
        steps = [(usage.dispatch.get(name), (0,) * usage.microbatches) for usage in usages]
        for share in Share:
            found[name, share] = tuple(
                number
                for module, none in steps
                for number in (none if module is None else _share(module, share))
            )
    return found


def _share(module: ModuleDispatch, share: Share) -> tuple[int, ...]:
    match share:
        case Share.BY_LANE:
            return module.by_lane
        case Share.AS_RUN:
            return module.as_run
        case Share.LARGEST:
            return module.largest


def _exposed(laps: Sequence[Lap], usages: Sequence[StepUsage]) -> float:
    """Seconds in which items were exchanged and the rank waited for its data."""
    waits = [lap for lap in laps if lap.what is Phase.DATA]
    return sum(
        max(0.0, min(end, wait.end) - max(start, wait.start))
        for usage in usages
        for start, end in usage.exchanges
        for wait in waits
    )


def run_scalars(
    reports: Sequence[RankReport],
    layout: Layout,
    flops: Callable[[ModelWork], ModelFlops],
    *,
    steps: int,
    seconds_per_step: float,
    tokens_per_step: int,
    peak_tflops: float | None,
) -> dict[str, float]:
    """Scalars of a log interval by TensorBoard tag; all of them per step.

    Args:
        reports: Report of every rank, in the order of ranks.
        layout: The grids of all modules.
        flops: Function that counts the operations of some work.
        steps: Number of steps of the interval.
        seconds_per_step: Wall time of a step, seconds.
        tokens_per_step: Number of positions of a global batch.
        peak_tflops: Largest number of TFLOP/s of a GPU; None omits the utilisation.
    """
    scalars: dict[str, float] = {}
    for name, grid in layout.modules.items():
        scalars |= _times([reports[rank] for rank in grid.ranks], name, steps)
    if layout.sources:
        scalars |= _of_bridges(reports, layout, steps)
        scalars |= _of_dispatch(reports, layout, steps)
    scalars["speed/tokens per s"] = tokens_per_step / seconds_per_step
    scalars["speed/tokens per s per GPU"] = scalars["speed/tokens per s"] / layout.world_size
    done = flops(sum((report.work for report in reports), ModelWork()))
    speeds = {layout.target.name: (done.modules[layout.target.name].total, layout.target.size)}
    speeds["model"] = (done.total, layout.world_size)
    speeds |= {s.name: (done.modules[s.name].total, s.size) for s in layout.sources}
    for name, (count, ranks) in speeds.items():
        speed = count / steps / seconds_per_step / ranks / 1e12
        scalars[f"speed/{name} TFLOP per s per GPU"] = speed
        if peak_tflops is not None:
            scalars[f"speed/{name} MFU"] = speed / peak_tflops
    scalars["data/skipped samples"] = sum(report.skipped for report in reports)
    for name, grid in layout.modules.items():
        most = max(reports[rank].peak_memory for rank in grid.ranks)
        scalars[f"memory/{name} peak GiB"] = most / _GIB
    return scalars


def _of_bridges(reports: Sequence[RankReport], layout: Layout, steps: int) -> dict[str, float]:
    """Balance of the load of each source's replicas, and bytes sent over the bridges."""
    scalars: dict[str, float] = {}
    rows: dict[str, float] = {}
    for source in layout.sources:
        answering = [reports[source.rank(dp=dp)].counts for dp in range(source.dp)]
        for name, count in (key for key in answering[0] if key[0] == source.name):
            imbalance = max_over_mean([counts[name, count] for counts in answering])
            if imbalance is not None:
                scalars[f"balance/{name} {count} max over mean"] = imbalance
        rows[source.name] = sum(sum(c[source.name, "rows"]) for c in answering) / steps
    scalars["bridge/rows"] = sum(rows.values())
    if len(rows) > 1:
        scalars |= {f"bridge/{name} rows": number for name, number in rows.items()}
    scalars["bridge/bytes"] = sum(report.bytes_sent for report in reports) / steps
    return scalars


def _of_dispatch(reports: Sequence[RankReport], layout: Layout, steps: int) -> dict[str, float]:
    """How even the operations of a source's replicas are, and what it takes to make them so.

    A microbatch takes as long as its busiest replica does. So the ratios are of sums over
    microbatches: of the busiest replica's operations, by those of the mean replica.
    """
    scalars: dict[str, float] = {}
    for source in layout.sources:
        if source.dp == 1:
            continue
        replicas = [reports[source.rank(dp=dp)] for dp in range(source.dp)]
        # By share: of every microbatch, the operations of each replica.
        by_share = {
            share: list(zip(*(each.shares[source.name, share] for each in replicas), strict=True))
            for share in Share
        }
        means = [sum(microbatch) / source.dp for microbatch in by_share[Share.AS_RUN]]
        mean = sum(means)
        if not mean:
            continue
        for share in (Share.BY_LANE, Share.AS_RUN):
            busiest = sum(map(max, by_share[share]))
            scalars[f"dispatch/{source.name} {share} max over mean"] = busiest / mean
        largest = map(max, by_share[Share.LARGEST])
        least = sum(map(max, means, largest))
        scalars[f"dispatch/{source.name} least max over mean"] = least / mean
        received = sum(each.received[source.name] for each in replicas)
        scalars[f"dispatch/{source.name} bytes"] = received / steps
    if scalars:
        for name, spent in (("exchange", "exchange"), ("exchange exposed", "exposed")):
            longest = max(getattr(report, spent) for report in reports)
            scalars[f"dispatch/{name} ms"] = longest * 1000 / steps
    return scalars


def max_over_mean(counts: Sequence[Sequence[int]]) -> float | None:
    """Largest count over the mean count, averaged over the steps with a count above 0.

    Args:
        counts: Counts of each replica, by step.

    Returns:
        The ratio, 1 for equal counts; None where all counts are 0.
    """
    found = [max(step) * len(step) / sum(step) for step in zip(*counts, strict=True) if sum(step)]
    return sum(found) / len(found) if found else None


def _times(reports: Sequence[RankReport], module: str, steps: int) -> Mapping[str, float]:
    """Milliseconds per step of each slot, mean over the ranks of a module."""
    scalars = {}
    for part in Part:
        slot: Slot = (module if part in _OF_STAGES else None, part)
        mean = sum(report.seconds[slot] for report in reports) / len(reports)
        scalars[f"time/{module} {part} ms"] = mean * 1000 / steps
    return scalars
