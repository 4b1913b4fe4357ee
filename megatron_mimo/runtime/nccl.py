"""Versions of NCCL: the one that torch was built for, and the one that this process has loaded.

torch finds NCCL's library when it is imported. Another package may bring an older one, or a
variable such as LD_LIBRARY_PATH may lead to one: then calls that torch makes are missing, or
behave otherwise.
"""

import ctypes
import sys

import torch

_LIBRARY = "libnccl.so.2"

Version = tuple[int, int, int]


def built_for() -> Version | None:
    """Version of NCCL that torch was built for; None where torch was built without it."""
    try:
        major, minor, patch = torch.cuda.nccl.version()[:3]
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return None
    return int(major), int(minor), int(patch)


def loaded() -> Version | None:
    """Version of the library that this process has loaded; None where torch holds it inside itself.

    It loads nothing: a library that torch did not ask for is none of a run.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        # The mode is RTLD_NOLOAD of Linux, which Python's os has no name for.
        library = ctypes.CDLL(_LIBRARY, mode=ctypes.DEFAULT_MODE | 0x4)
        number = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return _parts(number.value)


def too_old(built: Version | None, found: Version | None) -> str | None:
    """What is wrong with the loaded library, as "NCCL 2.18.3: expected ..."; None where it will do.

    Args:
        built: Version that torch was built for.
        found: Version that is loaded.
    """
    if built is None or found is None or found >= built:
        return None
    return (
        f"NCCL {_text(found)}: expected {_text(built)} or newer, for which torch "
        f"{torch.__version__} was built; install the nvidia-nccl package that torch asks for "
        f"again, and remove older ones from LD_LIBRARY_PATH and LD_PRELOAD"
    )


def describe() -> str | None:
    """The version in use, such as "2.29.7"; None without NCCL."""
    found = loaded() or built_for()
    return None if found is None else _text(found)


def _parts(number: int) -> Version:
    """Parts of NCCL's number: 22907 is 2.29.7; before 2.9 it had one digit less."""
    if number >= 10_000:
        return number // 10_000, number // 100 % 100, number % 100
    return number // 1_000, number // 100 % 10, number % 100


def _text(version: Version) -> str:
    return ".".join(map(str, version))
