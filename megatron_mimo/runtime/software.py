"""Versions, machine and environment variables that a run depends on."""

import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from megatron_mimo.runtime.device import Device

_PACKAGES = (
    "megatron-mimo",
    "torch",
    "megatron-core",
    "megatron-energon",
    "transformers",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "flash-linear-attention",
)
# Of the environment, what bears on speed or numbers; never all of it, which may hold secrets.
_VARIABLES = (
    *("CUDA_", "CUBLAS_", "GLOO_", "MIMO_", "MKL_", "NCCL_", "NVTE_", "OMP_", "PYTORCH_"),
    *("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "TORCH_"),
)


def software() -> dict[str, str]:
    """Versions of Python, of this package and of its numerical libraries, and the commit."""
    commit = _commit()
    return versions() | ({} if commit is None else {"commit": commit})


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of its numerical libraries; no program is run."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def machine(device: Device) -> dict[str, str]:
    """Description of this rank's host and device."""
    found = {"host": socket.gethostname(), "system": platform.platform()}
    if device.type == "cpu":
        return found | {"device": f"host, {os.cpu_count()} cores"}
    return found | {
        "device": f"{torch.cuda.get_device_name(device.index)}, {torch.cuda.device_count()} visible"
    }


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that affect speed or numerical results, by name; no secrets."""
    return {
        name: environment[name]
        for name in sorted(environment)
        if name.startswith(_VARIABLES) and "SECRET" not in name
    }


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside of a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
