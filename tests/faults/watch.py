"""A pytest plugin that writes down how a run went, in a file that a killed run leaves behind too.

Lines of JSON in the file named by `FAULTS_WATCH`: which test began, which failed, and why. Ranks
have several times as long as in a run of the tests alone, so that a busy machine does not look like
a fault.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import RankPool

VARIABLE = "FAULTS_WATCH"
COLLECTION = "collection"
PATIENCE = 5
"""Times the limit of each call on ranks."""


def pytest_configure() -> None:
    """Give ranks more time."""
    run = RankPool.run

    def patient(
        pool: RankPool,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
    ) -> list[Any]:
        return run(pool, world_size, fn, *args, timeout=PATIENCE * timeout)

    RankPool.run = patient  # type: ignore[assignment, method-assign]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be collected is no finding."""
    if report.failed:
        _write({"failed": report.nodeid, "when": COLLECTION, "why": ""})


def pytest_runtest_logstart(nodeid: str) -> None:
    """Whoever reads the file knows where a killed run stood."""
    _write({"began": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failed test, or its set-up, whose fixtures run the reference."""
    if report.failed:
        _write({"failed": report.nodeid, "when": report.when, "why": _why(report.longreprtext)})


def _why(text: str) -> str:
    """The line of a failure that says most: of a rank's error, if ranks failed."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
    first = lines[0] if lines else ""
    if "RanksFailed" not in first:
        return first
    return next((line for line in lines[1:] if re.match(r"[\w.]*Error: ", line)), first)


def _write(line: dict[str, str | None]) -> None:
    path = os.environ.get(VARIABLE)
    if path is not None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
