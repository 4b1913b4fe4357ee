"""A part of the slow tests at a time, so that every change meets some and ten changes meet all."""

from collections.abc import Sequence

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
