"""What a rank of a cut sequence attends to: tokens of its own, and those that other ranks send.

Integers and index tensors only. A document is *split* if several ranks hold tokens of it. Keys and
values of split documents are gathered over all ranks; those of other documents stay where they are.

Under a causal mask, every piece of a document attends to itself, with the triangle of the mask, and
to all keys before it, which are gathered; the two parts of its softmax are merged. Without a mask,
pieces of a split document attend to all of it at once.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.kernels.cut import DocumentCut, Piece
from megatron_mimo.kernels.indices import to_device
from megatron_mimo.kernels.segments import (
    SegmentGroup,
    SegmentPlan,
    Span,
    plan_in_place,
    plan_segments,
)


@dataclass(frozen=True, slots=True)
class Part:
    """Queries that attend to keys, segment by segment.

    Attributes:
        groups: Shapes of the segments, in the order of their tokens.
        queries: Index of each query among the tokens of the rank, int64; None for all of them.
        keys: Index of each key, int64: among the tokens of the rank, or among those that were
            gathered; None for all of them.
    """

    groups: tuple[SegmentGroup, ...]
    queries: Tensor | None
    keys: Tensor | None


@dataclass(frozen=True, slots=True)
class CutPlan:
    """Attention of one rank.

    Attributes:
        num_tokens: Number of tokens of the rank.
        own: What attends to keys of the rank itself.
        gathered: What attends to gathered keys; no mask hides any of them.
        sent: Index among the tokens of the rank of those that it sends, int64.
        slots: Number of tokens that are gathered from each rank, of which those after the ones
            that it sends are padding; 0 where nothing is gathered, by any rank.
    """

    num_tokens: int
    own: Part
    gathered: Part
    sent: Tensor
    slots: int


@lru_cache(maxsize=32)
def plan_cut(cut: DocumentCut, rank: int, causal: bool, device: torch.device) -> CutPlan:
    """Plan the attention of a rank; layers share a plan, hence the cache.

    Args:
        cut: Which rank holds which tokens.
        rank: The rank.
        causal: Whether tokens attend only to those before them.
        device: Device of the indices.
    """
    split = frozenset(cut.split)
    places, slots = _places(cut)
    own, queries, keys, sent = [], [], [], []
    arrivals: list[NDArray[np.int64]] = []
    offset = num_keys = 0
    for piece in _runs(cut.pieces[rank], apart=causal):
        span = Span(offset, piece.stop - piece.start)
        offset += span.length
        if causal or piece.document not in split:
            own.append(span)
        if piece.document in split:
            sent.append(np.arange(span.start, offset))
            end = piece.start if causal else cut.lengths[piece.document]
            queries.append(span)
            keys.append(Span(num_keys, end))
            arrivals.append(places[piece.document][:end])
            num_keys += end
    before = plan_segments(tuple(queries), tuple(keys), offset)
    if causal:
        # All tokens, which stay in place, as in attention of one rank.
        itself = plan_in_place(tuple(span.length for span in own))
    else:
        itself = plan_segments(tuple(own), tuple(own), offset)
    arrival = _tensor(arrivals)
    if before.kv_order is not None:
        arrival = arrival[before.kv_order]

    def there(index: Tensor | None) -> Tensor | None:
        return None if index is None else to_device(index, device)

    chosen = there(_queries(itself, offset))
    return CutPlan(
        num_tokens=offset,
        own=Part(itself.groups, queries=chosen, keys=chosen),
        gathered=Part(before.groups, there(_queries(before, offset)), keys=there(arrival)),
        sent=to_device(_tensor(sent), device),
        slots=slots,
    )


def _runs(pieces: tuple[Piece, ...], *, apart: bool) -> list[Piece]:
    """Pieces, of which those are one that follow each other: `start` of the first, tokens of both.

    Without a mask it does not matter where in the document queries stand, so that pieces of one
    document are one even where they are `apart`.
    """
    runs: list[Piece] = []
    for document, start, stop in pieces:
        last = runs[-1] if runs else None
        if start == stop:
            continue
        if last is None or last.document != document or (apart and last.stop != start):
            runs.append(Piece(document, start, stop))
        else:
            runs[-1] = Piece(document, last.start, last.stop + stop - start)
    return runs


def _places(cut: DocumentCut) -> tuple[dict[int, NDArray[np.int64]], int]:
    """Index among gathered tokens of each token of the split documents, and slots of a rank."""
    split = cut.split
    sizes = [
        sum(piece.stop - piece.start for piece in pieces if piece.document in split)
        for pieces in cut.pieces
    ]
    slots = max(sizes, default=0)
    places = {document: np.empty(cut.lengths[document], dtype=np.int64) for document in split}
    for rank, pieces in enumerate(cut.pieces):
        place = rank * slots
        for document, start, stop in pieces:
            if document in places:
                places[document][start:stop] = np.arange(place, place + stop - start)
                place += stop - start
    return places, slots


def _queries(plan: SegmentPlan, num_tokens: int) -> Tensor | None:
    """Index of each query of a plan; None where they are all tokens in their order."""
    if plan.q_order is not None:
        return plan.q_order
    used = sum(group.count * group.q_length for group in plan.groups)
    return None if used == num_tokens else torch.arange(used)


def _tensor(indices: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *indices]))
