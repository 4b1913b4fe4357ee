"""Ranges of a flattened tensor as rectangles of the tensor."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Elements of a tensor that are contiguous both as a box and in memory.

    Attributes:
        offset: First index in each dimension.
        size: Extent in each dimension.
        start: Index of its first element in the flattened tensor.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Cut elements [start, stop) of a row-major tensor into boxes, in order.

    A data-parallel rank of the distributed optimizer owns such a range, wherever its borders fall;
    boxes are what a sharded checkpoint stores. There are at most 2 N - 1 of them in N dimensions.

    Args:
        shape: Shape of the tensor; () has one element.
        start: Index of the first element.
        stop: Index after the last element.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Rectangle((start,) * len(shape), (stop - start,) * len(shape), start)
        return
    inner = math.prod(shape[1:])
    row, within = divmod(start, inner)
    if within:
        end = min(stop - row * inner, inner)
        yield from _in_row(shape, row, within, end)
        row += 1
    last = stop // inner
    if last > row:
        rest = tuple(shape[1:])
        yield Rectangle((row, *(0 for _ in rest)), (last - row, *rest), row * inner)
    if last >= row:
        yield from _in_row(shape, last, 0, stop - last * inner)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Rectangle]:
    base = row * math.prod(shape[1:])
    for inner in rectangles(shape[1:], start, stop):
        yield Rectangle((row, *inner.offset), (1, *inner.size), base + inner.start)
