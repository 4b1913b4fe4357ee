"""Versions of Transformer Engine: tests run those that `make transformer-engine` fetches."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fused import packages
from tests.harness import RanksFailed
from tests.harness.packages import PackagePools
from tests.harness.pool import REPOSITORY


def test_the_makefile_fetches_what_tests_run() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (line,) = [line for line in makefile.splitlines() if line.startswith("TE := ")]
    assert tuple(line.removesuffix(")").rsplit(",", 1)[1].split()) == packages.VERSIONS


def test_a_version_that_was_not_fetched_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    with pytest.raises(
        RanksFailed, match=r"^Transformer Engine 2\.20\.2 is not in .*: run `make tr"
    ):
        PackagePools(packages.VARIABLE, packages.folder_of).run(packages.NEWEST, 1, print)


def test_a_pool_leaves_the_process_that_starts_it_alone() -> None:
    look = (
        "import sys; from tests.harness.pool import RankPool\n"
        f"pool = RankPool({{{packages.VARIABLE!r}: {packages.NEWEST!r}}})\n"
        "with pool._parent_of_workers(): import tests.harness.worker\n"
        f"sys.exit(any({packages.FOLDER.name!r} in path for path in sys.path))"
    )
    assert subprocess.run([sys.executable, "-c", look], cwd=REPOSITORY).returncode == 0
