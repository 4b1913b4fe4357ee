"""A model of one weight per stage whose rows carry names, so that a misplaced one shows."""

from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.topology import Layout, ModuleGridSpec, SequenceSharding

WIDTH = 3
SEQ_LENGTH = 48


def grids(encoder: dict[str, int] | None, llm: dict[str, int], colocated: bool = False) -> Layout:
    """Two grids side by side, or over the same ranks."""
    first = None if encoder is None else ModuleGridSpec(name="encoder", **encoder)
    offset = 0 if colocated or first is None else first.size
    second = ModuleGridSpec(name="llm", offset=offset, **llm)
    return Layout(encoder=first, llm=second, world_size=second.ranks.stop)


def sharding_of(layout: Layout, sequence_parallel: bool) -> SequenceSharding:
    llm = layout.llm
    return SequenceSharding(
        seq_length=SEQ_LENGTH, cp=llm.cp, tp=llm.tp, sequence_parallel=sequence_parallel
    )


def manifests(layout: Layout, num_microbatches: int) -> list[Manifest]:
    """Two sequences a lane; images of uneven sizes; lanes, microbatches and shards without any."""
    if layout.encoder is None:
        return [()] * num_microbatches
    made = []
    for m in range(num_microbatches):
        entries = []
        for lane in range(layout.num_lanes):
            serving = layout.serving(lane)
            if (m + lane) % 3 == 2:
                continue
            images = ((0, 1, 5), (0, 9, 0), (0, 20, 1), (1, 2, 40))
            # In every other microbatch the lane has rows, but few of its shards do.
            for i, (sequence, start, rows) in enumerate(images[: 1 if m % 2 else None]):
                dp = serving[(i + m) % len(serving)]
                entries.append(ManifestEntry(lane, dp, rows, sequence, start))
        made.append(tuple(entries))
    return made


def name_of(entry: ManifestEntry, row: int, m: int) -> float:
    """A number that no other row of the step has."""
    return 1 + m + entry.lane / 4 + entry.sequence / 16 + (entry.start + row) / 1024
