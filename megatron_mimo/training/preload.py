"""Import once what every rank of a host needs, in the process that they are forked from."""

import ctypes
import gc
import signal
import sys

from megatron_mimo.runtime import prepare_engine, resolve_device

_PR_SET_PDEATHSIG = 1


def can_fork(device: str) -> bool:
    """Whether ranks may be forked from a process that has imported what they need.

    Not where they compute on a GPU: CUDA, once a process has asked for it, does not survive a
    fork. And only on Linux, as libraries of macOS do not survive one either.

    Args:
        device: The value of `--device`.

    Raises:
        ValueError: The device does not exist here.
    """
    return sys.platform == "linux" and resolve_device(device).type == "cpu"


def preload() -> None:
    """Import megatron-core and what training needs of ours; starts no thread.

    Call it where `can_fork`. What it made is kept from the garbage collector, so that no rank
    copies the memory that all share.
    """
    # None of it is garbage, and looking through it while it grows takes a tenth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        prepare_engine(resolve_device("cpu"))
        # They import megatron-core, so they come after it is prepared.
        import megatron_mimo.data.energon
        import megatron_mimo.runtime.hybrid
        import megatron_mimo.training.loop
        import megatron_mimo.training.metrics
        import megatron_mimo.training.setup  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()


def end_with_parent(number: signal.Signals | None) -> None:
    """Let this process get a signal when its parent ends, or none any more. Linux alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0 if number is None else int(number))
