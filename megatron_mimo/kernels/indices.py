"""Indices that are counted out on the host, on their way to the device."""

import torch
from torch import Tensor


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """An index on a device, without waiting for it.

    A copy from memory that is not page-locked would wait for all that the device has to do.

    Args:
        index: Index of any shape [...], on the host.
        device: Device of the tensors that it is for.
    """
    if device in (index.device, torch.device("meta")):
        return index.to(device)
    return index.pin_memory().to(device, non_blocking=True)
