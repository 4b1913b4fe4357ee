"""What a run stands on: versions, the machine, and the variables that change how it runs."""

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
    """Versions of Python, of ours and of what computes, and the commit of a checkout."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    if commit is not None:
        found["commit"] = commit
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def machine(device: Device) -> dict[str, str]:
    """The host of this rank and what it computes on."""
    found = {"host": socket.gethostname(), "system": platform.platform()}
    if device.type == "cpu":
        return found | {"device": f"host, {os.cpu_count()} cores"}
    return found | {
        "device": f"{torch.cuda.get_device_name(device.index)}, {torch.cuda.device_count()} visible"
    }


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those variables that bear on speed or numbers, by name."""
    return {name: environment[name] for name in sorted(environment) if name.startswith(_VARIABLES)}


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
