"""The text of a failed call: which rank was first, what each rank saw, where it stood."""

import re
import signal
from dataclasses import dataclass

from tests.harness.messages import Raised, Returned

CONNECTION_LOST = re.compile(
    r"connection closed|connection reset|broken pipe|connection refused|socket closed",
    re.IGNORECASE,
)
"""Errors by which gloo and the store say that another rank is gone."""

_HARNESS_FRAME = re.compile(
    r'File "[^"]*(/multiprocessing/|/harness/worker\.py"|<frozen |<string>)|File "<(string|frozen)'
)


@dataclass(frozen=True, slots=True)
class Died:
    """The process ended by itself.

    Attributes:
        exit_code: Negative for a signal.
        stacks: What faulthandler wrote, of a crash.
    """

    exit_code: int | None
    stacks: str = ""

    @property
    def summary(self) -> str:
        """How it ended, in words."""
        if self.exit_code is not None and self.exit_code < 0:
            return f"died: killed by signal {-self.exit_code} ({_signal_name(-self.exit_code)})"
        return f"died: exit code {self.exit_code}"


@dataclass(frozen=True, slots=True)
class Cut:
    """The process was still busy when the call ended; `stacks` is what faulthandler wrote."""

    stacks: str


Outcome = Returned | Raised | Died | Cut


def failure_report(function: str, outcomes: list[Outcome], limit_s: float | None) -> str:
    """Describe a failed call.

    Args:
        function: name of the function that ran.
        outcomes: one for each rank.
        limit_s: the time limit that was passed, or None when a rank failed in time.
    """
    failures = {r: o for r, o in enumerate(outcomes) if isinstance(o, Raised | Died)}
    in_order = sorted(failures, key=lambda rank: _first_cause_first(failures[rank]))
    lines = [f"{function} failed on {len(outcomes)} ranks"]
    if limit_s is not None:
        lines[0] = f"{function} did not end within its limit of {limit_s:g} s"
    for place, rank in enumerate(in_order):
        failure = failures[rank]
        mark = " (first)" if place == 0 and len(outcomes) > 1 else ""
        text = (
            failure.traceback
            if isinstance(failure, Raised)
            else f"rank {rank} {failure.summary}\n{failure.stacks}"
        )
        lines += ["", f"---- rank {rank} failed{mark} ----", text.rstrip()]
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Cut):
            stacks = python_stacks(outcome.stacks)
            if limit_s is None:
                stacks = "\n".join(stacks.splitlines()[:4])
            lines += ["", f"---- rank {rank} was cut, still running in ----", stacks]
        elif isinstance(outcome, Returned):
            lines += ["", f"---- rank {rank} returned ----"]
    return "\n".join(lines)


def python_stacks(dump: str) -> str:
    """Leave the frames of the test in a dump of faulthandler; drop threads without any."""
    blocks = []
    for block in dump.strip().split("\n\n"):
        lines = block.splitlines()
        frames = [line for line in lines[1:] if not _HARNESS_FRAME.search(line)]
        if frames and "in _exit_with_parent" not in block:
            blocks.append("\n".join([lines[0], *frames]))
    return "\n\n".join(blocks) or "(no Python stack: the process was stopped, or has no frame)"


def _first_cause_first(outcome: Raised | Died) -> tuple[bool, float]:
    if isinstance(outcome, Raised):
        return bool(CONNECTION_LOST.search(outcome.summary)), outcome.moment
    return False, 0.0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
