"""Cuts of packed sequences for tests: any at all, and the positions that ranks hold under one."""

from itertools import pairwise

from hypothesis import strategies as st

from megatron_mimo.kernels.cut import DocumentCut, Piece


def positions_of(cut: DocumentCut, rank: int) -> list[int]:
    """Positions in the sequence of the tokens of a rank, in its local order."""
    starts = [sum(cut.lengths[:document]) for document in range(len(cut.lengths))]
    return [
        starts[document] + token
        for document, start, stop in cut.pieces[rank]
        for token in range(start, stop)
    ]


@st.composite
def any_cut(draw: st.DrawFn, max_ranks: int = 4) -> DocumentCut:
    """Documents cut anywhere, whose pieces any rank may hold."""
    ranks = draw(st.integers(1, max_ranks))
    lengths = draw(st.lists(st.integers(0, 12), max_size=6))
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for document, length in enumerate(lengths):
        places = draw(st.lists(st.integers(0, length), max_size=4))
        bounds = sorted({0, length, *places})
        for start, stop in pairwise(bounds):
            pieces[draw(st.integers(0, ranks - 1))].append(Piece(document, start, stop))
    return DocumentCut(tuple(lengths), tuple(tuple(mine) for mine in pieces))
