"""Which rows each rank sends to and receives from which rank: pure functions of integers.

A bridge carries the rows of one module, the *source*, to the *target*; bridges are independent of
each other. Three orders of the rows of a microbatch matter. A dp rank of the source holds the rows
of *its* items in manifest order, equal on each of its tp and cp ranks. A rank of the target's first
stage holds the rows whose positions lie in *its* shard of the sequence, in manifest order; ranks of
the same shard hold the same. Rows between the two are sent in manifest order.

Forward, the ranks of a source's dp rank are *holders* of its rows, and the ranks of the target are
*receivers*. Backward it is the other way round: the ranks of a shard hold the gradients of its
rows, and every rank of a source's dp rank receives them. Either way

- every row crosses once to each receiver, unless the receiver is a holder itself;
- holders of the same rows divide the sending: everything that they must send is concatenated,
  receiver after receiver, and cut into equal parts, so their loads differ by at most one row.

Both ends compute the same cuts, so no shape is ever sent.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.bridge.manifest import WHOLE, Documents, Manifest, ManifestEntry
from megatron_mimo.topology import Layout, SequenceSharding
from megatron_mimo.topology.sequence import Interval, cut

# Rows that a dp rank of the source sends to a lane, over all of the lane's receivers, by
# (dp rank, lane). See `network_rows`.
NetworkRows = Mapping[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class Message:
    """Rows that are sent between this rank and a peer.

    Attributes:
        peer: Global rank at the other end; this rank itself for a local copy.
        runs: Half-open intervals of local rows, in the order in which they are sent.
    """

    peer: int
    runs: tuple[Interval, ...]

    @property
    def rows(self) -> int:
        """Number of rows in the message."""
        return _length(self.runs)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's share of a microbatch's transfers over one boundary, on one side of it.

    Attributes:
        num_rows: Number of rows that the rank holds on this side: produced by it, or used by it.
        sends: Messages to send, in forward on the producing side and in backward on the using side.
        receives: Messages to receive, in backward on the producing side and in forward on the using
            side.
    """

    num_rows: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class BridgePlanner:
    """Plans of the transfers between a source's last and the target's first stage.

    Args:
        layout: The grids of all modules.
        source: Name of the module whose rows cross the bridge.
        sharding: Positions of a sequence that each rank of the target holds.
    """

    def __init__(self, layout: Layout, source: str, sharding: SequenceSharding) -> None:
        grid, target = layout.modules[source], layout.target
        self._layout = layout
        self._grid = grid
        self._sharding = sharding
        # The ranks that hold the same rows: by dp rank of the source, and by (lane, shard).
        self._source_ranks = [layout.producers(source, dp) for dp in range(grid.dp)]
        self._shard_ranks: dict[tuple[int, int], list[int]] = {}
        for lane in range(target.dp):
            for rank in layout.users(lane):
                self._shard_ranks.setdefault((lane, self._shard_of(rank)), []).append(rank)

    @property
    def needs_network_rows(self) -> bool:
        """Whether lanes must know each other's `network_rows`.

        They must where several ranks of one dp rank of the source divide the sending to several
        lanes.
        """
        return any(
            len(ranks) > 1 and len(self._layout.reached(self._grid.name, dp)) > 1
            for dp, ranks in enumerate(self._source_ranks)
        )

    def entries(self, manifest: Manifest) -> Iterator[ManifestEntry]:
        """Those entries of a manifest whose rows cross this bridge."""
        return (entry for entry in manifest if entry.module == self._grid.name and entry.rows)

    def network_rows(
        self, manifest: Manifest, documents: Documents = WHOLE
    ) -> dict[tuple[int, int], int]:
        """Number of rows sent in forward, by (dp rank of the source, lane).

        The result covers the lanes in the manifest. The ranks of a lane cannot know the numbers of
        other lanes, and need them to find where their own rows begin among all that a dp rank of
        the source sends.

        Args:
            manifest: Entries of some lanes.
            documents: Documents of these lanes, where sequences are packed.
        """
        counts: dict[tuple[int, int], int] = {}
        for dp in {entry.source_rank for entry in self.entries(manifest)}:
            for (lane, shard), runs in self._source_rows(dp, manifest, documents).items():
                receivers = set(self._shard_ranks[lane, shard]) - set(self._source_ranks[dp])
                counts[dp, lane] = counts.get((dp, lane), 0) + len(receivers) * _length(runs)
        return counts

    def source_plan(self, rank: int, manifest: Manifest, documents: Documents = WHOLE) -> RankPlan:
        """Messages of a rank of the source's last stage: it sends rows and receives gradients.

        Args:
            rank: Global rank on the source's last stage.
            manifest: Entries of every lane that has rows of the rank's dp rank.
            documents: Documents of these lanes, where sequences are packed.
        """
        dp = self._grid.coordinates(rank).dp
        mine = self._source_rows(dp, manifest, documents)
        outgoing = [(to, runs) for key, runs in mine.items() for to in self._shard_ranks[key]]
        receives: list[Message] = []
        for (lane, shard), runs in mine.items():
            holders = self._shard_ranks[lane, shard]
            returning = [
                (to, _length(theirs))
                for other, theirs in self._lane_rows(lane, shard, manifest, documents).items()
                for to in self._source_ranks[other]
            ]
            before, total = _span(rank, holders, returning)
            receives += _receive(rank, holders, before, total, runs)
        return RankPlan(
            num_rows=sum(e.rows for e in self.entries(manifest) if e.source_rank == dp),
            sends=tuple(_send(rank, self._source_ranks[dp], outgoing)),
            receives=tuple(receives),
        )

    def target_plan(
        self,
        rank: int,
        manifest: Manifest,
        network_rows: NetworkRows | None = None,
        documents: Documents = WHOLE,
    ) -> RankPlan:
        """Messages of a rank of the target's first stage: it receives rows and sends gradients.

        Args:
            rank: Global rank on the target's first stage.
            manifest: Entries of the rank's lane, at least.
            network_rows: Numbers of rows of every lane, from `network_rows`; if None, the manifest
                must list every lane that shares a dp rank of the source with this one.
            documents: Documents of the lanes of the manifest, where sequences are packed.
        """
        lane, shard = self._layout.target.coordinates(rank).dp, self._shard_of(rank)
        mine = self._lane_rows(lane, shard, manifest, documents)
        outgoing = [(to, runs) for dp, runs in mine.items() for to in self._source_ranks[dp]]
        if network_rows is None:
            network_rows = self.network_rows(manifest, documents)
        receives: list[Message] = []
        for dp, runs in mine.items():
            holders = self._source_ranks[dp]
            sent = [
                (to, _length(theirs))
                for key, theirs in self._source_rows(dp, manifest, documents).items()
                if key[0] == lane
                for to in self._shard_ranks[key]
            ]
            before, _ = _span(rank, holders, sent)
            lanes = {of_lane: count for (of, of_lane), count in network_rows.items() if of == dp}
            before += sum(count for of_lane, count in lanes.items() if of_lane < lane)
            receives += _receive(rank, holders, before, sum(lanes.values()), runs)
        return RankPlan(
            num_rows=sum(_length(runs) for runs in mine.values()),
            sends=tuple(_send(rank, self._shard_ranks[lane, shard], outgoing)),
            receives=tuple(receives),
        )

    def _shard_of(self, rank: int) -> int:
        place = self._layout.target.coordinates(rank)
        return self._sharding.shard(cp_rank=place.cp, tp_rank=place.tp)

    def _source_rows(
        self, dp: int, manifest: Manifest, documents: Documents
    ) -> dict[tuple[int, int], tuple[Interval, ...]]:
        """Rows of a dp rank of the source, in its order, by the (lane, shard) that uses them."""
        runs: dict[tuple[int, int], list[Interval]] = {}
        held = 0
        for entry in self.entries(manifest):
            if entry.source_rank != dp:
                continue
            for shard, start, stop in self._pieces(entry, documents):
                _extend(runs.setdefault((entry.lane, shard), []), held + start, held + stop)
            held += entry.rows
        return {key: tuple(runs[key]) for key in sorted(runs)}

    def _lane_rows(
        self, lane: int, shard: int, manifest: Manifest, documents: Documents
    ) -> dict[int, tuple[Interval, ...]]:
        """Rows of a shard, in its order, by the dp rank of the source that they come from."""
        runs: dict[int, list[Interval]] = {}
        held = 0
        for entry in self.entries(manifest):
            if entry.lane != lane:
                continue
            for of_shard, start, stop in self._pieces(entry, documents):
                if of_shard == shard:
                    mine = runs.setdefault(entry.source_rank, [])
                    _extend(mine, held, held + stop - start)
                    held += stop - start
        return {dp: tuple(runs[dp]) for dp in sorted(runs)}

    def _pieces(self, entry: ManifestEntry, documents: Documents) -> Iterator[tuple[int, int, int]]:
        """Cut the rows of an entry by shard: (shard, first row, end), rows counted from 0."""
        # A lane without documents among others that have some would be cut in another way here
        # than on its own ranks: better a KeyError.
        cut = self._sharding.of(documents[entry.lane] if documents else ())
        for shard, start, stop in cut.pieces(entry.start, entry.start + entry.rows):
            yield shard, start - entry.start, stop - entry.start


