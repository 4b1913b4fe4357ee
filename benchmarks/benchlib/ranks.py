"""Start ranks on this machine, and time what they do together."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def is_rank() -> bool:
    """Whether this process was started as a rank, not by the user."""
    return "BENCH_TASK" in os.environ


def run_ranks(script: str, num_ranks: int, task: dict[str, Any]) -> Any:
    """Run a script on gloo ranks with one thread each; what its rank 0 `answer`ed.

    Args:
        script: The benchmark's own `__file__`.
        num_ranks: Ranks to start, by torchrun.
        task: Read by the ranks with `task`; JSON.

    Raises:
        RuntimeError: The ranks failed; their output has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        started = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(num_ranks), script),
            ],
            env=os.environ
            | {
                "BENCH_TASK": json.dumps(task),
                "BENCH_ANSWER": str(answer),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if started.returncode:
            sys.stderr.write(started.stdout + started.stderr)
            raise RuntimeError(f"{Path(script).name} failed on {num_ranks} ranks with {task}")
        return json.loads(answer.read_text())


def task() -> dict[str, Any]:
    """What `run_ranks` gave to this rank."""
    given: dict[str, Any] = json.loads(os.environ["BENCH_TASK"])
    return given


def answer(value: Any) -> None:
    """Give `run_ranks` its result; on rank 0."""
    if dist.get_rank() == 0:
        Path(os.environ["BENCH_ANSWER"]).write_text(json.dumps(value))


@contextmanager
def gloo_for_nccl() -> Iterator[None]:
    """Create gloo groups where "nccl" is asked for by name, as megatron-core's bridge does."""
    new_group, new_subgroups = dist.new_group, dist.new_subgroups_by_enumeration

    def replaced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("backend") == "nccl":
                kwargs["backend"] = "gloo"
            return function(*args, **kwargs)

        return call

    dist.new_group, dist.new_subgroups_by_enumeration = replaced(new_group), replaced(new_subgroups)
    try:
        yield
    finally:
        dist.new_group, dist.new_subgroups_by_enumeration = new_group, new_subgroups


def in_turns(
    ours: Callable[[], None], peer: Callable[[], None], repetitions: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call on the rank that took longest; the first call of each is not timed.

    Both run in turns, so that a busy machine is busy for both.
    """
    times = torch.zeros(2, repetitions + 1, dtype=torch.float64)
    for repetition in range(repetitions + 1):
        for which, call in enumerate((ours, peer)):
            dist.barrier()
            start = time.perf_counter()
            call()
            times[which, repetition] = time.perf_counter() - start
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    mine, theirs = times[:, 1:].tolist()
    return mine, theirs
