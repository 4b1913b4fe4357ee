"""The part of a step's data that a rank needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.topology import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRole:
    """The part of a module's items that a rank needs.

    Attributes:
        rank: Number of the module's dp rank that this rank belongs to; None outside its grid.
        serving: Lane -> dp ranks of the module that serve it, for the lanes that this rank reads.
    """

    rank: int | None
    serving: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRole:
    """The part of a step that a rank needs.

    Attributes:
        lanes: Numbers of the lanes that the rank reads, ascending.
        num_lanes: Number of all lanes.
        text_lane: Number of the lane whose tokens the rank needs; None outside the target's grid.
        sources: Module -> part of its items that the rank needs, for every module that feeds the
            target; empty for a language model alone, which treats placeholders as other tokens.
    """

    lanes: tuple[int, ...]
    num_lanes: int
    text_lane: int | None
    sources: Mapping[str, SourceRole]

    @property
    def runs(self) -> tuple[str, ...]:
        """Modules of which it runs a stage: it reads the content only of their items."""
        return tuple(name for name, source in self.sources.items() if source.rank is not None)


def data_role(layout: Layout, rank: int) -> DataRole:
    """The part of a step's data that a rank needs.

    Args:
        layout: The grids of all modules, and the edges between them.
        rank: Global rank.
    """
    lanes: set[int] = set()
    text_lane = None
    runs: dict[str, int | None] = {}
    for source in layout.sources:
        here = source.coordinates(rank).dp if rank in source.ranks else None
        runs[source.name] = here
        if here is not None:
            lanes.update(layout.served(source.name, here))
    if rank in layout.target.ranks:
        text_lane = layout.target.coordinates(rank).dp
        lanes.add(text_lane)
    return DataRole(
        lanes=tuple(sorted(lanes)),
        num_lanes=layout.num_lanes,
        text_lane=text_lane,
        sources={
            name: SourceRole(
                rank=here, serving={lane: layout.serving(name, lane) for lane in sorted(lanes)}
            )
            for name, here in runs.items()
        },
    )


def equal_readers(roles: Sequence[DataRole]) -> tuple[tuple[int, ...], ...]:
    """Groups of ranks that need the same data: the tp, cp and pp peers of a replica.

    Args:
        roles: Data role of every rank.

    Returns:
        Groups that have every rank once, ascending in each group and by their first ranks.
    """
    groups: list[tuple[DataRole, list[int]]] = []
    for rank, role in enumerate(roles):
        for known, ranks in groups:
            if known == role:
                ranks.append(rank)
                break
        else:
            groups.append((role, [rank]))
    return tuple(tuple(ranks) for _, ranks in groups)
