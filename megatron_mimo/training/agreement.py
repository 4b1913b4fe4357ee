"""Agreement of all ranks before a step runs: on samples, their rows and the targets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mimo.bridge.microbatch import MicrobatchManifest
from megatron_mimo.bridge.plan import BridgePlanner
from megatron_mimo.data.loader.batch import StepData
from megatron_mimo.topology import Layout

_ABSENT = torch.iinfo(torch.int64).min


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Facts for a step about all lanes, also those that this rank does not read.

    Attributes:
        target_tokens: Number of target tokens in the global batch.
        positions: Number of its positions that are not padding; None without packing.
        participating: Source name -> number of its dp ranks that have an item in the batch.
        wish: Largest `wish` of all ranks.
        manifests: Manifest of each microbatch, with the rows that this rank knows.
    """

    target_tokens: int
    positions: int | None
    participating: Mapping[str, int]
    wish: int
    manifests: tuple[MicrobatchManifest, ...]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One sample as one rank read it, for the comparison of the readers of a lane.

    Without packing, samples are counted by their sequences.
    """

    microbatch: int
    sample: int
    start: int
    key: str
    rows: tuple[tuple[str, int, int, int], ...]
    length: int | None = None

    def __str__(self) -> str:
        items = [
            f"{count} rows at {start} from {module} dp {dp}"
            for module, dp, start, count in self.rows
        ]
        at = f" at {self.start}" if self.start else ""
        at += "" if self.length is None else f", {self.length} tokens,"
        return f"{self.key!r}{at} with {', '.join(items) or 'no rows'}"


def agree_on_step(
    step: StepData,
    where: str,
    layout: Layout,
    planners: Mapping[str, BridgePlanner],
    control: dist.ProcessGroup,
    *,
    validate: bool,
    wish: int = 0,
) -> Agreement:
    """Exchange facts about every lane, and check that its readers drew the same samples.

    One reduction over the world, on the host, covers four integers per lane: its largest and
    smallest digest, its number of target tokens and of used positions; one per data-parallel rank
    of each source: whether it has an item; this rank's `wish`; and, for each source whose ranks
    divide the sending to several lanes, one per microbatch, dp rank and lane: its number of rows,
    unless those who read know them, since they have shared out the items.
    It runs before any row is sent, because readers that disagree would also expect different
    numbers of rows.

    Args:
        step: Data of this rank for the step.
        where: Name of the step for error messages: "iteration 7".
        layout: The grids of all modules.
        planners: Source name -> planner of its bridge.
        control: Group of the world, gloo.
        validate: Whether to compare the digests.
        wish: Reason for which this rank wants to stop after the step, 0 for none.

    Raises:
        RuntimeError: The readers of a lane have different samples (the message names the first), or
            the global batch has no target token.
    """
    numbers = torch.full((4, layout.num_lanes), _ABSENT, dtype=torch.int64)
    for lane, digest in step.lane_digest.items():
        numbers[0, lane] = digest
        numbers[1, lane] = -digest
        numbers[2, lane] = step.lane_target_tokens[lane]
        numbers[3, lane] = step.lane_positions.get(lane, _ABSENT)
    replicas = [(grid.name, dp) for grid in layout.sources for dp in range(grid.dp)]
    busy = _busy(step, replicas)
    pairs = [
        (name, dp, lane)
        for name, planner in planners.items()
        if planner.needs_network_rows and not (step.balanced and name in layout.domains)
        for lane in range(layout.num_lanes)
        for dp in layout.serving(name, lane)
    ]
    rows = _network_rows(step, planners, pairs)
    message = torch.cat([numbers.flatten(), busy, torch.tensor([wish]), rows.flatten()])
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=control)
    agreed, participating, wishes, counted = message.split(
        [numbers.numel(), len(replicas), 1, rows.numel()]
    )
    largest, negated_smallest, tokens, positions = agreed.view_as(numbers)
    parted = torch.nonzero(largest != -negated_smallest).flatten().tolist()
    if validate and parted:
        raise RuntimeError(f"{where}: {_difference(step, parted, layout, control)}")
    total = int(tokens.sum())
    if total <= 0:
        raise RuntimeError(
            f"{where}: no target token in the global batch, so its loss has no "
            f"mean: check the answers of the dataset, or raise --global-batch-size"
        )
    counts = counted.view_as(rows).tolist()
    counted_busy = dict.fromkeys((grid.name for grid in layout.sources), 0)
    for (name, _), is_busy in zip(replicas, participating.tolist(), strict=True):
        counted_busy[name] += is_busy
    return Agreement(
        target_tokens=total,
        positions=None if int(positions[0]) == _ABSENT else int(positions.sum()),
        participating=counted_busy,
        wish=int(wishes),
        manifests=tuple(
            MicrobatchManifest(
                entries=microbatch.manifest,
                network_rows=_by_source(pairs, counts[i])
                | {
                    name: {(dp, lane): count for dp, lane, count in of_source}
                    for name, of_source in microbatch.network_rows.items()
                },
                keys=microbatch.keys,
                documents=microbatch.documents,
            )
            for i, microbatch in enumerate(step.microbatches)
        ),
    )


def _busy(step: StepData, replicas: list[tuple[str, int]]) -> torch.Tensor:
    """Whether replicas of sources have an item of the lanes read here, int64 [replicas]."""
    found = {
        (entry.module, entry.source_rank)
        for microbatch in step.microbatches
        for entry in microbatch.manifest
    }
    return torch.tensor([int(replica in found) for replica in replicas], dtype=torch.int64)


def _network_rows(
    step: StepData, planners: Mapping[str, BridgePlanner], pairs: list[tuple[str, int, int]]
) -> torch.Tensor:
    """Numbers of rows of each (source, dp rank, lane), int64 [M, pairs]; absent when unknown."""
    table = torch.full((len(step.microbatches), len(pairs)), _ABSENT, dtype=torch.int64)
    sources = {name for name, _, _ in pairs}
    for i, microbatch in enumerate(step.microbatches):
        known = {
            name: planners[name].network_rows(microbatch.manifest, microbatch.documents)
            for name in sources
        }
        for j, (name, dp, lane) in enumerate(pairs):
            if lane in step.lane_digest:
                table[i, j] = known[name].get((dp, lane), 0)
    return table


def _by_source(
    pairs: list[tuple[str, int, int]], counts: list[int]
) -> dict[str, dict[tuple[int, int], int]]:
    """Source name -> number of rows by (dp rank, lane)."""
    found: dict[str, dict[tuple[int, int], int]] = {}
    for (name, dp, lane), count in zip(pairs, counts, strict=True):
        found.setdefault(name, {})[dp, lane] = count
    return found


def _difference(
    step: StepData, lanes: list[int], layout: Layout, control: dist.ProcessGroup
) -> str:
    """Text on the first difference between readers of some lanes. Collective over the world."""
    mine = {lane: list(_readings(step, lane)) for lane in lanes if lane in step.lane_digest}
    everyone: list[dict[int, list[_Reading]]] = [{} for _ in range(layout.world_size)]
    dist.all_gather_object(everyone, mine, group=control)
    parts = []
    for lane in lanes:
        readers = [(rank, views[lane]) for rank, views in enumerate(everyone) if lane in views]
        first_rank, first = readers[0]
        for rank, other in readers[1:]:
            apart = next(
                (pair for pair in zip(first, other, strict=False) if len(set(pair)) > 1), None
            )
            if apart is not None:
                here, there = apart
                parts.append(
                    f"lane {lane}, microbatch {here.microbatch}, sample {here.sample}: rank "
                    f"{first_rank} ({layout.describe_rank(first_rank)}) read {here}, but rank "
                    f"{rank} ({layout.describe_rank(rank)}) read {there}"
                )
                break
    return (
        f"the modules read other samples for lanes "
        f"{', '.join(map(str, lanes))}: {'; '.join(parts)}. Expected the same keys and rows in the "
        f"same order; write both sides' keys with --sample-trace-dir and compare them"
    )


def _readings(step: StepData, lane: int) -> Iterator[_Reading]:
    for microbatch in step.microbatches:
        keys = microbatch.keys[lane]
        starts = microbatch.starts.get(lane) or tuple((i, 0) for i in range(len(keys)))
        for i, (key, start) in enumerate(zip(keys, starts, strict=True)):
            end = starts[i + 1] if i + 1 < len(starts) else (len(keys), 0)
            rows = tuple(
                (entry.module, entry.source_rank, entry.start, entry.rows)
                for entry in microbatch.manifest
                if entry.lane == lane and start <= (entry.sequence, entry.start) < end
            )
            lengths = microbatch.documents.get(lane)
            length = None if lengths is None else lengths[i]
            yield _Reading(microbatch.index, i, start[1], key, rows, length)
