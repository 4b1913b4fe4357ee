"""What a run says it stands on."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from megatron_mimo.runtime import Device
from megatron_mimo.runtime import software as module
from megatron_mimo.runtime.software import machine, software, variables


def test_versions_are_those_installed() -> None:
    found = software()
    for name in ("torch", "megatron-core", "megatron-energon"):
        assert found[name] == metadata.version(name)
    assert "no-such-package" not in found


def test_the_commit_is_that_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(module.__file__).parents[2]
    assert ("commit" in software()) == (root / ".git").exists()
    installed = tmp_path / "site-packages" / "megatron_mimo" / "runtime" / "software.py"
    monkeypatch.setattr(module, "__file__", str(installed))
    assert "commit" not in software()


def test_variables_are_chosen_by_name() -> None:
    environment = {"NCCL_PROTO": "LL128", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    secrets = {"HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "y", "PATH": "z", "SLURM_JWT": "w"}
    assert variables(environment | secrets) == environment
    assert list(variables({"OMP_B": "1", "CUDA_A": "2"})) == ["CUDA_A", "OMP_B"]


def test_a_host_is_named_with_its_cores() -> None:
    assert re.fullmatch(r"host, \d+ cores", machine(Device("cpu"))["device"])
