"""Which rows each rank sends to and receives from which rank: pure functions of integers.

Rows of a microbatch live in two orders. An encoder dp rank holds the rows of *its* images in
manifest order; a lane holds the rows of *its* images in manifest order. An image is one run of rows
in both, so a message between the two is a list of runs on either end, and the runs of one message
have the same lengths in the same order on both ends.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mimo.bridge.manifest import Manifest
from megatron_mimo.topology import Layout, ModuleGridSpec


@dataclass(frozen=True, slots=True)
class Message:
    """Rows that travel between this rank and a peer.

    Attributes:
        peer: Global rank at the other end; this rank itself for a local copy.
        runs: Half-open intervals of local rows, in the order in which they travel.
    """

    peer: int
    runs: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Number of rows in the message."""
        return sum(stop - start for start, stop in self.runs)


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One rank's share of a microbatch's transfers, on one side of the bridge.

    Attributes:
        num_rows: Rows that this rank's module holds: produced by the encoder rank, or used by the
            lane.
        sends: Forward on the encoder's side, backward on the language model's.
        receives: Backward on the encoder's side, forward on the language model's.
    """

    num_rows: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


def encoder_plan(layout: Layout, rank: int, manifest: Manifest) -> ModulePlan:
    """Messages of an encoder rank: rows out, gradients in.

    Args:
        layout: Both grids; the rank must be in the encoder's.
        rank: Global rank.
        manifest: Entries of every lane that the rank's dp rank serves.
    """
    encoder, llm = layout.encoder, layout.llm
    assert encoder is not None
    place = encoder.coordinates(rank)
    runs = _runs_by_peer(
        (entry.lane, entry.rows) for entry in manifest if entry.encoder_rank == place.dp
    )
    return ModulePlan(
        num_rows=sum(entry.rows for entry in manifest if entry.encoder_rank == place.dp),
        sends=tuple(
            Message(receiver, lane_runs)
            for lane, lane_runs in runs.items()
            for receiver in _receivers(llm, lane, place.tp, encoder.tp)
        ),
        receives=tuple(
            Message(llm.rank(dp=lane, tp=place.tp % llm.tp), lane_runs)
            for lane, lane_runs in runs.items()
        ),
    )


def language_plan(layout: Layout, rank: int, manifest: Manifest) -> ModulePlan:
    """Messages of a language-model rank: rows in, gradients out.

    Args:
        layout: Both grids; the rank must be in the language model's.
        rank: Global rank.
        manifest: Entries of the rank's lane, at least.
    """
    encoder, llm = layout.encoder, layout.llm
    place = llm.coordinates(rank)
    entries = [entry for entry in manifest if entry.lane == place.dp]
    if encoder is None:
        return ModulePlan(num_rows=0, sends=(), receives=())
    runs = _runs_by_peer((entry.encoder_rank, entry.rows) for entry in entries)
    return ModulePlan(
        num_rows=sum(entry.rows for entry in entries),
        sends=tuple(
            Message(receiver, peer_runs)
            for encoder_rank, peer_runs in runs.items()
            for receiver in _receivers(encoder, encoder_rank, place.tp, llm.tp)
        ),
        receives=tuple(
            Message(encoder.rank(dp=encoder_rank, tp=place.tp % encoder.tp), peer_runs)
            for encoder_rank, peer_runs in runs.items()
        ),
    )


def _receivers(grid: ModuleGridSpec, dp: int, sender_tp: int, sender_tp_size: int) -> list[int]:
    """Ranks of `grid`'s dp rank that one of the tp ranks on the other side serves.

    tp ranks hold the same rows, so receiver `t` is served by sender `t % sender_tp_size`: every row
    reaches every receiver once, and the senders share the work.
    """
    return [grid.rank(dp=dp, tp=t) for t in range(grid.tp) if t % sender_tp_size == sender_tp]


def _runs_by_peer(rows: Iterable[tuple[int, int]]) -> dict[int, tuple[tuple[int, int], ...]]:
    """Cut consecutive local rows into runs per peer, joining neighbours; no rows, no run.

    Args:
        rows: (peer, number of rows) of each image, in local order.
    """
    runs: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for peer, count in rows:
        stop = start + count
        if count:
            mine = runs.setdefault(peer, [])
            if mine and mine[-1][1] == start:
                mine[-1] = (mine[-1][0], stop)
            else:
                mine.append((start, stop))
        start = stop
    return {peer: tuple(peer_runs) for peer, peer_runs in sorted(runs.items())}
