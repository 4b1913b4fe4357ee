"""Which samples share a sequence; integers only."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

Group = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What becomes of the samples of a full buffer.

    Attributes:
        leaving: Groups that go out, as indices into the buffer; by their first samples, ascending,
            so that their order says nothing of lengths.
        held: Indices of the group that waits for the next round; empty when none does.
    """

    leaving: tuple[Group, ...]
    held: Group


def pack(lengths: Sequence[int], capacity: int, started: int = 0) -> list[Group]:
    """Share samples out to few groups: best fit decreasing, or first fit where that needs fewer.

    Takes O(n log n) comparisons for n samples; the same input gives the same groups.

    Args:
        lengths: Tokens of each sample.
        capacity: Tokens of a group, at most.
        started: The first so many samples are together already, in the first group.

    Returns:
        Indices into `lengths`, ascending in each group; groups in the order they were begun. Never
        more than first fit decreasing makes.

    Raises:
        ValueError: A sample is longer than the capacity, or those that are together are.
    """
    begun = sum(lengths[:started])
    if max(lengths, default=0) > capacity or begun > capacity or min(lengths, default=0) < 0:
        raise ValueError(
            f"samples of {min(lengths)} to {max(lengths)} tokens, {begun} tokens of them together "
            f"already, do not fit into groups of {capacity}"
        )
    groups = _fit_decreasing(lengths, capacity, started, _BestFit)
    # No packing needs fewer than the sum asks for, so the other one is seldom tried.
    if len(groups) > -(-sum(lengths) // capacity):
        others = _fit_decreasing(lengths, capacity, started, _FirstFit)
        if len(others) < len(groups):
            groups = others
    return [tuple(sorted(group)) for group in groups]


def plan_round(lengths: Sequence[int], capacity: int, started: int) -> Round:
    """Pack a full buffer, and hold the emptiest group back for the next one to fill.

    A buffer seldom fills its last group; without holding it back the share of padding would be
    half a sequence in each round. What was held back once goes out now, so that no sample waits
    for longer than a round.

    Args:
        lengths: Tokens of each sample of the buffer.
        capacity: Tokens of a sequence.
        started: The first so many samples were held back by the last round.
    """
    groups = pack(lengths, capacity, started)
    free = groups[1:] if started else groups
    if len(groups) < 2 or not free:
        return Round(tuple(sorted(groups)), ())
    held = min(free, key=lambda group: sum(lengths[i] for i in group))
    return Round(tuple(sorted(group for group in groups if group is not held)), held)


class _BestFit:
    """Groups by the room that they have left, ascending."""

    def __init__(self) -> None:
        self._rooms: list[tuple[int, int]] = []

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove the group with the least room that suffices: (room, group)."""
        at = bisect_left(self._rooms, (length, -1))
        return self._rooms.pop(at) if at < len(self._rooms) else None

    def put(self, room: int, group: int) -> None:
        """A group with its room."""
        insort(self._rooms, (room, group))


class _FirstFit:
    """Groups in the order they were begun, under a tree of the largest rooms."""

    def __init__(self) -> None:
        self._size = 1
        # Node i has the children 2i and 2i + 1; a room of -1 fits nothing.
        self._largest = [-1, -1]

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove the first group with room enough: (room, group)."""
        if self._largest[1] < length:
            return None
        node = 1
        while node < self._size:
            node *= 2
            if self._largest[node] < length:
                node += 1
        room, group = self._largest[node], node - self._size
        self.put(-1, group)
        return room, group

    def put(self, room: int, group: int) -> None:
        """A group with its room."""
        if group >= self._size:
            self._grow()
        node = group + self._size
        self._largest[node] = room
        while node > 1:
            node //= 2
            self._largest[node] = max(self._largest[2 * node], self._largest[2 * node + 1])

    def _grow(self) -> None:
        rooms = self._largest[self._size :] + [-1] * self._size
        self._size *= 2
        self._largest = [-1] * self._size + rooms
        for node in range(self._size - 1, 0, -1):
            self._largest[node] = max(self._largest[2 * node], self._largest[2 * node + 1])


def _fit_decreasing(
    lengths: Sequence[int],
    capacity: int,
    started: int,
    policy: type[_BestFit] | type[_FirstFit],
) -> list[list[int]]:
    """Place the longest samples first, each where the policy says."""
    groups: list[list[int]] = []
    rooms = policy()
    if started:
        groups.append(list(range(started)))
        rooms.put(capacity - sum(lengths[:started]), 0)
    for i in sorted(range(started, len(lengths)), key=lambda i: -lengths[i]):
        found = rooms.take(lengths[i])
        if found is None:
            found = capacity, len(groups)
            groups.append([])
        room, group = found
        groups[group].append(i)
        rooms.put(room - lengths[i], group)
    return groups
