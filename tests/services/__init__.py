"""W&B and MLflow, which lie beside the environment, and what they recorded, read back."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.packages import NotFetched
from tests.harness.pool import REPOSITORY

PACKAGES = REPOSITORY / ".cache/services/packages"
"""Holds both and what they need beyond the environment; never the environment."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run in a service.

    Attributes:
        curves: By tag, values by step.
        config: Flags, as texts.
        state: Exit code in W&B, None where it is not ended; status in MLflow.
    """

    curves: Mapping[str, Mapping[int, float]]
    config: Mapping[str, str]
    state: Any


def fetched(**more: str) -> dict[str, str]:
    """The environment of a process that has both packages, and reaches no server.

    Raises:
        NotFetched: They have not been fetched.
    """
    if not (PACKAGES / "wandb").is_dir() or not (PACKAGES / "mlflow").is_dir():
        raise NotFetched(
            f"wandb and mlflow are not in {PACKAGES}: run `make service-packages`, which fetches "
            f"them from the package index"
        )
    paths = [str(PACKAGES), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    own = {name: value for name, value in os.environ.items() if not _is_setting(name)}
    return (
        own | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "WANDB_MODE": "offline"} | more
    )


def _is_setting(name: str) -> bool:
    """Whether a variable is one that the tester has set for runs of their own."""
    return name.startswith(("WANDB_", "MLFLOW_"))


def read_wandb(path: Path) -> Recorded:
    """A run in W&B's own file, `run-ID.wandb`."""
    return _read("wandb", str(path))


def read_mlflow(uri: str, run_id: str) -> Recorded:
    """A run in a database of MLflow."""
    return _read("mlflow", uri, run_id)


def _read(*argv: str) -> Recorded:
    program = Path(__file__).with_name("read_back.py")
    done = subprocess.run(
        [sys.executable, str(program), *argv],
        env=fetched(MLFLOW_DISABLE_TELEMETRY="true"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    curves = {
        tag: {int(step): value for step, value in points.items()}
        for tag, points in found["curves"].items()
    }
    return Recorded(curves=curves, config=found["config"], state=found["state"])
