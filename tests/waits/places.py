"""Which tensors would be on the device, and which host ones are page-locked.

A tensor is on the device if it is made there (`device=`), copied there, or computed from one that
is; views share their storage, so places are those of storages.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# The host by another name: torch computes as on a host, and the two can be told apart.
DEVICE = torch.device("cpu", 0)


def names_device(device: Any) -> bool:
    """Whether a `device` argument means the device."""
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return isinstance(device, torch.device) and (device == DEVICE or device.type == "cuda")


class Storages:
    """A set of storages that keeps none of them alive."""

    def __init__(self) -> None:
        # While a weak reference exists, no other storage has its number.
        self._known: dict[int, StorageWeakRef] = {}
        self._prune_at = 10_000

    def add(self, tensor: Tensor) -> None:
        """Add the storage of a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = StorageWeakRef(storage)
        if len(self._known) > self._prune_at:
            self._known = {n: ref for n, ref in self._known.items() if not ref.expired()}
            self._prune_at = 10_000 + 2 * len(self._known)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known


class Places:
    """Where tensors are.

    Attributes:
        device: What would be on the device.
        pinned: What would be in page-locked memory of the host.
        making: Whether a factory is running that was told where.
        finishing: Whether a message between ranks is being waited for.
    """

    def __init__(self) -> None:
        self.device = Storages()
        self.pinned = Storages()
        self.making = False
        self.finishing = False

    def on_device(self, tensor: Tensor) -> bool:
        """Whether a tensor would be on the device."""
        return tensor in self.device

    def copies_without_waiting(self, source: Tensor, non_blocking: bool) -> bool:
        """Whether a host tensor can be copied to the device while the host goes on."""
        return non_blocking and source in self.pinned
