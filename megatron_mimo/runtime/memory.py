"""How much memory a process has used."""

import resource

import torch

from megatron_mimo.runtime.device import Device


def peak_memory(device: Device) -> int:
    """Most bytes that this process has used so far: allocated on a GPU, resident on a host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.index)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
