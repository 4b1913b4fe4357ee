"""Packages of the extra `gpu`: too old, broken, or other ones on other ranks."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mimo.runtime.versions import (
    PACKAGES,
    check_present,
    check_versions,
    describe_difference,
)
from tests.fused.packages import OLDEST

ROOT = Path(__file__).parents[3]


def installed(folder: Path, name: str, version: str, module: str = "") -> Path:
    """Put a package into a folder; a module that holds `module`, if any."""
    stem = name.replace("-", "_")
    info = folder / f"{stem}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module:
        (folder / stem).mkdir()
        (folder / stem / "__init__.py").write_text(module)
    return folder


def train(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A run in an environment that has the packages of a folder."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_mimo.cli", "train", "--device", "cpu", *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_extra_has_the_same_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        f"{package.name}{'[pytorch]' * (package.name == 'transformer-engine')}>={package.least}"
        for package in PACKAGES
    ]
    assert project["optional-dependencies"]["gpu"] == wanted


def test_tests_run_the_lowest_version() -> None:
    (engine,) = [package for package in PACKAGES if package.name == "transformer-engine"]
    assert OLDEST.startswith(engine.least + ".")


@pytest.mark.parametrize(
    ("name", "version", "accepted"),
    [
        ("transformer-engine", "2.10.0", False),
        ("transformer-engine", "2.11.0", True),
        ("transformer-engine", "2.11.0.dev0+abc123", True),
        ("transformer-engine", "3.0", True),
        ("mamba-ssm", "2.2.6.post3", False),
        ("mamba-ssm", "2.3", True),
        ("causal-conv1d", "1.4.0", False),
        ("flash-linear-attention", "0.3.2", False),
    ],
)
def test_versions_are_compared_as_numbers(
    name: str, version: str, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, name, version))
    monkeypatch.setenv("RANK", "3")
    if accepted:
        check_versions()
        return
    with pytest.raises(ValueError) as raised:
        check_versions()
    message = str(raised.value)
    assert message.startswith("rank 3 on ") and "\n" not in message
    assert f"has {name} {version}: expected " in message


def test_a_gpu_needs_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    for package in [package for package in PACKAGES if package.gives]:
        with pytest.raises(ValueError) as raised:
            check_present()
        message = str(raised.value)
        assert message.startswith("rank 3 on ") and "\n" not in message
        assert f"has no {package.name}: expected {package.least} or newer" in message
        assert "megatron-mimo[gpu]" in message and "--allow-missing-kernels" in message
        monkeypatch.syspath_prepend(installed(tmp_path / package.name, package.name, "9.0"))
    # The last one, flash-linear-attention, is needed by nothing of ours.
    assert PACKAGES[-1].name == "flash-linear-attention"
    check_present()


BROKEN = 'raise OSError("libcudart.so.12: cannot open shared object file")'


def test_a_broken_package_ends_a_run_with_a_line(tmp_path: Path) -> None:
    done = train(installed(tmp_path, "mamba-ssm", "2.3.1", BROKEN))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this process has mamba-ssm, which cannot be imported (OSError: ")
    assert "libcudart.so.12" in line and "2.3 or newer" in line


def test_so_does_an_old_one_on_forked_ranks(tmp_path: Path) -> None:
    path = installed(tmp_path, "transformer-engine", "2.9.0")
    done = train(path, "--nproc", "2")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "has transformer-engine 2.9.0: expected 2.11 or newer" in last and "rank " in last


def test_ranks_that_differ_are_named() -> None:
    first = {"torch": "2.13.0", "nccl": "2.29.1", "gpu": "H100"}
    assert describe_difference([first] * 5) is None
    other = {"torch": "2.12.1", "gpu": "H100"}
    found = describe_difference([first, first, other, first, other])
    assert found is not None and "\n" not in found
    assert "torch is 2.13.0 on ranks 0-1 and 3, 2.12.1 on ranks 2 and 4" in found
    assert "nccl is 2.29.1 on ranks 0-1 and 3, absent on ranks 2 and 4" in found
    assert "gpu" not in found


def differing() -> str:
    """What a rank says of ranks that have different versions."""
    import torch.distributed as dist

    from megatron_mimo.runtime import Device, versions

    rank, facts = dist.get_rank(), versions.facts
    versions.require_alike(Device("cpu"))
    versions.facts = lambda _device: {"torch": f"2.{rank // 2}"}
    try:
        versions.require_alike(Device("cpu"))
    except ValueError as error:
        return str(error)
    finally:
        versions.facts = facts
    return ""


def test_every_rank_finds_a_difference(run_ranks: Callable[..., list]) -> None:
    (found,) = set(run_ranks(3, differing))
    assert "torch is 2.0 on ranks 0-1, 2.1 on rank 2. Expected the same" in found
