"""Processes of tests, those that outlive their parents included."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 5.0


def adopt_orphans() -> None:
    """Let processes whose parents end become children of this one, where Linux can do so.

    Their processor time then counts as that of children, and none is lost sight of.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(group: int) -> None:
    """Ask all processes below this one to end, kill those that do not, and collect them.

    Args:
        group: Process group of which all are ended where a system has no list of processes to read.
    """
    if sys.platform != "linux":
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        return
    deadline = time.monotonic() + _GRACE_S
    how = signal.SIGTERM
    while left := _descendants():
        if time.monotonic() > deadline:
            how = signal.SIGKILL
        for process in left:
            _send(process, how)
        _collect()
        time.sleep(0.05)


def _descendants() -> list[int]:
    """Processes below this one that have not ended, or not been collected."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of the program, in brackets, may hold anything.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _send(process: int, how: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, how)


def _collect() -> None:
    """Let children that have ended go."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
