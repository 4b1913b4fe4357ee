"""What a device can compute at most."""

import torch

from megatron_mimo.runtime.device import Device

# Dense 16-bit products with 32-bit sums, TFLOP/s, from NVIDIA's data sheets; where those give only
# the figure with sparsity, half of it. By words of the device's name, the first match counts.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB200",), 2500.0),
    (("B200",), 2250.0),
    (("GH200",), 989.4),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.4),
    (("H100", "NVL"), 835.5),
    (("H100", "PCIe"), 756.0),
    (("H100",), 989.4),
    (("H800", "PCIe"), 756.0),
    (("H800",), 989.4),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("L40S",), 362.0),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("A40",), 149.7),
    (("A30",), 165.0),
    (("A10",), 125.0),
)
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def peak_tflops(device: Device, dtype: torch.dtype) -> float | None:
    """Peak TFLOP/s of a device in matrix products of a dtype; None where unknown, as on a host."""
    if device.type == "cpu" or dtype not in _SIXTEEN_BIT:
        return None
    return peak_of_name(torch.cuda.get_device_name(device.index))


def peak_of_name(name: str) -> float | None:
    """Dense 16-bit TFLOP/s of a GPU by the name that its driver reports; None where unknown."""
    words = name.replace("-", " ").split()
    return next((peak for known, peak in _PEAKS if set(known) <= set(words)), None)
