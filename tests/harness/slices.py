"""A part of the slow tests at a time, so that every change meets some and ten changes meet all."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

SLICES = 11
"""A prime number: whatever number of commits lies between two runs of CI, but for a multiple of
it, as many runs in a row meet every slice."""


def slow_slice(value: str) -> int:
    """The number of a slice, as `--slow-slice` takes it.

    Raises:
        ValueError: It is no number; pytest names the option.
    """
    number = int(value)
    if not 0 <= number < SLICES:
        raise pytest.UsageError(f"--slow-slice {number}: expected 0 to {SLICES - 1}")
    return number


def split(items: Sequence[pytest.Item], number: int) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """What a run keeps, and which slow tests it leaves to other slices."""
    seen, kept, left = 0, [], []
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        (left if is_slow and seen % SLICES != number else kept).append(item)
        seen += is_slow
    return kept, left


def slow_but(values: Iterable[Any], *everyday: Any) -> list[Any]:
    """Values of a parameter, of which all but some are for slow tests.

    Raises:
        ValueError: One of `everyday` is none of the values.
    """
    every = list(values)
    unknown = [value for value in everyday if value not in every]
    if unknown:
        raise ValueError(f"no values: {unknown}; expected some of {every}")
    return [
        value if value in everyday else pytest.param(value, marks=pytest.mark.slow)
        for value in every
    ]
