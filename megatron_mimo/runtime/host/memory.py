"""How the C library hands memory out on a host."""

import ctypes
import os

# Options of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
# Older glibc refuses a higher threshold.
_LARGEST_OF_OLD_GLIBC = 32 << 20


def keep_freed_memory() -> None:
    """Let large buffers come from memory that was freed before.

    By default glibc maps every large buffer anew and gives it back when freed, and the kernel
    clears it each time: a quarter of a training step of a vision encoder. Where the environment
    sets glibc's thresholds, or the C library is another, nothing changes.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
    mallopt(_TRIM_THRESHOLD, _LARGEST)
