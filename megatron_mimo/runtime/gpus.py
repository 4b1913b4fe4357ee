"""GPUs of this machine: what they are, and whether a run can use them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LEAST_CAPABILITY = (8, 0)
"""bfloat16 and Transformer Engine need it; see Transformer Engine's support matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as torch sees it.

    Attributes:
        index: Number of the GPU on this machine, as CUDA counts those that are visible.
        name: Name that its driver reports.
        memory: Bytes of its memory.
        capability: Compute capability, major and minor.
    """

    index: int
    name: str
    memory: int
    capability: tuple[int, int]


def local_gpus() -> tuple[Gpu, ...]:
    """GPUs that are visible to this process; none on a host."""
    if not torch.cuda.is_available():
        return ()
    return tuple(local_gpu(index) for index in range(torch.cuda.device_count()))


def local_gpu(index: int) -> Gpu:
    """One of them."""
    found = torch.cuda.get_device_properties(index)
    return Gpu(
        index=index,
        name=found.name,
        memory=found.total_memory,
        capability=(found.major, found.minor),
    )


def architectures() -> tuple[str, ...]:
    """Architectures that torch has kernels for, such as "sm_90"; none in a build for hosts."""
    return tuple(torch.cuda.get_arch_list()) if torch.version.cuda is not None else ()


def without_peer_access(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs of GPUs that cannot read each other's memory."""
    return tuple(
        (one, other)
        for one in range(count)
        for other in range(one + 1, count)
        if not torch.cuda.can_device_access_peer(one, other)
    )


def unsuitable(gpu: Gpu, kernels: Sequence[str]) -> str | None:
    """What keeps a run from using a GPU, with what was expected and what to do; None if nothing.

    Args:
        gpu: The GPU.
        kernels: `architectures` of torch; none where they are not known.
    """
    major, minor = gpu.capability
    what = f"GPU {gpu.index}, {gpu.name}, of compute capability {major}.{minor}"
    if gpu.capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return (
            f"{what}: expected {least} or newer, which bfloat16 and Transformer Engine need; hide "
            f"it with CUDA_VISIBLE_DEVICES, or pass --device cpu"
        )
    if kernels and not _has_kernels(gpu.capability, kernels):
        return (
            f"{what}: expected one that torch {torch.__version__} has kernels for, "
            f"{', '.join(kernels)}; install a torch that was built for it"
        )
    return None


def _has_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> bool:
    """Whether code for an architecture runs on a GPU.

    Machine code (sm) runs on GPUs of the same major version from its minor version on;
    intermediate code (compute) is translated for any later GPU. A letter after the number ties
    code to one architecture.
    """
    for name in kernels:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if found is None:
            continue
        kind, letter = found[1], found[4]
        version = (int(found[2]), int(found[3]))
        if version == capability:
            return True
        if (
            letter == ""
            and version < capability
            and (kind == "compute" or version[0] == capability[0])
        ):
            return True
    return False
