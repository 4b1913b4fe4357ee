"""Random layouts, sequences and manifests; shared by the tests of plans."""

from dataclasses import dataclass, replace
from itertools import pairwise

from hypothesis import strategies as st

from megatron_mimo.bridge.manifest import Documents, Manifest, ManifestEntry
from megatron_mimo.topology import Layout, ModuleGridSpec, SequenceSharding, assign_items, balanced


@dataclass(frozen=True)
class Case:
    layout: Layout
    sharding: SequenceSharding
    manifest: Manifest
    documents: Documents

    def holders(self, encoder_rank: int) -> list[int]:
        """Ranks that hold the rows of a dp rank of the source."""
        grid = self.layout.modules["encoder"]
        return [
            rank
            for rank in grid.ranks
            if (place := grid.coordinates(rank)).dp == encoder_rank and place.pp == grid.pp - 1
        ]

    def users(self) -> list[int]:
        """Ranks of the language model's first stage."""
        llm = self.layout.target
        return [rank for rank in llm.ranks if llm.coordinates(rank).pp == 0]

    def uses(self, rank: int) -> list[tuple[int, int]]:
        """Rows that a rank of the language model uses: (entry, row), in order."""
        place = self.layout.target.coordinates(rank)
        shard = self.sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
        cut = self.sharding.of(self.documents.get(place.dp, ()))
        mine = {p for start, stop in cut.intervals(shard) for p in range(start, stop)}
        return [
            (index, row)
            for index, entry in enumerate(self.manifest)
            if entry.module == "encoder" and entry.lane == place.dp
            for row in range(entry.rows)
            if entry.start + row in mine
        ]

    def produces(self, encoder_rank: int) -> list[tuple[int, int]]:
        """Rows of an encoder dp rank: (entry, row), in order."""
        return [
            (index, row)
            for index, entry in enumerate(self.manifest)
            if entry.module == "encoder" and entry.source_rank == encoder_rank
            for row in range(entry.rows)
        ]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Grids of any sizes anywhere, whose items run by their lanes or anywhere."""
    layout = draw(grids())
    return balanced(layout) if draw(st.booleans()) else layout


@st.composite
def grids(draw: st.DrawFn) -> Layout:
    """Grids of any sizes, apart, over the same ranks or over some of them."""
    small = st.integers(1, 3)
    encoder = ModuleGridSpec(
        name="encoder",
        dp=draw(st.integers(1, 5)),
        tp=draw(small),
        cp=draw(st.integers(1, 2)),
        pp=draw(st.integers(1, 2)),
    )
    if draw(st.booleans()):
        sizes = [
            (tp, cp, pp, encoder.size // (tp * cp * pp))
            for tp in range(1, 5)
            for cp in range(1, 4)
            for pp in range(1, 3)
            if encoder.size % (tp * cp * pp) == 0
        ]
        tp, cp, pp, dp = draw(st.sampled_from(sizes))
        llm = ModuleGridSpec(name="llm", tp=tp, cp=cp, pp=pp, dp=dp)
        return Layout.of(encoder, llm, world_size=encoder.size)
    llm = ModuleGridSpec(
        name="llm",
        offset=draw(st.sampled_from((encoder.size, encoder.size, encoder.size // 2, 0))),
        dp=draw(st.integers(1, 5)),
        tp=draw(small),
        cp=draw(small),
        pp=draw(st.integers(1, 2)),
    )
    return Layout.of(encoder, llm, world_size=max(encoder.size, llm.ranks.stop))


@st.composite
def cases(draw: st.DrawFn, arbitrary: bool | None = None) -> Case:
    """A layout with sequences and items in them, some without rows."""
    layout = draw(layouts())
    llm, replicas = layout.target, layout.modules["encoder"].dp
    sharding = SequenceSharding(
        seq_length=2 * llm.cp * llm.tp * draw(st.integers(1, 8)),
        cp=llm.cp,
        tp=llm.tp,
        sequence_parallel=draw(st.booleans()),
        packed=draw(st.booleans()),
    )
    documents: dict[int, tuple[int, ...]] = {}
    anywhere = draw(st.booleans()) if arbitrary is None else arbitrary
    entries = []
    for lane in range(layout.num_lanes):
        images: list[tuple[int, int, int]] = []
        if sharding.packed:
            bounds = draw(st.lists(st.integers(0, sharding.seq_length), max_size=4).map(sorted))
            bounds = [0, *bounds, sharding.seq_length]
            documents[lane] = tuple(b - a for a, b in pairwise(bounds))
        for sequence in range(draw(st.integers(0, 1 if sharding.packed else 3))):
            cuts = draw(st.lists(st.integers(0, sharding.seq_length), max_size=6).map(sorted))
            images += [
                (sequence, start, stop - start)
                for start, stop in zip(cuts[::2], cuts[1::2], strict=False)
            ]
        runners = range(replicas) if anywhere else layout.runners("encoder", lane)
        assigned = (
            tuple(draw(st.sampled_from(runners)) for _ in images)
            if anywhere or layout.domains
            else assign_items(len(images), layout.serving("encoder", lane), draw(st.integers(0, 7)))
        )
        for encoder_rank, (sequence, start, rows) in zip(assigned, images, strict=True):
            mine = ManifestEntry(
                module="encoder",
                source_rank=encoder_rank,
                lane=lane,
                rows=rows,
                sequence=sequence,
                start=start,
            )
            # Another module's rows are none of this bridge's business, wherever they stand.
            other = replace(mine, module="audio", rows=draw(st.integers(0, 3)))
            entries += [mine, other] if draw(st.booleans()) else [mine]
    return Case(layout, sharding, tuple(entries), documents)
