"""Copies of tensors in host memory, to be read while training changes the originals."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes; what a vector register or a device's copy engine likes to begin at.
_ALIGNMENT = 64


class HostCopy:
    """Host memory for repeated copies of the same tensors; page-locked for tensors of a GPU.

    Each copy has a storage of its own, so that a file of it holds its bytes and no others.
    """

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors into host memory, over the copies of the last call.

        Args:
            tensors: Contiguous tensors [...] of any shapes and dtypes. New memory is allocated only
                when shapes, dtypes or devices differ from those of the last call.

        Returns:
            Copies on the host, each with the shape [...] and dtype of its original.
        """
        fitting = len(tensors) == len(self._copies) and all(
            tensor.shape == copy.shape and tensor.dtype == copy.dtype
            for tensor, copy in zip(tensors, self._copies, strict=True)
        )
        if not fitting:
            self._copies = []
            self._copies = _allocate(tensors)
        for tensor, copy in zip(tensors, self._copies, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return self._copies


def _allocate(tensors: Sequence[Tensor]) -> list[Tensor]:
    # At least one unit: numpy's strides are odd without any.
    sizes = [math.ceil((tensor.nbytes or 1) / _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    memory = torch.empty(
        sum(sizes), dtype=torch.uint8, pin_memory=any(tensor.is_cuda for tensor in tensors)
    ).numpy()
    copies, start = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        # By way of numpy a slice is a storage of its own.
        own = torch.from_numpy(memory[start : start + tensor.nbytes])
        copies.append(own.view(tensor.dtype).view(tensor.shape))
        start += size
    return copies
