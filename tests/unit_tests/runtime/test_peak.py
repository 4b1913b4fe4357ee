"""What a device can do at most, and what it has used."""

import pytest
import torch

from megatron_mimo.runtime import Device
from megatron_mimo.runtime.memory import peak_memory
from megatron_mimo.runtime.peak import peak_of_name, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Some Other Card", None),
    ],
)
def test_known_names(name: str, peak: float | None) -> None:
    assert peak_of_name(name) == peak


def test_a_host_and_wide_numbers_have_no_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H200")
    assert peak_tflops(Device("cpu"), torch.bfloat16) is None
    assert peak_tflops(Device("cuda"), torch.float32) is None
    assert peak_tflops(Device("cuda"), torch.bfloat16) == 989.4


def test_the_peak_of_a_host_is_what_was_resident() -> None:
    before = peak_memory(Device("cpu"))
    assert before > 50 * 2**20
    held = torch.ones(before // 4 + 64 * 2**20)
    assert peak_memory(Device("cpu")) >= before + 32 * 2**20
    assert held.sum() > 0
