"""Fixtures that every test may ask for."""

import sys
from collections.abc import Iterator

import pytest

from tests.harness import RankPool, RunRanks


def pytest_collection_finish() -> None:
    """Refuse test modules that import megatron-core before anything has prepared it for a host."""
    if "megatron.core" in sys.modules:
        raise pytest.UsageError(
            "a test module imports megatron.core, directly or not, when it is collected: import "
            "inside functions that run_ranks runs"
        )


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RunRanks]:
    """`run_ranks(world_size, fn, *args, timeout=60.0)`: `fn(*args)` on each of some gloo ranks.

    Returns the list of results by rank. Processes start with the first call of the session and
    are reused; see `tests.harness.RankPool.run`.
    """
    pool = RankPool()
    yield pool.run
    pool.close()
