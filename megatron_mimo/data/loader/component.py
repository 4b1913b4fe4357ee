"""Which ranks that read decide together who runs an item; pure functions of integers.

Dp ranks of a domain may run each other's items, so that whoever reads a lane of the domain must
know of all its items. Ranks that read several lanes, and domains of several sources, tie lanes
together: a *component* has all lanes that are tied, and every rank that reads for them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.data.role import DataRole, equal_readers
from megatron_mimo.topology import Domain, Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """Lanes that are tied together, and the ranks that read them.

    Attributes:
        lanes: Numbers of the lanes, ascending.
        roles: Rank -> its part of a step, for every rank that reads a lane for itself and its
            peers, ascending.
        domains: Source -> its domains that have these lanes, for sources whose items are shared
            out by their cost.
        readers_of: (source, dp rank) -> ranks that read for that dp rank, ascending.
        homes: (source, lane) -> the dp ranks that have the content of the lane's items on all of
            their ranks, ascending.
        tellers: (source, lane) -> the rank that tells the others of the source's items in the lane,
            whose content it has.
    """

    lanes: tuple[int, ...]
    roles: Mapping[int, DataRole]
    domains: Mapping[str, tuple[Domain, ...]]
    readers_of: Mapping[tuple[str, int], tuple[int, ...]]
    homes: Mapping[tuple[str, int], tuple[int, ...]]
    tellers: Mapping[tuple[str, int], int]

    @property
    def readers(self) -> tuple[int, ...]:
        """The ranks that read, ascending."""
        return tuple(self.roles)

    @property
    def movers(self) -> tuple[int, ...]:
        """The ranks that read and may have to send the content of items, or to receive it."""
        return tuple(sorted({rank for ranks in self.readers_of.values() for rank in ranks}))

    def speaker(self, lane: int) -> int:
        """The rank that tells the others of a lane's samples."""
        return next(rank for rank, role in self.roles.items() if lane in role.lanes)


def components(layout: Layout, roles: Sequence[DataRole]) -> tuple[Component, ...]:
    """The components of a layout, by their first lanes; none where no source has domains.

    Args:
        layout: The grids of all modules.
        roles: Data role of every rank.
    """
    if not layout.domains:
        return ()
    reading = {ranks[0]: roles[ranks[0]] for ranks in equal_readers(roles)}
    ties = [role.lanes for role in reading.values()]
    ties += [domain.lanes for domains in layout.domains.values() for domain in domains]
    return tuple(_component(layout, reading, lanes) for lanes in _tied(ties))


def _component(
    layout: Layout, reading: Mapping[int, DataRole], lanes: tuple[int, ...]
) -> Component:
    """The component of some lanes.

    Args:
        layout: The grids of all modules.
        reading: Rank -> its part of a step, for every rank that reads.
        lanes: Numbers of the lanes, ascending.
    """
    roles = {
        rank: role
        for rank, role in sorted(reading.items())
        if not set(role.lanes).isdisjoint(lanes)
    }
    domains = {
        source: tuple(domain for domain in of_source if not set(domain.lanes).isdisjoint(lanes))
        for source, of_source in layout.domains.items()
    }
    readers_of: dict[tuple[str, int], tuple[int, ...]] = {}
    homes: dict[tuple[str, int], tuple[int, ...]] = {}
    tellers: dict[tuple[str, int], int] = {}
    for source, of_source in domains.items():
        for dp in (dp for domain in of_source for dp in domain.ranks):
            readers_of[source, dp] = tuple(
                rank for rank, role in roles.items() if role.sources[source].rank == dp
            )
        for domain in of_source:
            for lane in domain.lanes:
                homes[source, lane] = tuple(
                    dp
                    for dp in domain.ranks
                    if all(lane in roles[rank].lanes for rank in readers_of[source, dp])
                )
                tellers[source, lane] = readers_of[source, layout.serving(source, lane)[0]][0]
    return Component(
        lanes=lanes,
        roles=roles,
        domains=domains,
        readers_of=readers_of,
        homes=homes,
        tellers=tellers,
    )


def _tied(ties: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """Sets of numbers of which some tie has two; each ascending, in the order of the first."""
    sets: list[set[int]] = []
    for tie in ties:
        together = set(tie)
        for other in [known for known in sets if known & together]:
            sets.remove(other)
            together |= other
        sets.append(together)
    return sorted(tuple(sorted(each)) for each in sets)
