"""Whole runs that record in W&B and MLflow, offline, compared with TensorBoard tag by tag."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.services import Recorded, fetched, read_mlflow, read_wandb

pytestmark = pytest.mark.slow

Curves = Mapping[str, Mapping[int, float]]


def command(folder: Path, *flags: str) -> list[str]:
    """A run on two ranks; it evaluates, so that an iteration has two lines."""
    return [
        *(sys.executable, "-m", "megatron_mimo.cli", "train", "--nproc", "2"),
        *("--log-interval", "2", "--eval-interval", "4", "--eval-iters", "1"),
        *("--save", str(folder), "--tensorboard-dir", str(folder / "tb")),
        *("--wandb-project", "p", "--wandb-exp-name", "first"),
        *("--mlflow-experiment", "e", "--mlflow-tracking-uri", uri(folder)),
        *flags,
    ]


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def train(folder: Path, *flags: str) -> str:
    """Train to the end, and return what was said."""
    done = subprocess.run(
        command(folder, *flags), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def environment() -> dict[str, str]:
    return fetched(OMP_NUM_THREADS="1")


def in_tensorboard(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb")).Reload()
    return {
        tag: {point.step: point.value for point in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def in_wandb(folder: Path) -> list[Recorded]:
    """What each start has recorded, in order."""
    return [read_wandb(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def in_mlflow(folder: Path) -> Recorded:
    return read_mlflow(uri(folder), json.loads((folder / "tb/mlflow.json").read_text())["id"])


def over_samples(recorded: Recorded) -> Curves:
    """W&B's curves, with the steps that those over samples have in TensorBoard."""
    samples = recorded.curves["consumed-samples"]
    return {
        tag: {int(samples[step]) if "vs samples" in tag else step: value for step, value in of}
        for tag, curve in recorded.curves.items()
        if (of := curve.items()) and tag != "consumed-samples"
    }


def check_equal(ours: Curves, theirs: Curves) -> None:
    """Event files hold float32; what they hold has to be equal, not close."""
    assert ours.keys() == theirs.keys()
    for tag, curve in theirs.items():
        assert {step: np.float32(value) for step, value in ours[tag].items()} == curve, tag


def test_every_tag_is_that_of_tensorboard_also_after_a_start_in_the_middle(tmp_path: Path) -> None:
    train(tmp_path, "--train-iters", "8", "--save-interval", "4")
    first = in_tensorboard(tmp_path)
    assert len(first) > 50 and list(first["lm loss validation vs samples"]) == [4, 8]
    (recorded,) = in_wandb(tmp_path)
    check_equal(over_samples(recorded), first)
    check_equal(in_mlflow(tmp_path).curves, first)
    assert recorded.state == 0 and in_mlflow(tmp_path).state == "FINISHED"
    assert recorded.config["train-iters"] == in_mlflow(tmp_path).config["train-iters"] == "8"

    # Goes back to iteration 4, with another schedule, so that the iterations after it differ.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    said = train(tmp_path, "--train-iters", "12", "--load", str(tmp_path))
    assert said.count("it has iterations up to 8 and takes none twice") == 2
    second = in_tensorboard(tmp_path)
    assert second["lm loss"][8] != first["lm loss"][8]
    new = {
        tag: {step: value for step, value in curve.items() if step > 8}
        for tag, curve in second.items()
    }
    _, again = in_wandb(tmp_path)
    check_equal(over_samples(again), new)
    both = {tag: dict(first[tag]) | new[tag] for tag in first}
    check_equal(in_mlflow(tmp_path).curves, both)
    assert '"train-iters": "12"' in in_mlflow(tmp_path).config["changed after iteration 4"]


def services(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    """Processes that record for a run, and what they have started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        line = " ".join(child.cmdline())
        if "services.recorder" in line or "wandb/bin" in line:
            yield child


def wait_for_iteration(process: subprocess.Popen[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f" iteration {number:8d}/"):
            return
    pytest.fail("the run has ended")


def test_a_killed_rank_leaves_no_process_and_a_run_that_has_failed(tmp_path: Path) -> None:
    flags = "--train-iters", "100000"
    with subprocess.Popen(
        command(tmp_path, *flags),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        wait_for_iteration(process, 4)
        started = list(services(process))
        recorder = next(one for one in started if "recorder" in " ".join(one.cmdline()))
        assert len(started) >= 3
        for one in started:
            assert all(about.status != psutil.CONN_LISTEN for about in one.net_connections("inet"))
        rank = recorder.parent()
        assert rank is not None
        rank.kill()
        assert process.stdout is not None
        process.stdout.read()
        assert process.wait(timeout=60) == 1
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive
    (recorded,) = in_wandb(tmp_path)
    assert recorded.state == 1 and in_mlflow(tmp_path).state == "FAILED"
    assert 4 in recorded.curves["lm loss"] and 4 in in_mlflow(tmp_path).curves["lm loss"]


def test_a_database_that_is_locked_for_a_while_stops_no_run_and_lacks_nothing(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        command(tmp_path, "--train-iters", "100000", "--exit-signal-handler"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_iteration(process, 4)
        recorder = next(services(process))
        rank = recorder.parent()
        assert rank is not None
        with sqlite3.connect(tmp_path / "mlflow.db", timeout=30) as database:
            database.execute("BEGIN EXCLUSIVE")
            last = wait_for_seconds(process, tmp_path, 45)
        os.kill(rank.pid, signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert last > 20
    assert process.returncode == 0, said
    assert said.count("MLflow: takes no curves at iteration") == 1
    assert "database is locked" in said and "lacks" not in said
    check_equal(in_mlflow(tmp_path).curves, in_tensorboard(tmp_path))


def wait_for_seconds(process: subprocess.Popen[str], folder: Path, seconds: float) -> int:
    """Let the run go on for a while; returns the last iteration that it has logged."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process.stdout.read()
        time.sleep(0.2)
    os.set_blocking(process.stdout.fileno(), True)
    lines = (folder / "tb/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return int(json.loads(lines[-1])["iteration"])
