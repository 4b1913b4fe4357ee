"""Which dp rank of a source runs which item, so that every rank has about as much to do.

The costs of items differ by orders of magnitude, and lanes have many of them or none, so that the
ranks that serve a lane (`Layout.serving`) may have several times the mean. `assign_balanced` shares
out the items of all lanes of a *domain*: dp ranks that may run each other's items. It is a pure
function of integers that all ranks of the domain know, so that all find the same.

An item is at *home* on a dp rank that has its content. Another rank can run it only after its
content was sent there, so that items stay at home as long as no rank has too much:

1. Every item starts at home; of several homes, at that with the least to do.
2. A rank has too much above its *capacity*: 1/40 more than the mean, or than the largest item,
   which no assignment can divide. Such a rank gives away items whose bytes are few.
3. Items that were given away go to the ranks with the least to do, the largest first.
   Among ranks with room, what they had to do earlier in the step counts too.
4. Where a rank still has too much, since the last items were large, it passes on an item or
   exchanges two, as long as twice the bytes that were given away are enough.

What is known of the result, for m ranks and items of which each has at most one home:

- *Bytes* are at most four times the least with which any assignment stays within the capacity: each
  overloaded rank has to send away items worth its excess, of which step 2 finds a set of at most
  twice the least bytes, and step 4 ends with twice these at most.
- *Balance*: the busiest rank has at most the capacity, or mean + (1 - 1/m) largest where that is
  more (Graham 1969, "Bounds on multiprocessing timing anomalies"): three equal items on two ranks
  are 4/3 of the mean however they are assigned. The more items a rank has, the closer to the
  capacity it is.
- Nothing moves where every rank is within the capacity.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megatron_mimo.topology.layout import Domain, Layout

_SLACK = 40
"""One part in so many by which a rank may exceed the mean, or the largest item."""
_PARTNERS = 16
"""Number of ranks with which an overloaded rank tries to exchange items."""


def dispatch_domains(layout: Layout, source: str, group_size: int | None) -> tuple[Domain, ...]:
    """The dp ranks of a source in blocks, with the lanes that each block serves.

    Args:
        layout: Grids of all modules.
        source: Name of a module that feeds the target.
        group_size: Number of consecutive dp ranks of a block, of which the last may have fewer;
            None for one block of all.

    Raises:
        ValueError: A block would have no rank, or two blocks would serve one lane.
    """
    grid = layout.modules[source]
    size = grid.dp if group_size is None else group_size
    if size < 1:
        raise ValueError(f"groups of {size} dp ranks of {source}: expected at least 1")
    for lane in range(layout.num_lanes):
        serving = layout.serving(source, lane)
        if serving[0] // size != serving[-1] // size:
            raise ValueError(
                f"{source} dp ranks {serving[0]} to {serving[-1]} serve lane {lane} together, and "
                f"groups of {size} dp ranks divide them: expected a group size that keeps the "
                f"ranks of a lane together, such as "
                f"{', '.join(map(str, _fitting(layout, source)))}"
            )
    return tuple(
        Domain(block, tuple(sorted({lane for dp in block for lane in layout.served(source, dp)})))
        for start in range(0, grid.dp, size)
        if (block := tuple(range(start, min(start + size, grid.dp))))
    )


def balanced(layout: Layout, group_size: int | None = None) -> Layout:
    """A layout whose sources run the items of their domains, where they have several dp ranks.

    Args:
        layout: Grids of all modules.
        group_size: Number of consecutive dp ranks of a domain; None for one domain of all.

    Raises:
        ValueError: A domain would have no rank, or two domains would serve one lane.
    """
    domains = {
        source.name: dispatch_domains(layout, source.name, group_size)
        for source in layout.sources
        if source.dp > 1
    }
    return replace(layout, domains=domains)


def _fitting(layout: Layout, source: str) -> Iterator[int]:
    """The group sizes that keep the ranks of every lane together."""
    lanes = [layout.serving(source, lane) for lane in range(layout.num_lanes)]
    for size in range(1, layout.modules[source].dp + 1):
        if all(serving[0] // size == serving[-1] // size for serving in lanes):
            yield size


def capacity(costs: Iterable[int], num_ranks: int) -> int:
    """The most that a rank should have to do: 1/40 more than the mean or the largest item.

    Args:
        costs: Cost of each item in operations.
        num_ranks: Number of ranks that run them.
    """
    costs = tuple(costs)
    fair = max(-(-sum(costs) // num_ranks), max(costs, default=0))
    return fair + fair // _SLACK


def assign_balanced(
    costs: Sequence[int],
    nbytes: Sequence[int],
    homes: Sequence[tuple[int, ...]],
    ranks: Sequence[int],
    earlier: Sequence[int] = (),
) -> tuple[int, ...]:
    """Which dp rank runs each item, so that all have about as much to do and few bytes move.

    The same on every rank: ties are decided by the order of items and of ranks.

    Args:
        costs: Cost of each item in operations, at least 0.
        nbytes: Size of each item's content in bytes, at least 0.
        homes: The dp ranks that have each item's content. An item without one among `ranks` is
            moved in any case.
        ranks: The dp ranks that may run the items; at least one.
        earlier: What each of `ranks` had to do in earlier microbatches of the step, by which ranks
            are chosen among those with room, so that the step is balanced too; empty for nothing.

    Raises:
        ValueError: The sequences differ in length, or there is no rank.
    """
    if not len(costs) == len(nbytes) == len(homes) or len(earlier) not in (0, len(ranks)):
        raise ValueError(
            f"{len(costs)} costs, {len(nbytes)} sizes and {len(homes)} homes: expected one of each "
            f"for every item, and of {len(earlier)} earlier costs none, or one for every rank"
        )
    if not ranks:
        raise ValueError(f"{len(costs)} items and no rank that runs them: expected at least one")
    limit = capacity(costs, len(ranks))
    load = dict.fromkeys(ranks, 0)
    before = dict(zip(ranks, earlier, strict=True)) if earlier else load.copy()
    at, homeless = _at_home(costs, homes, load, before)
    held: dict[int, list[int]] = {rank: [] for rank in ranks}
    for item, rank in enumerate(at):
        if rank is not None:
            held[rank].append(item)
    given = list(homeless)
    for rank in ranks:
        if load[rank] > limit:
            away = _least_bytes(held[rank], costs, nbytes, load[rank] - limit)
            load[rank] -= sum(costs[item] for item in away)
            given += away
    if not given:
        return tuple(rank for rank in at if rank is not None)
    assignment = _Assignment(
        costs=costs,
        nbytes=nbytes,
        homes=homes,
        limit=limit,
        load=load,
        before=before,
        at=[ranks[0] if rank is None else rank for rank in at],
    )
    assignment.deal(sorted(given))
    away = [item for item in given if assignment.at[item] not in homes[item]]
    assignment.exchange(
        2 * sum(nbytes[item] for item in given) - sum(nbytes[item] for item in away)
    )
    return tuple(assignment.at)


def _at_home(
    costs: Sequence[int],
    homes: Sequence[tuple[int, ...]],
    load: dict[int, int],
    before: Mapping[int, int],
) -> tuple[list[int | None], list[int]]:
    """The home at which each item starts, None for items without one; and these items.

    Args:
        costs: Cost of each item.
        homes: The dp ranks that have each item's content.
        load: What each rank has to do; that of the items is added.
        before: What it had to do earlier.
    """
    at: list[int | None] = [None] * len(costs)
    several, homeless = [], []
    for item, has in enumerate(homes):
        if len(has) == 1 and has[0] in load:
            at[item] = has[0]
            load[has[0]] += costs[item]
        elif any(rank in load for rank in has):
            several.append(item)
        else:
            homeless.append(item)
    for item in sorted(several, key=lambda item: -costs[item]):
        here = [rank for rank in homes[item] if rank in load]
        at[item] = rank = min(here, key=lambda rank: (load[rank], before[rank]))
        load[rank] += costs[item]
    return at, homeless


def _least_bytes(
    items: Sequence[int], costs: Sequence[int], nbytes: Sequence[int], excess: int
) -> list[int]:
    """Items worth an excess, whose bytes are at most twice the least with which that is possible.

    The greedy method of Csirik et al. 1991, "Heuristics for the 0-1 min-knapsack problem": items
    are taken by their bytes for each operation as long as they are worth less than the excess, and
    each item that would reach it completes a candidate, of which the one with the fewest bytes is
    the result.

    Args:
        items: Items of a rank.
        costs: Cost of each item.
        nbytes: Size of each item in bytes.
        excess: Cost that the items must reach together, more than 0.
    """
    taken: list[int] = []
    rest, size = excess, 0
    best: tuple[int, int, int, int] | None = None
    by_density = sorted((nbytes[item] / costs[item], item) for item in items if costs[item])
    for _, item in by_density:
        cost = costs[item]
        if cost < rest:
            taken.append(item)
            rest -= cost
            size += nbytes[item]
        elif best is None or size + nbytes[item] <= best[0]:
            # Of equal bytes, what leaves the rank the most to do.
            found = (size + nbytes[item], cost - rest, item, len(taken))
            best = found if best is None else min(best, found)
    assert best is not None, f"items {items} are not worth {excess}"
    _, _, last, number = best
    chosen = [*taken[:number], last]
    # What the last item makes superfluous stays.
    over = sum(costs[item] for item in chosen) - excess
    for item in sorted(chosen, key=lambda item: (-nbytes[item], item)):
        if costs[item] <= over:
            chosen.remove(item)
            over -= costs[item]
    return chosen


class _Change(NamedTuple):
    """An item that an overloaded rank passes on, and one that it gets in return.

    Attributes:
        busier: The more to do of the two ranks, afterwards.
        nbytes: Number of bytes that move in addition; negative where an item returns home.
        item: The item.
        partner: The rank that gets it.
        back: The item in return, if any; at most one.
    """

    busier: int
    nbytes: int
    item: int
    partner: int
    back: tuple[int, ...] = ()


@dataclass(kw_only=True, slots=True)
class _Assignment:
    """An assignment that is being made.

    Attributes:
        costs: Cost of each item.
        nbytes: Size of each item in bytes.
        homes: The dp ranks that have each item's content.
        limit: What a rank should have to do at most.
        load: What each rank has to do.
        before: What it had to do earlier.
        at: The rank of each item.
        held: Cost and number of the items of each rank, ascending; empty until `exchange`.
    """

    costs: Sequence[int]
    nbytes: Sequence[int]
    homes: Sequence[tuple[int, ...]]
    limit: int
    load: dict[int, int]
    before: Mapping[int, int]
    at: list[int]
    held: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def deal(self, given: Iterable[int]) -> None:
        """Give items to the ranks with the least to do, the largest first.

        An item that finds room at home goes there. Elsewhere, too, what a rank had to do earlier
        counts as long as it has room now.
        """
        load, costs, before = self.load, self.costs, self.before
        heap = [(before[rank] + load[rank], place, rank) for place, rank in enumerate(load)]
        heapq.heapify(heap)
        for item in sorted(given, key=lambda item: -costs[item]):
            cost = costs[item]
            most = self.limit - cost
            room = [rank for rank in self.homes[item] if load.get(rank, most + 1) <= most]
            if room:
                rank = min(room, key=load.__getitem__)
            else:
                while heap[0][0] != before[heap[0][2]] + load[heap[0][2]]:
                    # Its rank has got an item in another way.
                    _, place, rank = heap[0]
                    heapq.heapreplace(heap, (before[rank] + load[rank], place, rank))
                rank = heap[0][2]
                if load[rank] > most:
                    rank = self._with_room(most)
            self.at[item] = rank
            load[rank] += cost

    def _with_room(self, most: int) -> int:
        """Of the ranks with this much to do at most, the one with the least in all."""
        load, before = self.load, self.before
        room = [rank for rank, work in load.items() if work <= most]
        if not room:
            # It will have too much, wherever the item goes.
            return min(load, key=load.__getitem__)
        return min(room, key=lambda rank: before[rank] + load[rank])

    def exchange(self, budget: int) -> None:
        """Let ranks above the limit pass on or exchange items, as long as that helps.

        Args:
            budget: Number of bytes that may move in addition.
        """
        if max(self.load.values()) <= self.limit:
            return
        self.held = {rank: [] for rank in self.load}
        for item, rank in enumerate(self.at):
            self.held[rank].append((self.costs[item], item))
        for items in self.held.values():
            items.sort()
        # Each change makes the busiest rank less busy, so that there are few; the number is bounded
        # all the same, for the time that a plan may take.
        for _ in range(4 * len(self.load)):
            rank = max(self.load, key=self.load.__getitem__)
            if self.load[rank] <= self.limit:
                return
            partners = heapq.nsmallest(_PARTNERS, self.load, key=self.load.__getitem__)
            found = [
                change
                for partner in partners
                if partner != rank
                for change in self._changes(rank, partner)
                if change.nbytes <= budget
            ]
            if not found:
                return
            # Among changes after which neither rank has too much, the one that moves the least.
            best = min(found, key=lambda each: (max(each.busier, self.limit), each.nbytes, each))
            budget -= best.nbytes
            self._move(best.item, best.partner)
            for item in best.back:
                self._move(item, rank)

    def _changes(self, rank: int, partner: int) -> Iterator[_Change]:
        """What makes the busier of two ranks less busy."""
        mine, other = self.load[rank], self.load[partner]
        partners = self.held[partner]
        for cost, item in self.held[rank]:
            there = self._moved(item, rank, partner)
            if other + cost < mine:
                yield _Change(max(mine - cost, other + cost), there, item, partner)
            # In return, the item with which both have as much; the one below, and the one above.
            wanted = bisect_left(partners, (cost - (mine - other) // 2, 0))
            for back_cost, back in partners[max(wanted - 1, 0) : wanted + 1]:
                change = cost - back_cost
                if 0 < change < mine - other:
                    busier = max(mine - change, other + change)
                    both_ways = there + self._moved(back, partner, rank)
                    yield _Change(busier, both_ways, item, partner, (back,))

    def _moved(self, item: int, source: int, target: int) -> int:
        """Number of bytes that move in addition if an item goes to another rank."""
        has = self.homes[item]
        return self.nbytes[item] * ((target not in has) - (source not in has))

    def _move(self, item: int, target: int) -> None:
        source, entry = self.at[item], (self.costs[item], item)
        self.held[source].remove(entry)
        insort(self.held[target], entry)
        self.load[source] -= entry[0]
        self.load[target] += entry[0]
        self.at[item] = target
