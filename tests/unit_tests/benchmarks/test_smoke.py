"""Every benchmark still runs, by its own command line; how fast is not asked here."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchlib.report import read

from tests.harness.slices import slow_but

REPOSITORY = Path(__file__).resolve().parents[3]
BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("bench_*.py"))
DEAR = {"bench_checkpoint", "bench_radio", "bench_step", "bench_watching"}


def test_benchmarks_are_found() -> None:
    assert BENCHMARKS


# The dear ones start many runs or compare with transformers for long.
@pytest.mark.parametrize(
    "path",
    slow_but(BENCHMARKS, *(path for path in BENCHMARKS if path.stem not in DEAR)),
    ids=lambda path: path.stem,
)
def test_its_table_comes_out(path: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(path), "--smoke", "--json", str(tmp_path / "rows.json")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    circumstances, rows = read((tmp_path / "rows.json").read_text())
    assert circumstances.size == "smoke"
    assert rows
    assert len({row.case for row in rows}) == len(rows), "two rows have one name"
    for row in rows:
        assert row.case in ran.stdout
        assert 0 < row.ratio < math.inf, row
