"""What each test costs in processor time, all its ranks and programs included.

Wall time says little on a machine that does other work too. Processor time is what a process and
its descendants have used: a child that ends adds its time to that of its parent, so that the sum
over the living tree never falls.
"""

import psutil
import pytest

PROPERTY = "processor seconds"
"""Name under which a phase's cost travels in its report, from a worker of xdist too."""

SLOWEST = 20
TOLERANCE = 1.5
"""A busy machine costs more processor time too, since caches and cores are shared."""


def tree_seconds() -> float:
    """Processor time in seconds of this process and all its descendants, ended or alive."""
    own = psutil.Process()
    return sum(map(_seconds, [own, *own.children(recursive=True)]))


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    # The last two are the children's that ended, where the system keeps them.
    return sum(times[:4])


class CostMeter:
    """Adds to each phase's report what it cost. Runs where the tests run."""

    def __init__(self) -> None:
        self._last = tree_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):  # type: ignore[no-untyped-def]
        report = yield
        now = tree_seconds()
        report.user_properties.append((PROPERTY, max(0.0, now - self._last)))
        self._last = now
        return report


class CostReport:
    """Sums what the tests cost, shows the dearest, and holds the sum against a budget."""

    def __init__(self, budget_s: float | None) -> None:
        self.by_test: dict[str, float] = {}
        self.budget_s = budget_s

    @property
    def total_s(self) -> float:
        """Processor time in seconds of all tests so far."""
        return sum(self.by_test.values())

    @property
    def is_over(self) -> bool:
        """Whether the sum passes the budget by more than half."""
        return self.budget_s is not None and self.total_s > TOLERANCE * self.budget_s

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == PROPERTY:
                self.by_test[report.nodeid] = self.by_test.get(report.nodeid, 0.0) + float(value)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.is_over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.by_test:
            return
        write = terminalreporter.write_line
        dearest = sorted(self.by_test.items(), key=lambda entry: -entry[1])[:SLOWEST]
        terminalreporter.section(f"the {len(dearest)} dearest tests, in s of processor time")
        for name, seconds in dearest:
            write(f"{seconds:8.1f}  {name}")
        write(f"{self.total_s:8.1f}  in all, of {len(self.by_test)} tests")
        if self.budget_s is not None:
            write(
                f"{self.budget_s:8.1f}  is the budget"
                + (
                    ", passed by more than half: make tests cheaper, or mark what is dear `slow`"
                    if self.is_over
                    else ""
                ),
                red=self.is_over,
            )
