"""Bytes of the device that a paper rank would hold."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class DeviceBytes:
    """Counts the storages of device tensors from their creation until nothing refers to them.

    A storage counts with all of its bytes, once, however many tensors view it. What a kernel
    allocates and frees again inside of one operation is not seen, nor is what an allocator loses by
    rounding and fragmentation.

    Attributes:
        held: Bytes that are held now.
        peak: Largest number of bytes since `begin`.
    """

    def __init__(self) -> None:
        self.held = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """Begin to look for the peak anew."""
        self.peak = self.held

    def see(self, result: Any) -> None:
        """Count the storages of an operation's result: a tensor, or a sequence of such results."""
        if isinstance(result, Tensor):
            if result.is_meta:
                self._add(result.untyped_storage())
        elif isinstance(result, list | tuple):
            for part in result:
                self.see(part)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        # torch keeps this object as long as the storage itself.
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors [...], each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
