"""Every position of a sequence has an owner, and the cuts are the zig-zag's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.topology import SequenceSharding
from megatron_mimo.topology.sequence import cut


@st.composite
def shardings(draw: st.DrawFn) -> SequenceSharding:
    cp, tp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return SequenceSharding(
        seq_length=2 * cp * tp * draw(st.integers(1, 6)),
        cp=cp,
        tp=tp,
        sequence_parallel=draw(st.booleans()),
    )


def positions(intervals: tuple[tuple[int, int], ...]) -> list[int]:
    return [p for start, stop in intervals for p in range(start, stop)]


@given(shardings())
def test_shards_are_equal_and_cover_the_sequence_once(sharding: SequenceSharding) -> None:
    shards = [positions(sharding.intervals(shard)) for shard in range(sharding.num_shards)]
    assert {len(shard) for shard in shards} == {sharding.shard_length}
    assert sorted(p for shard in shards for p in shard) == list(range(sharding.seq_length))
    assert all(shard == sorted(shard) for shard in shards)


@given(shardings())
def test_tensor_parallel_ranks_cut_what_their_context_parallel_rank_holds(
    sharding: SequenceSharding,
) -> None:
    for cp_rank in range(sharding.cp):
        shards = [
            sharding.shard(cp_rank=cp_rank, tp_rank=tp_rank) for tp_rank in range(sharding.tp)
        ]
        held = [positions(sharding.intervals(shard)) for shard in dict.fromkeys(shards)]
        whole = [p for shard in held for p in shard]
        assert whole == positions(sharding.cp_intervals(cp_rank))


@given(shardings(), st.data())
def test_pieces_name_the_owner_of_every_position(
    sharding: SequenceSharding, data: st.DataObject
) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, sharding.seq_length)] * 2)))
    owner = {
        p: shard
        for shard in range(sharding.num_shards)
        for p in positions(sharding.intervals(shard))
    }
    named = [(p, s) for s, low, high in sharding.pieces(start, stop) for p in range(low, high)]
    assert named == [(p, owner[p]) for p in range(start, stop)]


def test_context_parallelism_is_a_zig_zag() -> None:
    sharding = SequenceSharding(seq_length=16, cp=2)
    assert sharding.cp_intervals(0) == ((0, 4), (12, 16))
    assert sharding.cp_intervals(1) == ((4, 8), (8, 12))


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="--seq-length 10 does not divide by 2 x --llm-cp 2"):
        SequenceSharding(seq_length=10, cp=2)
    with pytest.raises(ValueError, match="--seq-length 12 over --llm-cp 2 does not divide by --ll"):
        SequenceSharding(seq_length=12, cp=2, tp=4, sequence_parallel=True)


def test_cut_counts_across_intervals() -> None:
    assert cut(((2, 5), (9, 12)), 1, 4) == ((3, 5), (9, 10))
    assert cut(((2, 5),), -3, 1) == ((2, 3),)
    assert cut(((2, 5),), 3, 9) == ()
