"""Transfers are simulated with plain lists: every row must arrive where the manifest says."""

import pytest
from hypothesis import given

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.bridge.plan import BridgePlanner, Message, RankPlan
from megatron_mimo.topology import Layout, ModuleGridSpec, SequenceSharding
from tests.properties import examples
from tests.unit_tests.bridge.cases import Case, cases

Row = tuple[int, int]
Plans = dict[int, RankPlan]


def plans(case: Case) -> tuple[Plans, Plans]:
    """The plan of every rank on either side, from the whole manifest."""
    planner = BridgePlanner(case.layout, "encoder", case.sharding)
    encoder = {
        rank: planner.source_plan(rank, case.manifest, case.documents)
        for dp in range(case.layout.modules["encoder"].dp)
        for rank in case.holders(dp)
    }
    return encoder, {
        rank: planner.target_plan(rank, case.manifest, documents=case.documents)
        for rank in case.users()
    }


def rows_held(case: Case) -> tuple[dict[int, list[Row]], dict[int, list[Row]]]:
    """What every rank on either side holds."""
    produced = {
        rank: case.produces(dp)
        for dp in range(case.layout.modules["encoder"].dp)
        for rank in case.holders(dp)
    }
    return produced, {rank: case.uses(rank) for rank in case.users()}


def deliver(
    senders: Plans, held: dict[int, list[Row]], receivers: Plans, wanted: dict[int, list[Row]]
) -> None:
    """Deliver every message and check each receiver's rows; every send must be expected."""
    parcels = {}
    for rank, plan in senders.items():
        assert plan.num_rows == len(held[rank])
        for message in plan.sends:
            assert (rank, message.peer) not in parcels, "one message between two ranks"
            parcels[rank, message.peer] = [
                row for start, stop in message.runs for row in held[rank][start:stop]
            ]
    for rank, plan in receivers.items():
        got: list[Row | None] = [None] * plan.num_rows
        for message in plan.receives:
            parcel = parcels.pop((message.peer, rank))
            assert len(parcel) == message.rows > 0
            places = [i for start, stop in message.runs for i in range(start, stop)]
            for place, row in zip(places, parcel, strict=True):
                assert got[place] is None, "a row arrives once"
                got[place] = row
        assert got == wanted[rank]
    assert not parcels, "every message is expected"


@examples(1500)
@given(cases())
def test_every_row_and_gradient_arrives_once_and_nothing_else_moves(case: Case) -> None:
    encoder, language = plans(case)
    produced, used = rows_held(case)
    deliver(encoder, produced, language, used)
    # Backward every holder of rows gets the gradient of each one that anybody uses.
    everything = {row for rows in used.values() for row in rows}
    assert all(row in everything for rows in produced.values() for row in rows)
    deliver(language, used, encoder, produced)


@examples(1000)
@given(cases())
def test_holders_of_the_same_rows_share_the_sending(case: Case) -> None:
    encoder, language = plans(case)
    groups = [
        [encoder[rank] for rank in case.holders(d)]
        for d in range(case.layout.modules["encoder"].dp)
    ]
    shards: dict[tuple[int, int], list[int]] = {}
    for rank in language:
        place = case.layout.target.coordinates(rank)
        shard = case.sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
        shards.setdefault((place.dp, shard), []).append(rank)
    ranks = [case.holders(d) for d in range(case.layout.modules["encoder"].dp)] + list(
        shards.values()
    )
    groups += [[language[rank] for rank in shard] for shard in shards.values()]
    for holders, group in zip(ranks, groups, strict=True):
        loads = [
            sum(message.rows for message in plan.sends if message.peer != rank)
            for rank, plan in zip(holders, group, strict=True)
        ]
        assert max(loads) - min(loads) <= 1


@examples(500)
@given(cases())
def test_a_rank_that_holds_its_rows_asks_nobody_for_them(case: Case) -> None:
    encoder, language = plans(case)
    produced, used = rows_held(case)
    for rank in set(encoder) & set(language):
        mine = set(produced[rank]) & set(used[rank])
        own = sum(m.rows for m in language[rank].receives if m.peer == rank)
        assert own == len(mine)
        returned = sum(m.rows for m in encoder[rank].receives if m.peer == rank)
        assert returned == len(mine)


