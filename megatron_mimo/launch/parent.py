"""A process that ends together with its parent. Linux only; imports no other module of ours.

Asked for before anything that takes time, since a parent may be killed at any moment.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends.

    Args:
        parent: Process id of the parent, as the parent itself told it. If it has ended already, the
            kernel has nothing to watch, so this process kills itself.
    """
    _signal_at_end_of_parent(signal.SIGKILL)
    # In this order: a parent that ends between both lines is noticed by the kernel.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Have the kernel leave this process alone when its parent ends."""
    _signal_at_end_of_parent(0)


def _signal_at_end_of_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
