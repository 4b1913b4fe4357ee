"""One rank fails while others wait in a collective: everything ends, and the cause stands last."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_mimo.failfast.process import state_and_parent

WORKER = Path(__file__).with_name("failfast_worker.py")
RANKS = 3
LIMIT_S = 10.0
"""From the failure to the end of the last process."""
START_LIMIT_S = 200.0

TRACEBACK = 'images["dog"] += 1'
"""Of the exception that the worker raises."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: exit codes, output in order, seconds from failure to end, rank processes."""

    codes: list[int]
    output: str
    took_s: float
    pids: list[int]


def run_torchrun(how: str, rank: int, folder: Path) -> Outcome:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return run([[*command, str(WORKER)]], [{}], how, rank, folder)


def run_launch(how: str, rank: int, folder: Path, *, fork: bool) -> Outcome:
    program = (
        "import os, sys; from megatron_mimo.launch.ranks import launch; "
        "os.environ['LAUNCHER'] = str(os.getpid()); "
        f"sys.exit(launch({RANKS}, sys.argv[1:], {str(WORKER)!r}, fork={fork}))"
    )
    return run([["-c", program]], [{}], how, rank, folder)


def run_slurm(how: str, rank: int, folder: Path) -> Outcome:
    """Plain processes with the variables that srun sets; nobody watches them from outside."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"SLURM_NTASKS": str(RANKS), "SLURM_NODELIST": "localhost", "MASTER_PORT": str(port)}
    environments = [
        common | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        for number in range(RANKS)
    ]
    return run([[str(WORKER)]] * RANKS, environments, how, rank, folder)


def run(
    commands: list[list[str]],
    environments: list[dict[str, str]],
    how: str,
    rank: int,
    folder: Path,
) -> Outcome:
    base = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    base |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = folder / "output"
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, *command, how, str(rank), str(folder)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=base | environment,
            )
            for command, environment in zip(commands, environments, strict=True)
        ]
        try:
            codes = [process.wait(START_LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
    ended = time.time()
    # The watcher of a killed rank outlives it, and may write its last lines a moment later.
    while not _has_ended(log.read_text()) and time.time() < ended + LIMIT_S:
        time.sleep(0.1)
    failed = folder / "failed"
    return Outcome(
        codes=codes,
        output=log.read_text(),
        took_s=ended - float(failed.read_text()) if failed.exists() else 0.0,
        pids=[int(path.read_text()) for path in folder.glob("pid-*")],
    )


def assert_all_ended(outcome: Outcome) -> None:
    assert 0 not in outcome.codes, outcome.output
    assert len(outcome.pids) == RANKS
    for pid in outcome.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert 0 < outcome.took_s < LIMIT_S


def _is_running(pid: int) -> bool:
    """Not gone, and no zombie that nobody waits for."""
    return state_and_parent(pid)[0] not in ("", "Z")


def _has_ended(output: str) -> bool:
    """Whether the last line on screen closes a block."""
    lines = output.rstrip().splitlines()
    return bool(lines) and set(lines[-1]) == {"="}


def last_block(output: str) -> str:
    """Between the last two lines of equal signs."""
    lines = output.rstrip().splitlines()
    assert set(lines[-1]) == {"="}, output
    start = max(i for i, line in enumerate(lines[:-1]) if line and set(line) == {"="})
    return "\n".join(lines[start + 1 : -1])


CAUSES = {
    "exception": TRACEBACK,
    "kill": "killed by signal 9 (SIGKILL)",
    "stop": "its process was stopped for 5 s",
    "crash": "in crash\n",
    "vanish": "lost: its watcher closed its connection",
    "unwatched": "its watcher process was stopped for 3 s",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exception", "kill", "stop"])
def test_under_torchrun(how: str, tmp_path: Path) -> None:
    outcome = run_torchrun(how, 1, tmp_path)
    assert_all_ended(outcome)
    root = last_block(outcome.output).partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1 (local_rank: 1)" in root
    assert "rank 1 (encoder dp 0 tp 1)" in root
    assert CAUSES[how] in root


@pytest.mark.parametrize(
    ("how", "fork"),
    [
        pytest.param("exception", False, marks=pytest.mark.slow),
        ("exception", True),
        pytest.param("crash", True, marks=pytest.mark.slow),
        ("kill", True),
        ("unwatched", True),
    ],
)
def test_under_our_launcher(how: str, fork: bool, tmp_path: Path) -> None:
    outcome = run_launch(how, 1, tmp_path, fork=fork)
    assert_all_ended(outcome)
    assert outcome.codes == [1]
    block = last_block(outcome.output)
    assert block.startswith("rank 1 (encoder dp 0 tp 1) on ")
    assert CAUSES[how] in block
    assert "ChildFailedError" not in outcome.output


@pytest.mark.parametrize("fork", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_launcher_is_killed(fork: bool, tmp_path: Path) -> None:
    outcome = run_launch("orphan", 1, tmp_path, fork=fork)
    assert outcome.codes == [-signal.SIGKILL]
    assert len(outcome.pids) == RANKS
    deadline = time.monotonic() + LIMIT_S
    while any(map(_is_running, outcome.pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "its launcher is gone" in last_block(outcome.output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank"),
    [
        *(("exception", 1), ("kill", 0), ("stop", 0), ("vanish", 1), ("vanish", 0)),
        *(("unwatched", 0), ("unwatched", 1)),
    ],
)
def test_without_a_launcher_that_watches(how: str, rank: int, tmp_path: Path) -> None:
    outcome = run_slurm(how, rank, tmp_path)
    assert_all_ended(outcome)
    expected = [1] * RANKS
    if how not in ("exception", "unwatched"):
        expected[rank] = -signal.SIGKILL
    assert outcome.codes == expected
    block = last_block(outcome.output)
    assert block.startswith(f"rank {rank} (encoder dp 0 tp {rank}) on ")
    assert CAUSES[how] in block


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1], ids=["sender", "receiver"])
def test_a_peer_dies_in_the_middle_of_a_transfer(rank: int, tmp_path: Path) -> None:
    outcome = run_slurm("transfer", rank, tmp_path)
    assert_all_ended(outcome)
    block = last_block(outcome.output)
    assert block.startswith(f"rank {rank} (encoder dp 0 tp {rank}) on ")
    assert CAUSES["kill"] in block


def test_wrong_usage_is_one_line_and_code_2(tmp_path: Path) -> None:
    outcome = run_launch("usage", 0, tmp_path, fork=True)
    assert outcome.codes == [2]
    assert outcome.output == "error: no machine in the Slurm node list '': set MASTER_ADDR\n"


@pytest.mark.slow
def test_a_rank_that_is_busy_for_long_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rank holds Python's lock for twice as long.
    monkeypatch.setenv("MIMO_FAILFAST_SILENCE_S", "2")
    outcome = run_slurm("hold", 1, tmp_path)
    assert outcome.codes == [0] * RANKS, outcome.output
    assert outcome.output.count("done") == RANKS