def _send(
    rank: int, holders: Sequence[int], outgoing: Iterable[tuple[int, tuple[Interval, ...]]]
) -> Iterator[Message]:
    """Messages of a holder: rows for itself, and its part of what the others receive.

    Args:
        rank: Global rank of one of the holders.
        holders: Ranks that hold the same rows.
        outgoing: Receivers and the rows that they use, in the order in which all holders
            concatenate them.
    """
    outgoing = list(outgoing)
    total = sum(_length(runs) for receiver, runs in outgoing if receiver not in holders)
    low, high = _part(holders.index(rank), len(holders), total)
    offset = 0
    for receiver, runs in outgoing:
        if receiver == rank:
            yield Message(rank, runs)
        elif receiver not in holders:
            mine = cut(runs, low - offset, high - offset)
            if mine:
                yield Message(receiver, mine)
            offset += _length(runs)


def _receive(
    rank: int, holders: Sequence[int], before: int, total: int, runs: tuple[Interval, ...]
) -> Iterator[Message]:
    """Messages of a receiver: the other end of `_send`.

    Args:
        rank: Global rank of the receiver.
        holders: Ranks that hold the rows.
        before: Number of rows before the receiver's in what the holders concatenate.
        total: Number of all rows that the holders concatenate.
        runs: Half-open intervals of local rows that the receiver fills.
    """
    if rank in holders:
        yield Message(rank, runs)
        return
    for index, holder in enumerate(holders):
        low, high = _part(index, len(holders), total)
        theirs = cut(runs, low - before, high - before)
        if theirs:
            yield Message(holder, theirs)


def _part(index: int, parts: int, total: int) -> tuple[int, int]:
    """Bounds of one of several parts of `total` rows whose sizes differ by at most one."""
    return index * total // parts, (index + 1) * total // parts


def _span(
    rank: int, holders: Sequence[int], outgoing: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Rows sent before those of a receiver, and all of them; holders are sent none."""
    before = total = 0
    for receiver, rows in outgoing:
        if receiver == rank:
            before = total
        if receiver not in holders:
            total += rows
    return before, total


def _extend(runs: list[Interval], start: int, stop: int) -> None:
    """Append a run, joined to the last one where it follows on."""
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], stop)
    else:
        runs.append((start, stop))


def _length(runs: Iterable[Interval]) -> int:
    return sum(stop - start for start, stop in runs)
