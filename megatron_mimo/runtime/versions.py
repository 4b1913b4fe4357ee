"""Checks, when a rank starts, of the packages that megatron-core uses where they are present.

megatron-core takes a package that it cannot import for absent, and computes without it, or ends
with a traceback from inside of it.
"""

import importlib
import importlib.util
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.distributed as dist

from megatron_mimo.runtime import nccl
from megatron_mimo.runtime.device import Device
from megatron_mimo.runtime.gpus import architectures, local_gpu, unsuitable
from megatron_mimo.runtime.software import versions


@dataclass(frozen=True, slots=True)
class Package:
    """A package that may be absent, and must be recent enough and whole where it is present.

    Attributes:
        name: Name of the package, as pip has it.
        least: Lowest supported version.
        module: Module that megatron-core imports.
        reason: What is wrong with versions before.
        gives: What a run on a GPU computes with it; empty where no run of ours needs it.
    """

    name: str
    least: str
    module: str
    reason: str
    gives: str = ""


PACKAGES = (
    Package(
        "transformer-engine",
        "2.11",
        "transformer_engine.pytorch",
        "before, its cross entropy gives wrong gradients with several sequences in a microbatch",
        "linear layers, norms and attention",
    ),
    Package(
        "mamba-ssm",
        "2.3",
        "mamba_ssm",
        "before, its scan refuses widths of a rank that do not divide by 8",
        "Mamba layers",
    ),
    Package(
        "causal-conv1d",
        "1.5",
        "causal_conv1d",
        "mamba-ssm calls it in the way of this version",
        "the convolutions of Mamba layers",
    ),
    Package(
        "flash-linear-attention",
        "0.4",
        "fla",
        "megatron-core calls it in the way of this version",
    ),
)
"""The packages of the extra `gpu`."""

INSTALL = "pip install --no-build-isolation 'megatron-mimo[gpu]'"
"""What installs them, where torch and the CUDA toolkit are; see docs/how-to/gpu.md."""


def check_versions() -> None:
    """Refuse packages that are too old. Nothing is imported.

    Raises:
        ValueError: A package is too old; the message says what is there and what is needed.
    """
    for package in PACKAGES:
        try:
            found = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            continue
        remedy = f"install {package.name}>={package.least}, or remove it"
        if _numbers(found) < _numbers(package.least):
            raise ValueError(
                f"{_process()} has {package.name} {found}: expected {package.least} or newer; "
                f"{package.reason}; {remedy}"
            )


def check_imports() -> None:
    """Refuse packages that are installed and cannot be imported.

    It imports them, as megatron-core will.

    Raises:
        ValueError: An import fails; the message has its reason.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package.module.partition(".")[0]) is None:
            continue
        try:
            importlib.import_module(package.module)
        except Exception as error:  # whatever a broken installation raises
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"{_process()} has {package.name}, which cannot be imported ({said}): expected "
                f"{package.least} or newer, built for torch {torch.__version__} and the CUDA of "
                f"this machine; install it again, or remove it"
            ) from error


def check_present() -> None:
    """Refuse a GPU on which kernels are missing that its layers are made of.

    Without them layers are torch's, which is slow and not what the user believes to run.

    Raises:
        ValueError: A package is not installed; the message says what installs it.
    """
    for package in PACKAGES:
        if not package.gives:
            continue
        try:
            metadata.version(package.name)
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"{_process()} has no {package.name}: expected {package.least} or newer on a GPU, "
                f"for {package.gives}; install it with `{INSTALL}`, pass "
                f"--device cpu, or --allow-missing-kernels to compute with torch's own, slowly"
            ) from None


def check_gpu(device: Device) -> None:
    """Refuse a GPU, or a library to talk to others with, that a run cannot use.

    Raises:
        ValueError: The GPU is too old, or torch has no kernels for it, or NCCL is older than the
            one that torch was built for.
    """
    for wrong in (
        unsuitable(local_gpu(device.index), architectures()),
        nccl.too_old(nccl.built_for(), nccl.loaded()),
    ):
        if wrong is not None:
            raise ValueError(f"{_process()} has {wrong}")


def facts(device: Device) -> dict[str, str]:
    """Versions and hardware that all ranks must have alike."""
    found = versions()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device.index)
        found["nccl"] = nccl.describe() or "absent"
    return found


def require_alike(device: Device) -> None:
    """Refuse ranks with different versions or GPUs. Collective over the world.

    Raises:
        ValueError: Ranks differ; the message names them and what each has.
    """
    everyone: list[Mapping[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, facts(device))
    if (difference := describe_difference(everyone)) is not None:
        raise ValueError(difference)


def describe_difference(everyone: Sequence[Mapping[str, str]]) -> str | None:
    """One line on what ranks have different versions of; None where all are alike.

    Args:
        everyone: `facts` of each rank.
    """
    apart = []
    for name in dict.fromkeys(name for one in everyone for name in one):
        held: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            held.setdefault(one.get(name, "absent"), []).append(rank)
        if len(held) > 1:
            parts = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in held.items())
            apart.append(f"{name} is {parts}")
    if not apart:
        return None
    return (
        f"ranks run on different software or hardware: {'; '.join(apart)}. Expected the same on "
        f"all: install the same versions on every machine, and take GPUs of one kind"
    )


def _process() -> str:
    """Name of this process for messages: "rank 3 on node-7", without a launcher "this process"."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    return "this process" if rank is None else f"rank {rank} on {socket.gethostname()}"


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-3 and 7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    text = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with; builds from source have more after them."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
