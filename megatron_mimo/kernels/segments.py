"""How packed (thd) attention batches its segments: those of equal length run together."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens: index of the first, and their number."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments of one shape, run as one batch.

    Attributes:
        count: Number of segments.
        q_length: Number of query tokens of each segment.
        kv_length: Number of key and value tokens of each segment.
    """

    count: int
    q_length: int
    kv_length: int


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Order of tokens in which the groups are contiguous.

    Attributes:
        groups: Groups, in that order.
        q_order: Index of the query token at each place of that order, int64; None when tokens are
            in that order already.
        kv_order: Index of the key and value token at each place, int64; None as in `q_order`.
        out_order: Place from which each token's output is taken, int64 [T]; a token outside every
            segment names the place after the last, a row of zeros. None when tokens are in that
            order already.
    """

    groups: tuple[SegmentGroup, ...]
    q_order: Tensor | None
    kv_order: Tensor | None
    out_order: Tensor | None


def spans(
    boundaries: tuple[int, ...], padded: tuple[int, ...] | None, num_tokens: int, name: str
) -> tuple[Span, ...]:
    """Where the segments lie in a packed sequence.

    Args:
        boundaries: Cumulative lengths, N+1 of them.
        padded: Cumulative slots when segments are padded: segment i starts at `padded[i]`, and its
            length still comes from `boundaries`. None without padding between segments.
        num_tokens: Number of tokens T of the packed sequence.
        name: Name of the boundaries, for error messages.

    Raises:
        ValueError: Boundaries decrease, or lie outside the sequence or their slots.
    """
    slots = boundaries if padded is None else padded
    lengths = [end - start for start, end in pairwise(boundaries)]
    rooms = [end - start for start, end in pairwise(slots)]
    if len(lengths) != len(rooms):
        raise ValueError(
            f"{name} bounds {len(lengths)} segments and {name}_padded {len(rooms)}: "
            f"both need one entry more than there are segments"
        )
    if slots and (slots[0] < 0 or slots[-1] > num_tokens):
        raise ValueError(
            f"{name} spans [{slots[0]}, {slots[-1]}), but the packed sequence has {num_tokens} "
            f"tokens: boundaries count the tokens of the sequence that they are passed with"
        )
    for index, (length, room) in enumerate(zip(lengths, rooms, strict=True)):
        if not 0 <= length <= room:
            raise ValueError(
                f"{name}: segment {index} has {length} tokens in a slot of {room}; "
                f"boundaries must not decrease, and a segment must fit its slot"
            )
    return tuple(Span(start, length) for start, length in zip(slots, lengths, strict=False))


@lru_cache(maxsize=32)
def plan_segments(q_spans: tuple[Span, ...], kv_spans: tuple[Span, ...], num_q: int) -> SegmentPlan:
    """Group segments by shape, groups in the order in which their shapes first appear.

    Every layer of a model asks for the same plan, hence the cache. Segments without queries or
    without keys are left out; their outputs are zeros.

    Args:
        q_spans: Query tokens of each segment.
        kv_spans: Key and value tokens of each segment, in the same order.
        num_q: Number of query tokens T.

    Raises:
        ValueError: The numbers of segments differ.
    """
    if len(q_spans) != len(kv_spans):
        raise ValueError(
            f"queries are cut in {len(q_spans)} segments, keys and values in {len(kv_spans)}: "
            f"cu_seqlens_q and cu_seqlens_kv must bound the same segments"
        )
    members: dict[tuple[int, int], list[tuple[Span, Span]]] = {}
    for q_span, kv_span in zip(q_spans, kv_spans, strict=True):
        if q_span.length and kv_span.length:
            members.setdefault((q_span.length, kv_span.length), []).append((q_span, kv_span))
    ordered = [pair for pairs in members.values() for pair in pairs]
    q_order = _tokens([q for q, _ in ordered])
    kv_order = _tokens([kv for _, kv in ordered])
    out_order = torch.full((num_q,), q_order.numel(), dtype=torch.int64)
    out_order[q_order] = torch.arange(q_order.numel())
    q_in_place = _in_place(q_order)
    return SegmentPlan(
        groups=tuple(
            SegmentGroup(len(pairs), q_length, kv_length)
            for (q_length, kv_length), pairs in members.items()
        ),
        q_order=None if q_in_place else q_order,
        kv_order=None if _in_place(kv_order) else kv_order,
        out_order=None if q_in_place and q_order.numel() == num_q else out_order,
    )


def plan_in_place(lengths: tuple[int, ...]) -> SegmentPlan:
    """Plan of segments that attend to themselves and are contiguous: no token moves.

    Adjacent segments of equal length run as one batch.
    """
    runs = ((length, len(list(run))) for length, run in groupby(lengths) if length)
    groups = tuple(SegmentGroup(count, length, length) for length, count in runs)
    return SegmentPlan(groups, q_order=None, kv_order=None, out_order=None)


def _tokens(spans_: list[Span]) -> Tensor:
    if not spans_:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([torch.arange(span.start, span.start + span.length) for span in spans_])


def _in_place(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(order.numel()))
