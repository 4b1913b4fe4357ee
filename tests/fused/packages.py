"""The versions of Transformer Engine that tests run, and the folders they lie in."""

from pathlib import Path

from tests.harness.packages import NotFetched
from tests.harness.pool import REPOSITORY

FOLDER = REPOSITORY / ".cache" / "transformer-engine"
"""Holds a folder for each version; never the environment, which a host needs without it."""

OLDEST, NEWEST = "2.11.0", "2.20.2"
VERSIONS = (OLDEST, NEWEST)
"""The lowest version that `runtime.versions` accepts and the newest one known; see the Makefile."""

VARIABLE = "MIMO_TESTS_TRANSFORMER_ENGINE"
"""The version that the ranks of a pool have; without it they have none."""


def folder_of(version: str) -> Path:
    """The folder to import a version from.

    Raises:
        NotFetched: It has not been fetched.
    """
    folder = FOLDER / version
    if not (folder / f"transformer_engine-{version}.dist-info").is_dir():
        raise NotFetched(
            f"Transformer Engine {version} is not in {folder}: run `make transformer-engine`, "
            f"which fetches its Python package from the package index"
        )
    return folder
