"""Fixtures that every test may ask for."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import properties  # noqa: F401, registers the profiles
from tests.fused import packages as fused
from tests.harness import RankPool, RunRanks
from tests.harness.cost import CostMeter, CostReport
from tests.harness.packages import PackagePools
from tests.harness.slices import SLICES, slow_slice, split
from tests.interpreted import packages as interpreted


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's own options."""
    parser.addoption(
        "--processor-budget",
        type=float,
        metavar="SECONDS",
        help="fail when all tests together cost half as much again in processor time",
    )
    parser.addoption(
        "--slow-slice",
        type=slow_slice,
        metavar="N",
        help=f"of the tests marked slow run every {SLICES}th, beginning with number N from 0",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which slow tests are run, so that the same run can be asked for again."""
    number = config.getoption("--slow-slice")
    return None if number is None else f"slow tests: --slow-slice {number} of {SLICES}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests to other slices."""
    number = config.getoption("--slow-slice")
    if number is not None:
        items[:], left = split(items, number)
        config.hook.pytest_deselected(items=left)


def pytest_configure(config: pytest.Config) -> None:
    """Measure what tests cost where they run, and report it where the user looks."""
    has_workers = bool(config.getoption("numprocesses", None))
    if not has_workers:
        config.pluginmanager.register(CostMeter())
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(CostReport(config.getoption("--processor-budget")))


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


@pytest.fixture(scope="session")
def run_fused() -> Iterator[Callable[..., list[Any]]]:
    """`run_fused(version, world_size, fn, *args)`: `run_ranks` over Transformer Engine's layers.

    Its Python code of that version, with stand-ins for its kernels; see `tests.fused`.
    """
    pools = PackagePools(fused.VARIABLE, fused.folder_of)
    yield pools.run
    pools.close()


@pytest.fixture(scope="session")
def run_interpreted() -> Iterator[Callable[..., list[Any]]]:
    """`run_interpreted(version, world_size, fn, *args)`: `run_ranks` with mamba-ssm's kernels.

    Those of that version, run by Triton's interpreter; see `tests.interpreted`.
    """
    pools = PackagePools(interpreted.VARIABLE, interpreted.folders_of)
    yield pools.run
    pools.close()
