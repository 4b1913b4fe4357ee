"""Which device a rank computes on, and which backend its process groups use."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]

_CHOICES: tuple[DeviceChoice, ...] = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Device:
    """The device of one rank.

    Attributes:
        type: "cpu" (a host), "cuda", or "meta", whose tensors have shapes and no content: a dry run
            computes on it.
        index: Index of the GPU on this machine; 0 on a host.
    """

    type: Literal["cpu", "cuda", "meta"]
    index: int = 0

    @property
    def torch(self) -> torch.device:
        """The device as torch names it."""
        return torch.device("cuda", self.index) if self.type == "cuda" else torch.device(self.type)

    @property
    def building(self) -> AbstractContextManager[object]:
        """Context in which modules are built: weights without content are not drawn on a host."""
        return self.torch if self.type == "meta" else nullcontext()

    @property
    def backend(self) -> str:
        """Backend of the groups in which tensors of the device travel, and nothing else."""
        return "gloo" if self.type == "cpu" else "nccl"


def computes_on_gpu(choice: DeviceChoice | str) -> bool:
    """Whether ranks with this `--device` compute on a GPU, as far as this machine tells."""
    return choice != "cpu" and torch.cuda.is_available()


def resolve_device(choice: DeviceChoice | str = "auto", *, local_rank: int = 0) -> Device:
    """Turn `--device` into the device of this rank.

    Where a launcher makes one GPU visible to each rank, that GPU is taken.

    Args:
        choice: Device that is asked for; "auto" takes a GPU where there is one.
        local_rank: Rank within this machine; selects one of several visible GPUs.

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
