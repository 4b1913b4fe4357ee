"""Choice of the device."""

import pytest
import torch

from megatron_mimo.runtime import Device, resolve_device
from megatron_mimo.runtime.device import computes_on_gpu


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with four GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    return monkeypatch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_host_without_a_gpu(no_gpu: None, choice: str) -> None:
    device = resolve_device(choice, local_rank=3)
    assert (device.torch, device.backend) == (torch.device("cpu"), "gloo")


def test_cuda_without_a_gpu_is_refused(no_gpu: None) -> None:
    with pytest.raises(ValueError, match="--device cuda.*--device cpu"):
        resolve_device("cuda")


def test_unknown_choice_names_the_known(no_gpu: None) -> None:
    with pytest.raises(ValueError, match="'gpu'.*auto, cpu, cuda"):
        resolve_device("gpu")


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_local_rank_picks_the_gpu(gpus: pytest.MonkeyPatch, choice: str) -> None:
    device = resolve_device(choice, local_rank=2)
    assert device.torch == torch.device("cuda", 2)
    assert device.backend == "nccl"


def test_a_host_may_be_asked_for_beside_gpus(gpus: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu", local_rank=2) == Device("cpu")


def test_a_gpu_is_computed_on_where_there_is_one(gpus: pytest.MonkeyPatch) -> None:
    assert [computes_on_gpu(choice) for choice in ("auto", "cuda", "cpu")] == [True, True, False]
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    assert not computes_on_gpu("auto")


def test_the_only_visible_gpu_is_taken(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda", local_rank=3) == Device("cuda", 0)


def test_more_ranks_than_gpus_is_refused(gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="local rank 4 has no GPU: 4 are visible"):
        resolve_device("cuda", local_rank=4)
