"""What `make install` would do: its script's dry run, over a uv that answers and a real one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit_tests.scripts.recipes import SCRIPTS

HAS_GPU = Path("/proc/driver/nvidia/version").exists()
HOST = pytest.mark.skipif(HAS_GPU, reason="this machine has an NVIDIA driver, which decides")
# What uv printed on a machine that sees only a package index, with its index's address left out.
UNREACHABLE = """\
error: Request failed after 3 retries in 8.3s
  cause: client error (Connect)
  cause: dns error
  cause: failed to lookup address information: Name or service not known"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script and its pins in a folder without an environment."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/install.sh", "constraints.txt"):
        shutil.copy(SCRIPTS.parent / name, tmp_path / name)
    return tmp_path


def program(folder: Path, name: str, says: str, status: int) -> Path:
    """A program that says something to standard error and ends."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{says}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


def install(
    checkout: Path, uv: Path | str, backend: str = "", first: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = f"{first}:{os.environ['PATH']}" if first else os.environ["PATH"]
    given = {"PYTHON": sys.executable, "UV": str(uv), "UV_TORCH_BACKEND": backend, "PATH": path}
    return subprocess.run(
        [str(checkout / "scripts/install.sh"), "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | given,
    )


def steps(output: str) -> list[str]:
    """The commands that would be run."""
    return [line.strip() for line in output.splitlines() if line.startswith("  ")]


@HOST
def test_a_host_gets_the_build_for_cpus(checkout: Path) -> None:
    uv = program(checkout, "uv", "Would install 10 packages", 0)
    done = install(checkout, uv)
    assert done.returncode == 0, done.stderr
    _, torch, package = steps(done.stdout)
    assert torch.startswith(f"{uv} pip install ") and torch.endswith(
        "--torch-backend cpu -c constraints.txt torch torchvision"
    )
    assert package.endswith("-e .[demo,dev] -c constraints.txt")


@HOST
def test_where_that_cannot_be_reached_one_line_says_so(checkout: Path) -> None:
    done = install(checkout, program(checkout, "uv", UNREACHABLE, 2))
    assert done.returncode == 0, done.stderr
    assert (
        "install: torch's build for CPUs cannot be reached (uv: failed to lookup address "
        "information: Name or service not known): taking the usual one" in done.stdout
    )
    assert not any("torch-backend" in step for step in steps(done.stdout))
    assert steps(done.stdout)[-1].endswith("-e .[demo,dev] -c constraints.txt")


def test_a_gpu_machine_gets_the_usual_build(checkout: Path) -> None:
    programs = checkout / "programs"
    programs.mkdir()
    program(programs, "nvidia-smi", "GPU 0", 0)
    done = install(checkout, program(checkout, "uv", "is not asked", 2), first=programs)
    assert done.returncode == 0, done.stderr
    assert len(steps(done.stdout)) == 2 and "torch" not in done.stdout


def test_a_build_that_is_asked_for_is_never_replaced(checkout: Path) -> None:
    done = install(checkout, program(checkout, "uv", UNREACHABLE, 2), backend="cu130")
    assert done.returncode == 2
    assert done.stderr.startswith("error: UV_TORCH_BACKEND=cu130 cannot be had (uv: failed")
    assert "-e ." not in done.stdout


@HOST
def test_uv_knows_what_it_is_asked(checkout: Path) -> None:
    """With the real one: it resolves torch, or says why the build's index cannot be reached."""
    beside_python = Path(sys.executable).with_name("uv")
    uv = beside_python if beside_python.exists() else shutil.which("uv")
    if uv is None:
        pytest.skip("there is no uv: 'make install' brings it to machines without a GPU")
    done = install(checkout, uv)
    assert done.returncode == 0, done.stderr
    resolved = "install: torch, the build that uv names 'cpu'" in done.stdout
    unreachable = "cannot be reached (uv: " in done.stdout
    assert resolved != unreachable, done.stdout
    assert "--help" not in done.stdout, "uv says so of flags and builds that it does not know"
