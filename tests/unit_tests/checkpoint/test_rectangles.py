"""Ranges of flattened tensors, as boxes."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.checkpoint.rectangles import Rectangle, rectangles


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(ranges())
def test_boxes_hold_the_range_in_order_and_nothing_else(
    given_range: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = given_range
    whole = np.arange(math.prod(shape)).reshape(shape)
    found: list[int] = []
    boxes = list(rectangles(shape, start, stop))
    for box in boxes:
        inside = whole[tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))]
        assert inside.reshape(-1)[0] == box.start
        found += inside.reshape(-1).tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_whole_rows_are_one_box() -> None:
    assert list(rectangles((4, 3), 2, 11)) == [
        Rectangle((0, 2), (1, 1), 2),
        Rectangle((1, 0), (2, 3), 3),
        Rectangle((3, 0), (1, 2), 9),
    ]
