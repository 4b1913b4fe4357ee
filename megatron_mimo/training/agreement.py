"""What every rank must agree on before a step runs: the samples, their rows and the targets."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mimo.bridge.plan import BridgePlanner
from megatron_mimo.data.batch import StepData
from megatron_mimo.schedule.crossing import StepManifest
from megatron_mimo.topology import Layout

_ABSENT = torch.iinfo(torch.int64).min


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What a step needs to know of the lanes that this rank does not read.

    Attributes:
        target_tokens: In the global batch.
        positions: In it that are no padding; None without packing.
        participating: Data-parallel ranks of the encoder that have an image in it.
        wish: Largest of all ranks'.
        manifests: Of each microbatch.
    """

    target_tokens: int
    positions: int | None
    participating: int
    wish: int
    manifests: tuple[StepManifest, ...]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One sample as one rank read it; readers of a lane are compared by all but the rank.

    Without packing, samples are counted by their sequences.
    """

    microbatch: int
    sample: int
    start: int
    key: str
    rows: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        images = [f"{count} rows at {start} from dp {dp}" for dp, start, count in self.rows]
        at = f" at {self.start}" if self.start else ""
        return f"{self.key!r}{at} with {', '.join(images) or 'no rows'}"


def agree_on_step(
    step: StepData,
    where: str,
    layout: Layout,
    planner: BridgePlanner,
    control: dist.ProcessGroup,
    *,
    validate: bool,
    wish: int = 0,
) -> Agreement:
    """Spread what ranks must know of every lane, and check that its readers drew the same samples.

    One reduction over the world, on the host, of four integers per lane: its largest and smallest
    digest, its target tokens and its positions in use; of one per data-parallel rank of the
    encoder: whether it has an image; of this rank's wish; and, where encoder ranks share the
    sending to several lanes, of one per microbatch and lane: its rows. It runs before any row
    moves, because readers that disagree would also disagree about how many rows to expect.

    Args:
        step: This rank's data.
        where: Which step this is, for errors: "iteration 7".
        layout: Both grids.
        planner: Of the rows.
        control: gloo group of the world.
        validate: Compare the digests.
        wish: Why this rank wants to leave after the step, 0 for not.

    Raises:
        RuntimeError: The encoder and the language model read other samples for a lane; names the
            first. Or the global batch has no target token.
    """
    numbers = torch.full((4, layout.num_lanes), _ABSENT, dtype=torch.int64)
    for lane, digest in step.lane_digest.items():
        numbers[0, lane] = digest
        numbers[1, lane] = -digest
        numbers[2, lane] = step.lane_target_tokens[lane]
        numbers[3, lane] = step.lane_positions.get(lane, _ABSENT)
    pairs = _pairs(layout) if planner.needs_network_rows else []
    rows = _network_rows(step, planner, pairs)
    encodes = _encodes(step, layout)
    message = torch.cat([numbers.flatten(), encodes, torch.tensor([wish]), rows.flatten()])
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=control)
    agreed, participating, wishes, counted = message.split(
        [numbers.numel(), len(encodes), 1, rows.numel()]
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
    return Agreement(
        target_tokens=total,
        positions=None if int(positions[0]) == _ABSENT else int(positions.sum()),
        participating=int(participating.sum()),
        wish=int(wishes),
        manifests=tuple(
            StepManifest(
                entries=microbatch.manifest,
                network_rows=dict(zip(pairs, counts[i], strict=True)) if pairs else None,
                keys=microbatch.keys,
            )
            for i, microbatch in enumerate(step.microbatches)
        ),
    )


def _encodes(step: StepData, layout: Layout) -> torch.Tensor:
    """Which data-parallel ranks of the encoder have an image of the lanes read here, int64."""
    found = torch.zeros(0 if layout.encoder is None else layout.encoder.dp, dtype=torch.int64)
    for microbatch in step.microbatches:
        for entry in microbatch.manifest:
            found[entry.encoder_rank] = 1
    return found


def _pairs(layout: Layout) -> list[tuple[int, int]]:
    """(encoder dp rank, lane) of whoever serves whom."""
    return [(dp, lane) for lane in range(layout.num_lanes) for dp in layout.serving(lane)]


def _network_rows(
    step: StepData, planner: BridgePlanner, pairs: list[tuple[int, int]]
) -> torch.Tensor:
    """Rows of each microbatch that each pair exchanges, int64 [M, pairs]; absent when unknown."""
    table = torch.full((len(step.microbatches), len(pairs)), _ABSENT, dtype=torch.int64)
    if pairs:
        for i, microbatch in enumerate(step.microbatches):
            known = planner.network_rows(microbatch.manifest)
            for j, (dp, lane) in enumerate(pairs):
                if lane in step.lane_digest:
                    table[i, j] = known.get((dp, lane), 0)
    return table


def _difference(
    step: StepData, lanes: list[int], layout: Layout, control: dist.ProcessGroup
) -> str:
    """Where the readers of some lanes part, in words. Collective over the world."""
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
        f"the encoder and the language model read other samples for lanes "
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
                (entry.encoder_rank, entry.start, entry.rows)
                for entry in microbatch.manifest
                if entry.lane == lane and start <= (entry.sequence, entry.start) < end
            )
            yield _Reading(microbatch.index, i, start[1], key, rows)
