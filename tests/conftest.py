"""Fixtures that every test may ask for."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.harness import RankPool, RunRanks  # noqa: E402  # needs the line above


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RunRanks]:
    """`run_ranks(world_size, fn, *args, timeout=60.0)`: `fn(*args)` on each of some gloo ranks.

    Returns the list of results by rank. Processes start with the first call of the session and
    are reused; see `tests.harness.RankPool.run`.
    """
    pool = RankPool()
    yield pool.run
    pool.close()
