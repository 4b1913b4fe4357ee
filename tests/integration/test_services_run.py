"""Whole runs that record in W&B and MLflow, offline, compared with TensorBoard tag by tag."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def services(process: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    """Processes that record for a run, and what they have started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        line = " ".join(child.cmdline())
        if "services.recorder" in line or "wandb/bin" in line:
            yield child


def last_iteration(folder: Path) -> int:
    """The last one that a run has logged; 0 before the first."""
    path = folder / "tb/metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["iteration"]) if lines else 0


@contextmanager
def training(folder: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run that has logged its first iterations and goes on; what it says is in `said`."""
    with (
        (folder / "said").open("wb") as said,
        subprocess.Popen(
            command(folder, "--train-iters", "100000", *flags),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=said,
        ) as process,
    ):
        try:
            while last_iteration(folder) < 4:
                assert process.poll() is None, (folder / "said").read_text()
                time.sleep(0.2)
            yield process
        finally:
            process.kill()


def test_a_killed_rank_leaves_no_process_and_a_run_that_has_failed(tmp_path: Path) -> None:
    with training(tmp_path) as process:
        started = list(services(process))
        recorder = next(one for one in started if "recorder" in " ".join(one.cmdline()))
        assert len(started) >= 3
        for one in started:
            assert all(about.status != psutil.CONN_LISTEN for about in one.net_connections("inet"))
        rank = recorder.parent()
        assert rank is not None
        rank.kill()
        assert process.wait(timeout=60) == 1
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive
    (recorded,) = in_wandb(tmp_path)
    assert recorded.state == 1 and in_mlflow(tmp_path).state == "FAILED"
    assert 4 in recorded.curves["lm loss"] and 4 in in_mlflow(tmp_path).curves["lm loss"]


def test_a_database_that_is_locked_for_a_while_stops_no_run_and_lacks_nothing(
    tmp_path: Path,
) -> None:
    # Few log lines: MLflow needs some time for each, and all have to be there a minute later.
    flags = "--exit-signal-handler", "--log-interval", "20", "--eval-interval", "0"
    with training(tmp_path, *flags) as process:
        rank = next(services(process)).parent()
        assert rank is not None
        with sqlite3.connect(tmp_path / "mlflow.db", timeout=30) as database:
            database.execute("BEGIN EXCLUSIVE")
            before = last_iteration(tmp_path)
            while "MLflow: takes no curves" not in (tmp_path / "said").read_text():
                assert process.poll() is None
                time.sleep(0.2)
            during = last_iteration(tmp_path)
        rank.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    said = (tmp_path / "said").read_text()
    assert during - before >= 20
    assert said.count("MLflow: takes no curves at iteration") == 1
    assert "database is locked" in said and "MLflow: lacks" not in said
    check_equal(in_mlflow(tmp_path).curves, in_tensorboard(tmp_path))
