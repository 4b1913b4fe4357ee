"""Processes of tests, those that outlive their parents included."""

import ctypes
import sys
from contextlib import suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 5.0


def adopt_orphans() -> None:
    """Let processes whose parents end become children of this one, where Linux can do so.

    Their processor time then counts as that of children, and none is lost sight of.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Ask all processes below this one to end, kill those that do not, and collect them."""
    me = psutil.Process()
    grace_s = _GRACE_S
    while left := me.children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.terminate() if grace_s else process.kill()
        _, alive = psutil.wait_procs(left, timeout=grace_s or _GRACE_S)
        # What starts after the first round is given no more time.
        grace_s = 0.0 if alive else grace_s
