"""What tests cost is measured with all their processes, and a budget can fail a run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.slices import SLICES

REPOSITORY = Path(__file__).resolve().parents[3]
CONFTEST = "from tests.conftest import *\n"
# The burnt time is that of a child's child, which has ended before the test does.
BURN = """
import subprocess, sys
import pytest

CODE = "import time\\nwhile time.process_time() < {seconds}: pass"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


@pytest.mark.parametrize("seconds", [0.1, 0.8])
def test_burn(seconds):
    code = CODE.format(seconds=seconds)
    subprocess.run([sys.executable, "-c", PARENT, code], check=True)
"""
MANY = """
import pytest


@pytest.mark.parametrize("number", range(5))
def test_quick(number):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("number", range(24))
def test_slow(number):
    pass
"""


def run(folder: Path, source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_says_what_tests_and_their_processes_cost(workers: str, tmp_path: Path) -> None:
    done = run(tmp_path, BURN, "-n", workers, "--processor-budget", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    costs = {
        name: float(s)
        for s, name in re.findall(r"^ +([\d.]+)  test_it.*\[(.*)\]", done.stdout, re.MULTILINE)
    }
    assert costs["0.8"] >= 0.8
    assert 0.1 <= costs["0.1"] < 0.8
    (total,) = re.findall(r"^ +([\d.]+)  in all, of 2 tests", done.stdout, re.MULTILINE)
    assert float(total) == pytest.approx(sum(costs.values()), abs=0.2)


def test_a_run_fails_half_above_its_budget(tmp_path: Path) -> None:
    done = run(tmp_path, BURN, "--processor-budget", "0.2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "passed by more than half" in done.stdout
    assert "2 passed" in done.stdout


def test_slices_share_the_slow_tests_out(tmp_path: Path) -> None:
    met: list[str] = []
    for number in (0, 1, SLICES - 1):
        done = run(tmp_path, MANY, "--slow-slice", str(number), "-v")
        assert f"slow tests: --slow-slice {number} of {SLICES}" in done.stdout
        assert len(re.findall(r"test_quick\[\d\] PASSED", done.stdout)) == 5
        met += re.findall(r"test_slow\[(\d+)\] PASSED", done.stdout)
    assert met == ["0", "11", "22", "1", "12", "23", "10", "21"]


def test_a_slice_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, MANY, "--slow-slice", "11")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--slow-slice 11: expected 0 to 10" in done.stderr
