"""The packages with Triton kernels that tests run, and the folders they lie in."""

import importlib.util
from pathlib import Path

from tests.harness.packages import NotFetched
from tests.harness.pool import REPOSITORY

FOLDER = REPOSITORY / ".cache" / "triton-kernels"
"""Holds a folder for each version of each package; never the environment."""

OLDEST, NEWEST = "2.3.0", "2.3.2.post1"
VERSIONS = (OLDEST, NEWEST)
"""The lowest version of mamba-ssm that `runtime.versions` accepts and the newest one known; see the
Makefile."""

CONVOLUTION = "1.7.0"
"""The version of causal-conv1d; the first whose reference in torch knows several documents."""

TRITON = "3.7.1"
"""The version of Triton for an environment without it: a CPU build of torch does not bring it."""

VARIABLE = "MIMO_TESTS_MAMBA_SSM"
"""The version of mamba-ssm that the ranks of a pool have; without it they have none."""


def folders_of(version: str) -> list[Path]:
    """The folders to import from, with a version of mamba-ssm.

    Raises:
        NotFetched: A package has not been fetched.
    """
    wanted = {"mamba-ssm": version, "causal-conv1d": CONVOLUTION}
    if importlib.util.find_spec("triton") is None:
        wanted["triton"] = TRITON
    found = []
    for name, number in wanted.items():
        folder = FOLDER / name / number
        if not (folder / f"{name.replace('-', '_')}-{number}.dist-info").is_dir():
            raise NotFetched(
                f"{name} {number} is not in {folder}: run `make triton-kernels`, which fetches it "
                f"from the package index"
            )
        found.append(folder)
    return found
