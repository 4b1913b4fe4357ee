"""How the C library hands memory out on a host."""

import ctypes
import os

# Options of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
# The most that glibc raises its threshold to by itself, and that older ones let it be raised to.
_LARGEST_BY_DEFAULT = 32 << 20


def keep_freed_memory() -> None:
    """Let large buffers come from memory that was freed before.

    By default glibc maps every large buffer anew and gives it back when freed, and the kernel
    clears it each time: a quarter of a training step of a vision encoder. Where the environment
    sets glibc's thresholds, or the C library is another, nothing changes.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    if not _set_thresholds(_LARGEST, _LARGEST):
        _set_thresholds(_LARGEST_BY_DEFAULT, _LARGEST)


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: the thresholds that glibc arrives at by itself."""
    _set_thresholds(_LARGEST_BY_DEFAULT, 2 * _LARGEST_BY_DEFAULT)


def _set_thresholds(mapped: int, trimmed: int) -> bool:
    """From which size on buffers are mapped, and free memory given back; whether it worked."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_MMAP_THRESHOLD, mapped) and mallopt(_TRIM_THRESHOLD, trimmed)
    )
