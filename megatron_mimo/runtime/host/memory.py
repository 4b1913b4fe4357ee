"""Settings of the C library's memory allocator on a host."""

import ctypes
import os

# Options of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
# The most that glibc raises its threshold to by itself, and that older ones let it be raised to.
_LARGEST_BY_DEFAULT = 32 << 20


def keep_freed_memory() -> None:
    """Keep freed buffers in the process, so that large buffers reuse their memory.

    By default glibc maps every large buffer again and returns it to the kernel when it is freed,
    and the kernel clears it each time: a quarter of a training step of a vision encoder. Nothing
    changes where the environment sets glibc's thresholds, or with another C library.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    if not _set_thresholds(_LARGEST, _LARGEST):
        _set_thresholds(_LARGEST_BY_DEFAULT, _LARGEST)


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: restore the thresholds that glibc reaches by itself."""
    _set_thresholds(_LARGEST_BY_DEFAULT, 2 * _LARGEST_BY_DEFAULT)


def _set_thresholds(mapped: int, trimmed: int) -> bool:
    """Set the sizes from which buffers are mapped and memory is returned; whether it worked."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_MMAP_THRESHOLD, mapped) and mallopt(_TRIM_THRESHOLD, trimmed)
    )
