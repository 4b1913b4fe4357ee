"""A model of one weight per stage whose rows carry names, so that a misplaced one shows."""

from collections.abc import Iterable

from hypothesis import strategies as st

from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.topology import Layout, ModuleGridSpec, SequenceSharding, balanced

WIDTH = 3
SEQ_LENGTH = 48

# (sequence, start, rows) of a lane's items, for the first source, the second and so on.
_ITEMS = (
    ((0, 1, 5), (0, 9, 0), (0, 20, 1), (1, 2, 40)),
    ((0, 22, 7), (1, 0, 2)),
    ((0, 30, 8), (1, 42, 3)),
    ((0, 39, 9), (1, 46, 2)),
)


def grids(encoder: dict[str, int] | None, llm: dict[str, int], colocated: bool = False) -> Layout:
    """Two grids side by side, or over the same ranks."""
    if encoder is None:
        return Layout.of(target := ModuleGridSpec(name="llm", **llm), world_size=target.size)
    first = ModuleGridSpec(name="encoder", **encoder)
    second = ModuleGridSpec(name="llm", offset=0 if colocated else first.size, **llm)
    return Layout.of(first, second, world_size=second.ranks.stop)


def modules(**sizes: dict[str, int]) -> Layout:
    """Any number of grids by name, with their offsets; the last is fed by all others."""
    specs = [ModuleGridSpec(name=name, **axes) for name, axes in sizes.items()]
    return Layout.of(*specs, world_size=max(spec.ranks.stop for spec in specs))


def sharding_of(layout: Layout, sequence_parallel: bool) -> SequenceSharding:
    llm = layout.target
    return SequenceSharding(
        seq_length=SEQ_LENGTH, cp=llm.cp, tp=llm.tp, sequence_parallel=sequence_parallel
    )


def manifests(layout: Layout, num_microbatches: int) -> list[Manifest]:
    """Two sequences a lane; items of uneven sizes; lanes, microbatches and shards without any."""
    made = []
    for m in range(num_microbatches):
        entries = []
        for lane in range(layout.num_lanes):
            for number, source in enumerate(layout.sources):
                serving = layout.runners(source.name, lane)
                if (m + lane + number) % 3 == 2:
                    continue
                # In every other microbatch the lane has rows, but few of its shards do.
                for i, (sequence, start, rows) in enumerate(_ITEMS[number][: 1 if m % 2 else None]):
                    entries.append(
                        ManifestEntry(
                            module=source.name,
                            source_rank=serving[(i + m) % len(serving)],
                            lane=lane,
                            rows=rows,
                            sequence=sequence,
                            start=start,
                        )
                    )
        made.append(tuple(sorted(entries, key=lambda e: (e.lane, e.sequence, e.start))))
    return made


def name_of(entry: ManifestEntry, row: int, m: int) -> float:
    """A number that no other row of the step has."""
    return 1 + m + entry.lane / 4 + entry.sequence / 16 + (entry.start + row) / 1024


def flow_of(returning: Iterable[str] = (), inside: Iterable[str] = ()) -> GradientFlow:
    """Which boundaries gradients cross."""
    return GradientFlow(returning=frozenset(returning), inside=frozenset(inside))


@st.composite
def random_graphs(draw: st.DrawFn, most: int = 5) -> tuple[Layout, GradientFlow]:
    """Up to `most` modules of any sizes, anywhere in one world, and which of them train."""
    names = [f"source{k}" for k in range(draw(st.integers(0, most - 1)))] + ["llm"]
    specs = []
    for name in names:
        sizes = {axis: draw(st.integers(1, 3)) for axis in ("pp", "dp")}
        spec = ModuleGridSpec(name=name, tp=draw(st.integers(1, 2)), **sizes)
        # Behind the ranks that are in use so far, or over some of them, so that none is left out.
        end = max((other.ranks.stop for other in specs), default=0)
        offset = draw(st.integers(0, end))
        specs.append(ModuleGridSpec(name=name, tp=spec.tp, offset=offset, **sizes))
    returning = {name for name in names[:-1] if draw(st.booleans())}
    inside = {name for name in sorted(returning) if draw(st.booleans())}
    world = max(spec.ranks.stop for spec in specs)
    layout = Layout.of(*specs, world_size=world)
    if draw(st.booleans()):
        layout = balanced(layout)
    return layout, flow_of(returning, inside)
