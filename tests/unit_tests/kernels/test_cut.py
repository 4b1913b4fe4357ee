"""Packed sequences are shared evenly, and few documents are split."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import clip, log, random, where

from megatron_mimo.data.loader.packing import pack
from megatron_mimo.kernels.cut import DocumentCut, cut_documents


@st.composite
def sequences(draw: st.DrawFn, multiple: int = 1) -> tuple[tuple[int, ...], int]:
    """Lengths whose sum divides by a number of ranks, and that number."""
    ranks = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(0, 40) | st.integers(0, 3000), max_size=30))
    lengths.append(-sum(lengths) % (ranks * multiple))
    return tuple(lengths), ranks


def whole_documents(cut: DocumentCut) -> list[list[tuple[int, int]]]:
    """Every token as (document, place in it), by rank, in local order."""
    return [[(d, p) for d, a, b in mine for p in range(a, b)] for mine in cut.pieces]


@given(sequences(), st.booleans())
def test_every_token_has_one_rank_and_ranks_have_equally_many(
    case: tuple[tuple[int, ...], int], causal: bool
) -> None:
    lengths, ranks = case
    cut = cut_documents(lengths, ranks, causal=causal)
    held = whole_documents(cut)
    assert sorted(token for mine in held for token in mine) == [
        (document, place) for document, length in enumerate(lengths) for place in range(length)
    ]
    assert {len(mine) for mine in held} == {sum(lengths) // ranks}
    assert all(mine == sorted(mine) for mine in held)
    assert cut.tokens == tuple(map(len, held))


@given(sequences(), st.booleans())
def test_positions_are_those_of_the_pieces(case: tuple[tuple[int, ...], int], causal: bool) -> None:
    lengths, ranks = case
    cut = cut_documents(lengths, ranks, causal=causal)
    starts = [sum(lengths[:document]) for document in range(len(lengths))]
    for mine, tokens in zip(cut.intervals, whole_documents(cut), strict=True):
        assert [p for a, b in mine for p in range(a, b)] == [starts[d] + p for d, p in tokens]
        assert all(end < start for (_, end), (start, _) in pairwise(mine))
    assert [(a, b, rank) for rank, mine in enumerate(cut.intervals) for a, b in mine] == sorted(
        cut.owners, key=lambda owner: (owner[2], owner[0])
    )
    assert [a for a, _, _ in cut.owners][1:] == [b for _, b, _ in cut.owners][:-1]
    holders = [
        {rank for rank, mine in enumerate(cut.pieces) if d in {p[0] for p in mine}}
        for d in range(len(lengths))
    ]
    assert cut.split == tuple(d for d, ranks_of in enumerate(holders) if len(ranks_of) > 1)


@given(sequences(), st.booleans())
def test_attention_work_is_even_up_to_a_few_tokens(
    case: tuple[tuple[int, ...], int], causal: bool
) -> None:
    lengths, ranks = case
    cut = cut_documents(lengths, ranks, causal=causal)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    assert sum(cut.work) == pairs
    # Tokens are whole: the longest document's cost as much as it is long.
    assert max(cut.work) <= 1.05 * pairs / ranks + 3 * max(lengths)


@given(sequences())
def test_pieces_are_few(case: tuple[tuple[int, ...], int]) -> None:
    lengths, ranks = case
    cut = cut_documents(lengths, ranks)
    # Every arc cuts at most two documents, and a rank has at most two pieces of one.
    assert len(cut.split) <= 2 * (ranks - 1)
    assert sum(map(len, cut.pieces)) <= len(lengths) + 8 * (ranks - 1)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=20), st.integers(1, 4))
def test_tokens_of_a_multiple_stay_together(lengths: list[int], ranks: int) -> None:
    cut = cut_documents(tuple(lengths), ranks, causal=False, multiple=4)
    assert sorted(token for mine in whole_documents(cut) for token in mine) == [
        (document, place) for document, length in enumerate(lengths) for place in range(length)
    ]
    for mine in cut.pieces:
        for document, start, stop in mine:
            bounds = (start, stop) if start else (stop,)
            assert all((lengths[document] - bound) % 4 == 0 for bound in bounds)
    units = [sum(max((b - a) // 4, 1) for _, a, b in mine) for mine in cut.pieces]
    assert max(units) - min(units) <= 1


def reference_blend(seq_length: int) -> list[tuple[int, ...]]:
    """Packed sequences of log-normal documents, as docs/how-to/packing.md measures them."""
    source = random.default_rng(0)
    drawn = source.lognormal(log(700) - 0.5, 1.0, 1024)
    # Some are nearly as long as the sequence.
    drawn = where(source.random(1024) < 0.02, source.uniform(0.9, 1, 1024) * seq_length, drawn)
    lengths = clip(drawn.astype(int), 1, seq_length).tolist()
    found = []
    for group in pack(lengths, seq_length):
        documents = [lengths[i] for i in group]
        rest = seq_length - sum(documents)
        found.append((*documents, rest) if rest else tuple(documents))
    return found


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_busiest_rank_of_the_reference_blend_has_little_more_than_the_mean(ranks: int) -> None:
    cuts = [cut_documents(lengths, ranks) for lengths in reference_blend(8192)]
    assert max(max(cut.work) * ranks / sum(cut.work) for cut in cuts) <= 1.05


def test_a_document_alone_is_cut_in_a_zig_zag() -> None:
    cut = cut_documents((64,), 4)
    assert cut.pieces == (
        ((0, 0, 8), (0, 56, 64)),
        ((0, 8, 16), (0, 48, 56)),
        ((0, 16, 24), (0, 40, 48)),
        ((0, 24, 40),),
    )


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_hardly_any_of_many_short_documents_is_split(ranks: int) -> None:
    lengths = tuple(random.default_rng(1).integers(20, 60, 200).tolist())
    cut = cut_documents((*lengths, 8192 - sum(lengths)), ranks)
    split = [document for document in cut.split if document < 200]
    assert len(split) <= ranks - 1


def test_no_equal_document_is_split_that_need_not_be() -> None:
    assert cut_documents((32,) * 16, 4).split == ()


def test_a_document_longer_than_a_share_goes_to_all_ranks_that_it_needs() -> None:
    cut = cut_documents((6000, *(16,) * 137), 4)
    assert cut.split == (0,)
    assert max(cut.work) * 4 <= 1.05 * sum(cut.work)


def test_planning_takes_about_a_millisecond() -> None:
    lengths = tuple(random.default_rng(2).integers(20, 60, 300).tolist())
    cut_documents.cache_clear()
    times = []
    for extra in range(8):
        start = time.process_time()
        cut_documents((*lengths, extra), 4)
        times.append(time.process_time() - start)
    # Several times what it takes, for busy machines.
    assert min(times) < 0.01


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="documents of -1 tokens and more over 2 ranks"):
        cut_documents((3, -1), 2)
    with pytest.raises(ValueError, match="over 0 ranks"):
        cut_documents((3,), 0)
