"""The run of a demo: its ranks train, ask the held-out questions, and hand their answers over."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_mimo.checkpoint.folder import TRACKER
from megatron_mimo.launch.preload import can_fork
from megatron_mimo.launch.ranks import launch
from megatron_mimo.tools.demo.asking import ANSWERS_VARIABLE


def forget_earlier_run(out: Path, examples: Iterable[str]) -> None:
    """Remove what an earlier run left, which must not pass for this one's.

    Args:
        out: Folder of the run; its dataset stays.
        examples: Names of files of held-out samples in it.
    """
    for name in ("summary.json", "report.html", TRACKER, *examples):
        (out / name).unlink(missing_ok=True)
    for old in (out / "tensorboard", *out.glob("iter_*")):
        shutil.rmtree(old, ignore_errors=True)


def train_and_ask(
    out: Path, world_size: int, flags: Sequence[str], program: str, *, device: str
) -> dict[str, Any] | int:
    """Start the ranks, and wait until they have trained and asked.

    Args:
        out: Folder of the run.
        world_size: Number of ranks.
        flags: Command line of the training run.
        program: Module that each rank runs; its logging rank writes a report with `write_report`.
        device: Kind of device of the ranks.

    Returns:
        The report of the logging rank, or the exit code of a run that failed.
    """
    with tempfile.TemporaryDirectory(dir=out) as folder:
        answers = Path(folder) / "answers.json"
        os.environ[ANSWERS_VARIABLE] = str(answers)
        code = launch(world_size, flags, program, fork=can_fork(device))
        if code != 0:
            return code
        report: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))
        return report
