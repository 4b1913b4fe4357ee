"""Runs that are told to leave: all ranks after the same step, with a checkpoint to go on from."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_mimo.checkpoint.folder import latest_iteration

FLAGS = (
    *("--encoder-dp", "1", "--llm-dp", "2", "--global-batch-size", "4", "--log-interval", "1"),
    *("--train-iters", "1000000", "--lr-decay-iters", "10"),
)


def command(*flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "megatron_mimo.cli", "train", "--nproc", "3"),
        *(*FLAGS, *flags),
    ]


@contextmanager
def started(line: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    run = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def read_until_iteration(run: "subprocess.Popen[str]", number: int) -> str:
    assert run.stdout is not None
    seen = ""
    for line in run.stdout:
        seen += line
        if re.match(rf" iteration +{number}/", line):
            return seen
    raise AssertionError(seen)


def ranks_of(launcher: int) -> list[int]:
    """The processes that train: named after their rank, as those are that read for one."""
    children = psutil.Process(launcher).children(recursive=True)
    named = {child.pid: child.name() for child in children if child.name().startswith("rank ")}
    trains = [child.pid for child in children if child.pid in named and child.ppid() not in named]
    return sorted(trains, key=lambda pid: int(named[pid].removeprefix("rank ")))


def left_at(output: str, why: str) -> int:
    """The iteration that the run says it left after."""
    (iteration,) = re.findall(rf"exiting program {why} at iteration (\d+)", output)
    return int(iteration)


def test_a_signal_to_one_rank_has_all_save_and_leave(tmp_path: Path) -> None:
    with started(command("--save", str(tmp_path))) as run:
        read_until_iteration(run, 3)
        ranks = ranks_of(run.pid)
        assert len(ranks) == 3
        os.kill(ranks[1], signal.SIGUSR1)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    last = left_at(output, "after receiving SIGUSR1")
    assert last >= 3
    assert latest_iteration(tmp_path) == last
    more = ("--save", str(tmp_path), "--load", str(tmp_path), "--exit-interval", "1")
    again = subprocess.run(command(*more), capture_output=True, text=True, check=False, timeout=240)
    assert again.returncode == 0, again.stderr
    assert re.search(rf"^ iteration +{last + 1}/", again.stdout, re.MULTILINE), again.stdout


@pytest.mark.slow
def test_ending_the_launcher_saves_first(tmp_path: Path) -> None:
    with started(command("--save", str(tmp_path), "--async-save")) as run:
        read_until_iteration(run, 2)
        run.send_signal(signal.SIGTERM)
        # Ranks that have saved do not wait to be killed, which would be after a minute.
        output, _ = run.communicate(timeout=40)
    assert latest_iteration(tmp_path) == left_at(output, "after receiving SIGTERM")
    assert "stopped by SIGTERM" in output


@pytest.mark.slow
def test_a_time_limit_ends_a_run_after_a_step(tmp_path: Path) -> None:
    run = subprocess.run(
        command("--save", str(tmp_path), "--exit-duration-in-mins", "0.05"),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    last = left_at(run.stdout + run.stderr, "after 0.05 minutes")
    assert latest_iteration(tmp_path) == last
