"""Plans of packed attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.kernels.segments import SegmentGroup, Span, plan_in_place, plan_segments, spans


def cumulate(lengths: list[int]) -> tuple[int, ...]:
    """Boundaries of segments end to end."""
    return (0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist())


def plan_of(lengths: list[int], tail: int = 0):
    total = sum(lengths) + tail
    found = spans(cumulate(lengths), None, total, "cu_seqlens")
    return plan_segments(found, found, total)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 3, 5, 5], [2, 7, 1], [6]])
def test_tokens_that_lie_in_order_are_not_moved(lengths: list[int]) -> None:
    plan = plan_of(lengths)
    assert plan.q_order is None and plan.kv_order is None and plan.out_order is None


def test_equal_lengths_are_one_batch() -> None:
    plan = plan_of([2, 3, 2])
    assert plan.groups == (SegmentGroup(2, 2, 2), SegmentGroup(1, 3, 3))
    assert plan.q_order is not None
    assert plan.q_order.tolist() == [0, 1, 5, 6, 2, 3, 4]


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(0, 3))
def test_order_is_undone_and_the_rest_is_zero(lengths: list[int], tail: int) -> None:
    plan = plan_of(lengths, tail)
    total = sum(lengths) + tail
    tokens = torch.arange(1, total + 1)
    moved = tokens if plan.q_order is None else tokens[plan.q_order]
    moved = moved[: sum(group.count * group.q_length for group in plan.groups)]
    back = torch.cat([moved, moved.new_zeros(1)])
    back = moved if plan.out_order is None else back[plan.out_order]
    expected = tokens.clone()
    expected[sum(lengths) :] = 0
    assert back.tolist() == expected.tolist()


def test_padded_slots_place_segments() -> None:
    assert spans((0, 3, 5), (0, 4, 8), 8, "cu_seqlens_q") == (Span(0, 3), Span(4, 2))


@pytest.mark.parametrize(
    ("boundaries", "padded", "message"),
    [
        ((0, 4, 11), None, r"cu_seqlens_q spans \[0, 11\).*10 tokens"),
        ((0, 6, 4, 10), None, "segment 1 has -2 tokens"),
        ((0, 5, 10), (0, 4, 10), "segment 0 has 5 tokens in a slot of 4"),
        ((0, 5, 10), (0, 10), "bounds 2 segments and cu_seqlens_q_padded 1"),
    ],
)
def test_boundaries_that_cannot_be(
    boundaries: tuple[int, ...], padded: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spans(boundaries, padded, 10, "cu_seqlens_q")


def test_queries_and_keys_have_the_same_segments() -> None:
    with pytest.raises(ValueError, match="queries are cut in 1 segments, keys and values in 2"):
        plan_segments((Span(0, 4),), (Span(0, 2), Span(2, 2)), 4)


def test_segments_in_place_are_batched_with_equal_neighbours_only() -> None:
    plan = plan_in_place((2, 2, 0, 2, 3, 2))
    assert plan.q_order is plan.kv_order is plan.out_order is None
    assert plan.groups == (
        SegmentGroup(2, 2, 2),
        SegmentGroup(1, 2, 2),
        SegmentGroup(1, 3, 3),
        SegmentGroup(1, 2, 2),
    )
