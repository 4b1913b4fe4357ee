"""Which ranks of a layout do the same, so that one of them can stand for all; integers only."""

from collections.abc import Hashable
from dataclasses import dataclass

from megatron_mimo.topology import Layout
from megatron_mimo.topology.spec import GridCoordinates


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """Ranks whose tensors and messages have the same shapes, but for what follows from the data.

    Attributes:
        name: What they hold, in words: "llm stage 1 of 2, cp 0".
        ranks: Global ranks, ascending; the first one stands for all.
    """

    name: str
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The rank that stands for all."""
        return self.ranks[0]

    def __str__(self) -> str:
        more = "" if len(self.ranks) == 1 else f", as {len(self.ranks)} ranks"
        return f"{self.name} (rank {self.rank}{more})"


def distinct_roles(layout: Layout) -> tuple[Role, ...]:
    """The roles of a layout, in the order of their first ranks; each rank is in one.

    Ranks share a role where they hold the same stages, serve as many lanes or are served by as many
    replicas, and have the same place along cp, whose chunks of
    a sequence see different numbers of keys. Places along tp, ep and dp do not count: their shards
    have equal sizes. They change how many rows of the data a rank gets, and where a bucket of the
    optimizer is not full.

    Args:
        layout: The grids of all modules.
    """
    found: dict[Hashable, list[int]] = {}
    for rank in range(layout.world_size):
        found.setdefault(_shapes(layout, rank), []).append(rank)
    groups = [tuple(ranks) for ranks in found.values()]
    names = [_name(layout, ranks[0]) for ranks in groups]
    longer = [_name(layout, ranks[0], with_counts=True) for ranks in groups]
    return tuple(
        Role(name=name if names.count(name) == 1 else long, ranks=ranks)
        for name, long, ranks in zip(names, longer, groups, strict=True)
    )


def _shapes(layout: Layout, rank: int) -> Hashable:
    """What the shapes of a rank follow from."""
    parts: list[Hashable] = []
    for name, grid in layout.modules.items():
        if rank in grid.ranks:
            place = grid.coordinates(rank)
            parts.append((name, place.pp, place.cp, _neighbours(layout, name, place)))
    if len(layout.stages_of(rank)) > 1:
        parts.append(_own_rows(layout, rank))
    return tuple(parts)


def _neighbours(layout: Layout, module: str, place: GridCoordinates) -> tuple[int, ...]:
    """Numbers of the replicas at the other end of each edge that a stage of a module works for."""
    if module != layout.target.name:
        return (len(layout.served(module, place.dp)),)
    if place.pp > 0:
        return ()
    return tuple(len(layout.serving(source.name, place.dp)) for source in layout.sources)


def _own_rows(layout: Layout, rank: int) -> tuple[bool, ...]:
    """Whether a rank of overlapping grids serves its own lane, for each source that it holds."""
    if rank not in layout.target.ranks:
        return ()
    lane = layout.target.coordinates(rank).dp
    return tuple(
        source.coordinates(rank).dp in layout.serving(source.name, lane)
        for source in layout.sources
        if rank in source.ranks
    )


def _name(layout: Layout, rank: int, *, with_counts: bool = False) -> str:
    parts = []
    for module, stage in layout.stages_of(rank):
        grid = layout.modules[module]
        place = grid.coordinates(rank)
        text = module if grid.pp == 1 else f"{module} stage {stage} of {grid.pp}"
        if grid.cp > 1:
            text += f", cp {place.cp}"
        counts = _neighbours(layout, module, place)
        if with_counts and counts:
            verb = "served by" if module == layout.target.name else "serving"
            text += f", {verb} {' and '.join(map(str, counts))}"
        parts.append(text)
    return " and ".join(parts)
