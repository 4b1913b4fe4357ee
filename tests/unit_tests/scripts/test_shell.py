"""The scripts as shell, and the Dockerfiles."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit_tests.scripts.recipes import SCRIPTS

FILES = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
IMAGES = sorted(SCRIPTS.parent.glob("docker/Dockerfile.*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bash_can_read_it(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("linter", "files"),
    [("shellcheck --external-sources", FILES), ("hadolint", IMAGES)],
    ids=["shellcheck", "hadolint"],
)
def test_a_linter_finds_nothing(linter: str, files: list[Path]) -> None:
    name, *flags = linter.split()
    beside_python = Path(sys.executable).with_name(name)
    program = str(beside_python) if beside_python.exists() else shutil.which(name)
    if program is None:
        pytest.skip(f"there is no {name}: 'make install' brings it")
    done = subprocess.run(
        [program, *flags, *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_there_is_one_launcher() -> None:
    """Only launch.sh starts ranks."""
    words = ("srun", "torchrun", "scontrol", "megatron_mimo", "megatron-mimo")
    for path in FILES:
        if path.name in ("launch.sh", "failures.sh", "install.sh"):
            continue
        code = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert not any(word in line for word in words for line in code), path.name
