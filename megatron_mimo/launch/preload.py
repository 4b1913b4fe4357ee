"""Import once what every rank of a host needs, in the process that they are forked from."""

import gc
import sys
from importlib import import_module

from megatron_mimo.runtime import prepare_megatron_core, resolve_device

# The rest of what a rank of training imports comes with them.
_NEEDED = (
    "megatron_mimo.data.reading.energon",
    "megatron_mimo.kernels.hybrid",
    "megatron_mimo.training.loop",
    "megatron_mimo.training.setup",
    "megatron_mimo.watch.metrics",
)


def can_fork(device: str) -> bool:
    """Whether ranks may be forked from a process that has imported what they need.

    Not where they compute on a GPU: CUDA does not survive a fork once a process has initialised it.
    And only on Linux, since libraries of macOS do not survive a fork either.

    Args:
        device: Value of `--device`.

    Raises:
        ValueError: The device does not exist on this machine.
    """
    return sys.platform == "linux" and resolve_device(device).type == "cpu"


def preload() -> None:
    """Import megatron-core and what training needs of ours; starts no thread.

    Call it only where `can_fork`. The objects that it creates are exempt from garbage collection,
    so that ranks do not copy the memory that they share.
    """
    # None of it is garbage, and looking through it while it grows takes a tenth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        prepare_megatron_core(resolve_device("cpu"))
        # They import megatron-core, so they come after it is prepared.
        for name in _NEEDED:
            import_module(name)
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
