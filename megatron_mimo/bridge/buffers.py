"""Buffers for received rows, kept from one microbatch to the next."""

import torch
from torch import Tensor

# Capacities are multiples of this, so that microbatches of similar size share a buffer.
_ROWS = 256


class BufferPool:
    """Reusable buffers of one width and dtype.

    A fresh tensor of some megabytes is mapped by the kernel page by page on a host, which costs
    more than filling it.

    Args:
        width: Number of elements of a row.
        dtype: Dtype of the elements.
        device: Device of the buffers.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._width = width
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []

    def take(self, rows: int) -> Tensor:
        """Take a buffer [at least `rows`, width] with undefined content."""
        if not rows:
            return torch.empty(0, self._width, dtype=self._dtype, device=self._device)
        fitting = [i for i, buffer in enumerate(self._free) if buffer.shape[0] >= rows]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].shape[0]))
        if self._free:
            # Too small: replaced, so the pool never has more buffers than were in use at once.
            self._free.pop()
        capacity = -(-rows // _ROWS) * _ROWS
        return torch.empty(capacity, self._width, dtype=self._dtype, device=self._device)

    def give(self, buffer: Tensor) -> None:
        """Return a buffer [N, width] of `take` to the pool; it must not be used any more."""
        if buffer.shape[0]:
            self._free.append(buffer)
