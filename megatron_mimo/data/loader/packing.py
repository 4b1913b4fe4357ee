"""Choice of the samples that share a sequence; integers only."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

Group = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """Groups of the samples of a full buffer.

    Attributes:
        leaving: Groups that are returned, as indices into the buffer, ordered by their first
            samples, so that their order does not depend on lengths.
        held: Indices of the group that is kept for the next round; empty without one.
    """

    leaving: tuple[Group, ...]
    held: Group


def pack(lengths: Sequence[int], capacity: int, started: int = 0) -> list[Group]:
    """Distribute samples to few groups: best fit decreasing, or first fit if that needs fewer.

    Takes O(n log n) comparisons for n samples; the same input gives the same groups.

    Args:
        lengths: Number of tokens of each sample.
        capacity: Largest number of tokens of a group.
        started: Number of samples, the first ones, that already form the first group.

    Returns:
        Indices into `lengths`, ascending in each group; groups in the order they were begun. They
        are never more than those of first fit decreasing.

    Raises:
        ValueError: A sample, or the group that was started, is longer than the capacity.
    """
    begun = sum(lengths[:started])
    if max(lengths, default=0) > capacity or begun > capacity or min(lengths, default=0) < 0:
        raise ValueError(
            f"samples of {min(lengths)} to {max(lengths)} tokens, {begun} tokens of them together "
            f"already, do not fit into groups of {capacity}"
        )
    groups = _fit_decreasing(lengths, capacity, started, _BestFit)
    # No packing needs fewer groups than the sum requires, so the other one is seldom tried.
    if len(groups) > -(-sum(lengths) // capacity):
        others = _fit_decreasing(lengths, capacity, started, _FirstFit)
        if len(others) < len(groups):
            groups = others
    return [tuple(sorted(group)) for group in groups]


def plan_round(lengths: Sequence[int], capacity: int, started: int) -> Round:
    """Pack a full buffer, and keep the emptiest group for the next round to fill.

    A buffer seldom fills its last group; without keeping it, padding would be half a sequence in
    each round. A group that was kept once is returned now, so that no sample waits for more than
    one round.

    Args:
        lengths: Number of tokens of each sample of the buffer.
        capacity: Number of tokens of a sequence.
        started: Number of samples, the first ones, that the last round kept.
    """
    groups = pack(lengths, capacity, started)
    free = groups[1:] if started else groups
    if len(groups) < 2 or not free:
        return Round(tuple(sorted(groups)), ())
    held = min(free, key=lambda group: sum(lengths[i] for i in group))
    return Round(tuple(sorted(group for group in groups if group is not held)), held)


class _BestFit:
    """Groups in ascending order of their free room."""

    def __init__(self) -> None:
        self._rooms: list[tuple[int, int]] = []

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove the group with the least sufficient room: (room in tokens, group)."""
        at = bisect_left(self._rooms, (length, -1))
        return self._rooms.pop(at) if at < len(self._rooms) else None

    def put(self, room: int, group: int) -> None:
        """Add a group with its room in tokens."""
        insort(self._rooms, (room, group))


class _FirstFit:
    """Groups in the order they were begun, with a tree of the largest free rooms."""

    def __init__(self) -> None:
        self._size = 1
        # Node i has the children 2i and 2i + 1; a room of -1 fits nothing.
        self._largest = [-1, -1]

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove the first group with sufficient room: (room in tokens, group)."""
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
        """Add a group with its room in tokens."""
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
    """Place the longest samples first, each in the group that the policy chooses."""
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
