"""Which device a rank computes on, and which backend its process groups use."""

from dataclasses import dataclass
from typing import Literal

import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]

_CHOICES: tuple[DeviceChoice, ...] = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Device:
    """The device of one rank.

    Attributes:
        type: "cpu" (a host) or "cuda".
        index: Index of the GPU on this machine; 0 on a host.
    """

    type: Literal["cpu", "cuda"]
    index: int = 0

    @property
    def torch(self) -> torch.device:
        """The device as torch names it."""
        return torch.device("cpu") if self.type == "cpu" else torch.device("cuda", self.index)

    @property
    def backend(self) -> str:
        """Backend for `init_process_group`; on a GPU, host tensors travel by gloo."""
        return "gloo" if self.type == "cpu" else "cpu:gloo,cuda:nccl"


def resolve_device(choice: DeviceChoice | str = "auto", *, local_rank: int = 0) -> Device:
    """Turn `--device` into the device of this rank.

    A launcher that shows each rank only its own GPU leaves one visible: that one is taken.

    Args:
        choice: "auto" takes a GPU where there is one.
        local_rank: Rank within this machine; picks among several visible GPUs.

    Raises:
        ValueError: An unknown choice, "cuda" without a GPU, or fewer GPUs than ranks on a machine.
    """
    if choice not in _CHOICES:
        raise ValueError(f"unknown --device {choice!r}: expected one of {', '.join(_CHOICES)}")
    if choice == "cpu":
        return Device("cpu")
    if not torch.cuda.is_available():
        if choice == "cuda":
            raise ValueError(
                "--device cuda, but torch sees no GPU on this machine: "
                "pass --device cpu, or check the driver and CUDA_VISIBLE_DEVICES"
            )
        return Device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:
        return Device("cuda", 0)
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} has no GPU: {visible} are visible on this machine; "
            f"start at most {visible} ranks per machine, or pass --device cpu"
        )
    return Device("cuda", local_rank)
