"""Which rows each rank sends to and receives from which rank: pure functions of integers.

Three orders of the rows of a microbatch matter. An encoder dp rank holds the rows of *its* images
in manifest order, the same on each of its tp and cp ranks. A rank of the language model's first
stage holds the rows whose positions lie in *its* shard of the sequence, in manifest order; ranks of
the same shard hold the same. Rows between the two travel in manifest order.

Forward, the ranks of an encoder dp rank are *holders* of its rows, and the ranks of the language
model are *receivers*. Backward it is the other way round: the ranks of a shard hold the gradients
of its rows, and every rank of an encoder dp rank receives them. Either way

- every row crosses once to each receiver, unless the receiver is a holder itself;
- holders of the same rows share the sending: all that they must send is laid end to end, receiver
  after receiver, and cut into equal parts, so their loads differ by at most one row.

Both ends compute the same cuts, so no shape is ever sent.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.topology import Layout, SequenceSharding
from megatron_mimo.topology.sequence import Interval, cut

# Rows that an encoder dp rank sends to a lane, over all of the lane's receivers, by
# (encoder dp rank, lane). See `network_rows`.
NetworkRows = Mapping[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class Message:
    """Rows that travel between this rank and a peer.

    Attributes:
        peer: Global rank at the other end; this rank itself for a local copy.
        runs: Half-open intervals of local rows, in the order in which they travel.
    """

    peer: int
    runs: tuple[Interval, ...]

    @property
    def rows(self) -> int:
        """Number of rows in the message."""
        return _length(self.runs)


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One rank's share of a microbatch's transfers over one boundary, on one side of it.

    Attributes:
        num_rows: Rows that the rank holds on this side: produced by it, or used by it.
        sends: Forward on the producing side, backward on the using side.
        receives: Backward on the producing side, forward on the using side.
    """

    num_rows: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class BridgePlanner:
    """Plans of the transfers between the encoder's last and the language model's first stage.

    Args:
        layout: Both grids.
        sharding: Which positions of a sequence each rank of the language model holds.
    """

    def __init__(self, layout: Layout, sharding: SequenceSharding) -> None:
        encoder, llm = layout.encoder, layout.llm
        self._layout = layout
        self._sharding = sharding
        # The ranks that hold the same rows: by encoder dp rank, and by (lane, shard).
        self._encoder_ranks: list[list[int]] = []
        if encoder is not None:
            last = encoder.pp - 1
            self._encoder_ranks = [encoder.stage_ranks(dp=dp, pp=last) for dp in range(encoder.dp)]
        self._shard_ranks: dict[tuple[int, int], list[int]] = {}
        for lane in range(llm.dp):
            for rank in llm.stage_ranks(dp=lane, pp=0):
                self._shard_ranks.setdefault((lane, self._shard_of(rank)), []).append(rank)

    @property
    def needs_network_rows(self) -> bool:
        """Whether lanes must know each other's `network_rows`.

        They do where several ranks of an encoder dp rank share the sending to several lanes.
        """
        return any(
            len(ranks) > 1 and len(self._layout.served(dp)) > 1
            for dp, ranks in enumerate(self._encoder_ranks)
        )

    def network_rows(self, manifest: Manifest) -> dict[tuple[int, int], int]:
        """Rows that cross the network forward, by (encoder dp rank, lane), of the lanes given.

        A lane's ranks cannot know this of other lanes, and need it to find where their rows begin
        among all that an encoder dp rank sends.
        """
        counts: dict[tuple[int, int], int] = {}
        for dp in {entry.encoder_rank for entry in manifest}:
            for (lane, shard), runs in self._encoder_rows(dp, manifest).items():
                receivers = set(self._shard_ranks[lane, shard]) - set(self._encoder_ranks[dp])
                counts[dp, lane] = counts.get((dp, lane), 0) + len(receivers) * _length(runs)
        return counts

    def encoder_plan(self, rank: int, manifest: Manifest) -> ModulePlan:
        """Messages of a rank of the encoder's last stage: rows out, gradients in.

        Args:
            rank: Global rank.
            manifest: Entries of every lane that has rows of the rank's dp rank.
        """
        assert self._layout.encoder is not None
        dp = self._layout.encoder.coordinates(rank).dp
        mine = self._encoder_rows(dp, manifest)
        outgoing = [(to, runs) for key, runs in mine.items() for to in self._shard_ranks[key]]
        receives: list[Message] = []
        for (lane, shard), runs in mine.items():
            holders = self._shard_ranks[lane, shard]
            returning = [
                (to, _length(theirs))
                for other, theirs in self._lane_rows(lane, shard, manifest).items()
                for to in self._encoder_ranks[other]
            ]
            before, total = _span(rank, holders, returning)
            receives += _receive(rank, holders, before, total, runs)
        return ModulePlan(
            num_rows=sum(entry.rows for entry in manifest if entry.encoder_rank == dp),
            sends=tuple(_send(rank, self._encoder_ranks[dp], outgoing)),
            receives=tuple(receives),
        )

    def language_plan(
        self, rank: int, manifest: Manifest, network_rows: NetworkRows | None = None
    ) -> ModulePlan:
        """Messages of a rank of the language model's first stage: rows in, gradients out.

        Args:
            rank: Global rank.
            manifest: Entries of the rank's lane, at least.
            network_rows: Of every lane; without it the manifest must list every lane that shares
                an encoder dp rank with this one.
        """
        lane, shard = self._layout.llm.coordinates(rank).dp, self._shard_of(rank)
        mine = self._lane_rows(lane, shard, manifest)
        outgoing = [(to, runs) for dp, runs in mine.items() for to in self._encoder_ranks[dp]]
        counts = self.network_rows(manifest) if network_rows is None else network_rows
        receives: list[Message] = []
        for dp, runs in mine.items():
            holders = self._encoder_ranks[dp]
            sent = [
                (to, _length(theirs))
                for key, theirs in self._encoder_rows(dp, manifest).items()
                if key[0] == lane
                for to in self._shard_ranks[key]
            ]
            before, _ = _span(rank, holders, sent)
            lanes = {of_lane: count for (of, of_lane), count in counts.items() if of == dp}
            before += sum(count for of_lane, count in lanes.items() if of_lane < lane)
            receives += _receive(rank, holders, before, sum(lanes.values()), runs)
        return ModulePlan(
            num_rows=sum(_length(runs) for runs in mine.values()),
            sends=tuple(_send(rank, self._shard_ranks[lane, shard], outgoing)),
            receives=tuple(receives),
        )

    def _shard_of(self, rank: int) -> int:
        place = self._layout.llm.coordinates(rank)
        return self._sharding.shard(cp_rank=place.cp, tp_rank=place.tp)

    def _encoder_rows(
        self, dp: int, manifest: Manifest
    ) -> dict[tuple[int, int], tuple[Interval, ...]]:
        """Rows of an encoder dp rank, in its order, by the (lane, shard) that uses them."""
        runs: dict[tuple[int, int], list[Interval]] = {}
        held = 0
        for entry in manifest:
            if entry.encoder_rank != dp:
                continue
            for shard, start, stop in self._pieces(entry):
                _extend(runs.setdefault((entry.lane, shard), []), held + start, held + stop)
            held += entry.rows
        return {key: tuple(runs[key]) for key in sorted(runs)}

    def _lane_rows(
        self, lane: int, shard: int, manifest: Manifest
    ) -> dict[int, tuple[Interval, ...]]:
        """Rows of a shard, in its order, by the encoder dp rank that they come from."""
        runs: dict[int, list[Interval]] = {}
        held = 0
        for entry in manifest:
            if entry.lane != lane:
                continue
            for of_shard, start, stop in self._pieces(entry):
                if of_shard == shard:
                    mine = runs.setdefault(entry.encoder_rank, [])
                    _extend(mine, held, held + stop - start)
                    held += stop - start
        return {dp: tuple(runs[dp]) for dp in sorted(runs)}

    def _pieces(self, entry: ManifestEntry) -> Iterator[tuple[int, int, int]]:
        """Cut the rows of an entry by shard: (shard, first row, end), rows counted from 0."""
        for shard, start, stop in self._sharding.pieces(entry.start, entry.start + entry.rows):
            yield shard, start - entry.start, stop - entry.start


def _send(
    rank: int, holders: Sequence[int], outgoing: Iterable[tuple[int, tuple[Interval, ...]]]
) -> Iterator[Message]:
    """A holder's messages: rows for itself, and its part of what the others receive.

    Args:
        rank: One of the holders.
        holders: Ranks that hold the same rows.
        outgoing: Receivers and the rows that they use, in the order in which all holders lay them
            end to end.
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
    """A receiver's messages: the other end of `_send`.

    Args:
        rank: The receiver.
        holders: Ranks that hold the rows.
        before: Rows that stand before the receiver's in what the holders lay end to end.
        total: All of those rows.
        runs: Where the receiver puts its rows.
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
