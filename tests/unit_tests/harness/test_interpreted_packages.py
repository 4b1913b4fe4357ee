"""Packages with Triton kernels: tests run those that `make triton-kernels` fetches."""

import re
from pathlib import Path

import pytest

from tests.harness import RanksFailed
from tests.harness.packages import PackagePools
from tests.harness.pool import REPOSITORY
from tests.interpreted import packages


def test_the_makefile_fetches_what_tests_run() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    fetched = set(re.findall(r"\b(?:mamba-ssm|causal-conv1d|triton)/\d[\w.]*", makefile))
    versions = {f"mamba-ssm/{version}" for version in packages.VERSIONS}
    assert fetched == versions | {
        f"causal-conv1d/{packages.CONVOLUTION}",
        f"triton/{packages.TRITON}",
    }


def test_a_version_that_was_not_fetched_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    pools = PackagePools(packages.VARIABLE, packages.folders_of)
    with pytest.raises(RanksFailed, match=r"^mamba-ssm 2\.3\.2\.post1 is not in .*: run `make tri"):
        pools.run(packages.NEWEST, 1, print)