@examples(500)
@given(cases(arbitrary=False))
def test_a_rank_needs_only_the_lanes_it_reads(case: Case) -> None:
    """With the row counts of other lanes, which training spreads, where they are needed."""
    layout, manifest = case.layout, case.manifest
    planner = BridgePlanner(layout, "encoder", case.sharding)
    encoder, language = plans(case)
    counts = None
    if planner.needs_network_rows:
        counts = planner.network_rows(manifest, case.documents)
    for rank, plan in language.items():
        lane = layout.target.coordinates(rank).dp
        local = tuple(e for e in manifest if e.lane == lane)
        known = {at: lengths for at, lengths in case.documents.items() if at == lane}
        senders = {e.source_rank for e in local}
        some = counts and {key: count for key, count in counts.items() if key[0] in senders}
        assert planner.target_plan(rank, local, some, known) == plan
    for rank, plan in encoder.items():
        dp = layout.modules["encoder"].coordinates(rank).dp
        run = {e.lane for e in manifest if (e.module, e.source_rank) == ("encoder", dp)}
        assert run <= set(layout.reached("encoder", dp))
        local = tuple(e for e in manifest if e.lane in run)
        known = {at: lengths for at, lengths in case.documents.items() if at in run}
        assert planner.source_plan(rank, local, known) == plan


def beside(encoder: dict[str, int], llm: dict[str, int]) -> Layout:
    first = ModuleGridSpec(name="encoder", **encoder)
    second = ModuleGridSpec(name="llm", offset=first.size, **llm)
    return Layout.of(first, second, world_size=first.size + second.size)


def entry(lane: int, source_rank: int, rows: int, sequence: int, start: int) -> ManifestEntry:
    return ManifestEntry(
        module="encoder",
        source_rank=source_rank,
        lane=lane,
        rows=rows,
        sequence=sequence,
        start=start,
    )


def planner_for(layout: Layout, seq_length: int, sequence_parallel: bool = False) -> BridgePlanner:
    return BridgePlanner(
        layout,
        "encoder",
        SequenceSharding(
            seq_length=seq_length,
            cp=layout.target.cp,
            tp=layout.target.tp,
            sequence_parallel=sequence_parallel,
        ),
    )


def test_replicated_rows_go_to_every_tensor_parallel_rank() -> None:
    planner = planner_for(beside({"tp": 2}, {"tp": 2}), 16)
    manifest = (entry(0, 0, 5, 0, 3),)
    assert planner.source_plan(0, manifest).sends == (Message(2, ((0, 5),)),)
    assert planner.source_plan(1, manifest).sends == (Message(3, ((0, 5),)),)


def test_sequence_shards_get_their_own_rows_only() -> None:
    planner = planner_for(beside({}, {"tp": 2}), 16, sequence_parallel=True)
    manifest = (entry(0, 0, 6, 0, 4),)
    assert planner.source_plan(0, manifest).sends == (
        Message(1, ((0, 4),)),
        Message(2, ((4, 6),)),
    )
    assert planner.target_plan(2, manifest).num_rows == 2


def test_context_parallel_ranks_get_both_their_chunks() -> None:
    # Four chunks of four positions: rank 0 owns the first and the last.
    planner = planner_for(beside({}, {"cp": 2}), 16)
    manifest = (entry(0, 0, 12, 0, 2),)
    assert planner.source_plan(0, manifest).sends == (
        Message(1, ((0, 2), (10, 12))),
        Message(2, ((2, 10),)),
    )
    assert planner.target_plan(1, manifest).receives == (Message(0, ((0, 4),)),)


def test_rows_of_a_packed_sequence_go_where_its_documents_are() -> None:
    # Four documents of four tokens: the first two are on one rank, the others on the other.
    sharding = SequenceSharding(seq_length=16, cp=2, packed=True)
    planner = BridgePlanner(beside({}, {"cp": 2}), "encoder", sharding)
    manifest = (entry(0, 0, 2, 0, 1), entry(0, 0, 3, 0, 5), entry(0, 0, 1, 0, 14))
    documents = {0: (4, 4, 4, 4)}
    assert planner.source_plan(0, manifest, documents).sends == (
        Message(1, ((0, 5),)),
        Message(2, ((5, 6),)),
    )
    assert planner.target_plan(2, manifest, documents=documents).num_rows == 1
    with pytest.raises(KeyError):
        planner.source_plan(0, manifest, {1: (16,)})


def test_neighbouring_items_travel_as_one_run() -> None:
    planner = planner_for(beside({}, {}), 16)
    manifest = tuple(entry(0, 0, rows, 0, start) for rows, start in ((3, 0), (0, 5), (4, 6)))
    assert planner.source_plan(0, manifest).sends == (Message(1, ((0, 7),)),)


def test_no_rows_no_messages() -> None:
    planner = planner_for(beside({}, {}), 16)
    assert planner.source_plan(0, ()) == RankPlan(0, (), ())
    assert planner.target_plan(1, (entry(0, 0, 0, 0, 0),)) == RankPlan(0, (), ())
