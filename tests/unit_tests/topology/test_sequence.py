"""Every position of a sequence has an owner, and the cuts are the zig-zag's."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.topology import SequenceCut, SequenceSharding
from megatron_mimo.topology.sequence import cut


@st.composite
def cuts(draw: st.DrawFn) -> SequenceCut:
    """Sequences of some lengths over some ranks, packed or not."""
    cp, tp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    packed = draw(st.booleans())
    sharding = SequenceSharding(
        seq_length=(1 if packed else 2) * cp * tp * draw(st.integers(1, 6)),
        cp=cp,
        tp=tp,
        sequence_parallel=draw(st.booleans()),
        packed=packed,
    )
    if not packed:
        return sharding.of()
    bounds = draw(st.lists(st.integers(0, sharding.seq_length), max_size=6).map(sorted))
    return sharding.of(tuple(b - a for a, b in pairwise([0, *bounds, sharding.seq_length])))


def positions(intervals: tuple[tuple[int, int], ...]) -> list[int]:
    return [p for start, stop in intervals for p in range(start, stop)]


@given(cuts())
def test_shards_are_equal_and_cover_the_sequence_once(sequence: SequenceCut) -> None:
    sharding = sequence.sharding
    shards = [positions(sequence.intervals(shard)) for shard in range(sharding.num_shards)]
    assert {len(shard) for shard in shards} == {sharding.shard_length}
    assert sorted(p for shard in shards for p in shard) == list(range(sharding.seq_length))
    assert all(shard == sorted(shard) for shard in shards)


@given(cuts())
def test_tensor_parallel_ranks_cut_what_their_context_parallel_rank_holds(
    sequence: SequenceCut,
) -> None:
    sharding = sequence.sharding
    for cp_rank in range(sharding.cp):
        shards = [
            sharding.shard(cp_rank=cp_rank, tp_rank=tp_rank) for tp_rank in range(sharding.tp)
        ]
        held = [positions(sequence.intervals(shard)) for shard in dict.fromkeys(shards)]
        whole = [p for shard in held for p in shard]
        assert whole == positions(sequence.cp_intervals(cp_rank))


@given(cuts(), st.data())
def test_pieces_name_the_owner_of_every_position(
    sequence: SequenceCut, data: st.DataObject
) -> None:
    sharding = sequence.sharding
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, sharding.seq_length)] * 2)))
    owner = {
        p: shard
        for shard in range(sharding.num_shards)
        for p in positions(sequence.intervals(shard))
    }
    named = [(p, s) for s, low, high in sequence.pieces(start, stop) for p in range(low, high)]
    assert named == [(p, owner[p]) for p in range(start, stop)]


def test_context_parallelism_is_a_zig_zag() -> None:
    sequence = SequenceSharding(seq_length=16, cp=2).of()
    assert sequence.cp_intervals(0) == ((0, 4), (12, 16))
    assert sequence.cp_intervals(1) == ((4, 8), (8, 12))


def test_a_packed_sequence_is_cut_by_its_documents() -> None:
    sharding = SequenceSharding(seq_length=16, cp=2, packed=True)
    # Each rank gets a long and a short document.
    assert sharding.of((5, 3, 3, 5)).parts == (((5, 8), (11, 16)), ((0, 5), (8, 11)))
    # The one in the middle costs more than half: it is split, from both ends inwards.
    assert sharding.of((4, 8, 4)).parts == (((0, 6), (10, 12)), ((6, 10), (12, 16)))
    assert sharding.of((16,)).parts == (((0, 4), (12, 16)), ((4, 12),))
    assert sharding.of().parts == SequenceSharding(seq_length=16, cp=2).of().parts
    with pytest.raises(ValueError, match="documents of 12 tokens, padding included, in a packed"):
        sharding.of((4, 8))


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="--seq-length 10 does not divide by 2 x --llm-cp 2"):
        SequenceSharding(seq_length=10, cp=2)
    with pytest.raises(ValueError, match="--seq-length 12 over --llm-cp 2 does not divide by --ll"):
        SequenceSharding(seq_length=12, cp=2, tp=4, sequence_parallel=True)


def test_packed_sequences_divide_by_ranks_and_not_by_chunks() -> None:
    sharding = SequenceSharding(seq_length=10, cp=2, packed=True)
    assert sharding.of((10,)).parts
    # Questions are never packed.
    with pytest.raises(ValueError, match="--seq-length 10 does not divide by 2 x --llm-cp 2"):
        sharding.of()
    with pytest.raises(ValueError, match="--seq-length 10 does not divide by --llm-cp 4: context"):
        SequenceSharding(seq_length=10, cp=4, packed=True)
    with pytest.raises(ValueError, match="--seq-length 10 over --llm-cp 2 does not divide by --ll"):
        SequenceSharding(seq_length=10, cp=2, tp=2, sequence_parallel=True, packed=True)


def test_cut_counts_across_intervals() -> None:
    assert cut(((2, 5), (9, 12)), 1, 4) == ((3, 5), (9, 10))
    assert cut(((2, 5),), -3, 1) == ((2, 3),)
    assert cut(((2, 5),), 3, 9) == ()
