"""Buffers for rows that arrive, kept from one microbatch to the next."""

import torch
from torch import Tensor

# Capacities are multiples of this, so that microbatches of similar size share a buffer.
_ROWS = 256


class BufferPool:
    """Reusable buffers of one width and dtype.

    A fresh tensor of some megabytes is mapped by the kernel page by page on a host, which costs
    more than filling it.

    Args:
        width: Elements of a row.
        dtype: Of the elements.
        device: Where they live.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._width = width
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []

    def take(self, rows: int) -> Tensor:
        """A buffer with at least this many rows; its content is undefined."""
        if not rows:
            return torch.empty(0, self._width, dtype=self._dtype, device=self._device)
        fitting = [i for i, buffer in enumerate(self._free) if buffer.shape[0] >= rows]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].shape[0]))
        if self._free:
            # Outgrown: its place is taken, so the pool holds no more than were ever in use at once.
            self._free.pop()
        capacity = -(-rows // _ROWS) * _ROWS
        return torch.empty(capacity, self._width, dtype=self._dtype, device=self._device)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; nobody may read it any more."""
        if buffer.shape[0]:
            self._free.append(buffer)
