"""How context-parallel ranks share the tokens of a packed sequence; integers only.

A document that is whole on one rank needs no communication. So documents stay whole where tokens
and attention work still come out even, and as few and as short ones as possible are split.

A token of a document of L tokens costs L / 2 pairs of attention on average under a causal mask. A
rank that holds the k-th tokens from the document's beginning and from its end (the zig-zag of a
whole sequence, with parts of any size) has just that average. What a rank pays for a document is
then proportional to the tokens that it holds of it, and sharing a sequence is: give every rank the
same number of tokens, whose documents are of the same length on average.

Put the tokens on a circle, those of the longest documents first. Of all arcs with as many tokens as
a rank takes, some cost more than their share, or all cost the same: as an arc moves round, there is
one that costs its share exactly. The first rank gets that one; what is left is a shorter circle
with the same average, for the other ranks. Each arc cuts at most two documents. Of the arcs
that are near enough to their share, the one that splits the least is taken.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# An arc is near enough to its share of the work within a part in so many.
_NEAR = 100
# Halves of a document differ by a quarter of its work. It is cut into one part for each rank, and
# not in a zig-zag, where that is at most a part in so many of the rank's.
_SHORT = 200


class Piece(NamedTuple):
    """Consecutive tokens of one document.

    Attributes:
        document: Index of the document.
        start: First token, counted from the document's first.
        stop: End of the tokens.
    """

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class DocumentCut:
    """The tokens of a packed sequence that each of several ranks holds.

    Attributes:
        lengths: Number of tokens of each document; padding after them is a document too.
        pieces: Pieces of each rank, ascending, which is the rank's local order of tokens.
        causal: Whether tokens attend only to those before them.
    """

    lengths: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    causal: bool = True

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each rank."""
        return tuple(sum(stop - start for _, start, stop in mine) for mine in self.pieces)

    @cached_property
    def work(self) -> tuple[int, ...]:
        """Number of pairs of positions that attention of each rank computes."""
        if self.causal:
            return tuple(
                sum((stop - start) * (start + stop + 1) // 2 for _, start, stop in mine)
                for mine in self.pieces
            )
        return tuple(
            sum((stop - start) * self.lengths[document] for document, start, stop in mine)
            for mine in self.pieces
        )

    @cached_property
    def split(self) -> tuple[int, ...]:
        """Indices of the documents of which several ranks hold tokens, ascending."""
        holders: dict[int, set[int]] = {}
        for rank, mine in enumerate(self.pieces):
            for piece in mine:
                holders.setdefault(piece.document, set()).add(rank)
        return tuple(sorted(document for document, of in holders.items() if len(of) > 1))

    @cached_property
    def intervals(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Half-open positions in the sequence of each rank, in its local order; joined if close."""
        starts = _starts(self.lengths)
        found = []
        for mine in self.pieces:
            runs: list[tuple[int, int]] = []
            for document, start, stop in mine:
                first, end = starts[document] + start, starts[document] + stop
                if runs and runs[-1][1] == first:
                    runs[-1] = (runs[-1][0], end)
                else:
                    runs.append((first, end))
            found.append(tuple(runs))
        return tuple(found)

    @cached_property
    def owners(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, rank) of every interval of every rank, ascending by position."""
        return tuple(
            sorted(
                (start, stop, rank)
                for rank, mine in enumerate(self.intervals)
                for start, stop in mine
            )
        )


@lru_cache(maxsize=1024)
def cut_documents(
    lengths: tuple[int, ...], ranks: int, *, causal: bool = True, multiple: int = 1
) -> DocumentCut:
    """Share the tokens of a packed sequence evenly among ranks.

    The same arguments give the same cut on every machine.

    Args:
        lengths: Number of tokens of each document; padding after them is a document too.
        ranks: Number of ranks.
        causal: Whether tokens attend only to those before them.
        multiple: Number of tokens that stay together, counted from the end of a document; what is
            left over at its beginning stays with the first of them.

    Returns:
        The cut. Ranks have equally many tokens, where `ranks` x `multiple` divides everything that
        there is; otherwise, without what is left over in documents, they differ by at most
        `multiple`.

    Raises:
        ValueError: A length is negative, or there is no rank.
    """
    if ranks < 1 or multiple < 1 or min(lengths, default=0) < 0:
        raise ValueError(
            f"documents of {min(lengths, default=0)} tokens and more over {ranks} ranks in "
            f"multiples of {multiple}: expected lengths of at least 0, ranks and multiples of at "
            f"least 1"
        )
    # Whole multiples; a document that is shorter than one is one.
    units = [
        -(-length // multiple) if length < multiple else length // multiple for length in lengths
    ]
    total = sum(units)
    quotas = [(rank + 1) * total // ranks - rank * total // ranks for rank in range(ranks)]
    shares = _share(units, lengths, quotas)
    work = sum(length * (length + 1) for length in lengths) // 2 // ranks
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for document, share in enumerate(shares):
        length = lengths[document]
        zigzag = causal and length * length * _SHORT > 8 * work
        for rank, first, end in (_zigzag if zigzag else _consecutive)(share):
            start = length - (units[document] - first) * multiple if first else 0
            stop = length - (units[document] - end) * multiple
            pieces[rank].append(Piece(document, start, stop))
    return DocumentCut(lengths, tuple(tuple(sorted(mine)) for mine in pieces), causal)


# Rank -> number of units of one document that it takes.
_Share = dict[int, int]


def _share(units: list[int], lengths: tuple[int, ...], quotas: list[int]) -> list[_Share]:
    """Number of units of each document that each rank takes, so that all pay about the same."""
    shares: list[_Share] = [{} for _ in units]
    order = sorted((i for i, size in enumerate(units) if size), key=lambda i: (-lengths[i], i))
    circle = [(document, units[document]) for document in order]
    is_cut = np.zeros(len(units), dtype=bool)
    for rank, quota in enumerate(quotas):
        if rank == len(quotas) - 1:
            taken = circle
        elif quota:
            start = _best_arc(circle, lengths, quota, len(quotas) - rank, is_cut)
            taken, circle = _take(circle, start, quota)
            for document, _ in {taken[0], taken[-1]}:
                is_cut[document] |= any(document == left for left, _ in circle)
        else:
            taken = []
        for document, count in taken:
            shares[document][rank] = shares[document].get(rank, 0) + count
    return shares


def _best_arc(
    circle: list[tuple[int, int]],
    lengths: tuple[int, ...],
    quota: int,
    ranks: int,
    is_cut: NDArray[np.bool_],
) -> int:
    """First unit of the arc of `quota` units that the next of some ranks takes.

    Args:
        circle: Documents and the units that are left of them.
        lengths: Number of tokens of each document.
        quota: Number of units of the arc.
        ranks: Number of ranks that share the circle.
        is_cut: Whether each document is split already.
    """
    documents = np.array([document for document, _ in circle])
    sizes = np.array([size for _, size in circle], dtype=np.int64)
    # What a unit costs, twice over and up to a common factor.
    costs = np.array([lengths[document] + 1 for document, _ in circle], dtype=np.int64)
    # Twice round the circle, so that an arc may pass its beginning.
    bounds = np.concatenate([[0], np.cumsum(np.tile(sizes, 2))])
    before = np.concatenate([[0], np.cumsum(np.tile(sizes * costs, 2))])
    total, num = int(sizes.sum()), len(circle)
    # Arcs that begin or end between two documents.
    starts = np.unique(np.concatenate([bounds[:num], (bounds[:num] - quota) % total]))

    def at(places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cost of everything before some places, and the length of the document split there."""
        entry = np.searchsorted(bounds, places, side="right") - 1
        inside, of = places - bounds[entry], entry % num
        document = documents[of]
        fresh = (inside > 0) & ~is_cut[document]
        return before[entry] + inside * costs[of], np.where(fresh, costs[of], 0)

    low, split_low = at(starts)
    high, split_high = at(starts + quota)
    target = int(before[num]) * quota // total
    over = high - low - target
    splits = split_low + split_high
    near = np.flatnonzero(np.abs(over) * _NEAR <= target)
    if len(near):
        return int(starts[near[np.lexsort((np.abs(over[near]), splits[near]))[0]]])
    # Between two such places the cost of an arc changes evenly.
    after = np.roll(over, -1)
    turns = np.flatnonzero((over < 0) != (after < 0))
    if not len(turns):
        return int(starts[np.argmin(np.abs(over))])
    turn = int(turns[np.argmin(splits[turns] + np.roll(splits, -1)[turns])])
    first, following = int(starts[turn]), int(starts[(turn + 1) % len(starts)])
    if following <= first:
        following += total
    here, there = int(over[turn]), int(after[turn])
    return (first + (following - first) * here // (here - there)) % total


def _take(
    circle: list[tuple[int, int]], start: int, quota: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """An arc of a circle, and what is left, from the arc's end on."""
    turned: list[tuple[int, int]] = []
    offset, head = 0, []
    for document, size in circle:
        low = min(max(start - offset, 0), size)
        if low:
            head.append((document, low))
        if low < size:
            turned.append((document, size - low))
        offset += size
    turned += head
    taken, left = [], []
    for document, size in turned:
        count = min(size, quota)
        quota -= count
        if count:
            taken.append((document, count))
        if count < size:
            left.append((document, size - count))
    return taken, left


def _zigzag(share: _Share) -> list[tuple[int, int, int]]:
    """(rank, first unit, end): the ranks inwards from both ends of a document."""
    low, high, placed = 0, sum(share.values()), 0
    found = []
    for number, (rank, count) in enumerate(share.items()):
        if number == len(share) - 1:
            found.append((rank, low, high))
            break
        # Odd counts give one more to either end in turn.
        head = (placed + count) // 2 - placed // 2
        placed += count
        tail = count - head
        if head:
            found.append((rank, low, low + head))
        if tail:
            found.append((rank, high - tail, high))
        low, high = low + head, high - tail
    return found


def _consecutive(share: _Share) -> list[tuple[int, int, int]]:
    """(rank, first unit, end): one part of a document for each rank."""
    found, low = [], 0
    for rank, count in share.items():
        found.append((rank, low, low + count))
        low += count
    return found


def _starts(lengths: tuple[int, ...]) -> list[int]:
    """Position in the sequence at which each document begins."""
    starts, position = [], 0
    for length in lengths:
        starts.append(position)
        position += length
    return starts
