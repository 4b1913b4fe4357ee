"""Start ranks on this machine, and time what they do together."""

import gc
import json
import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(work: Callable[[dict[str, Any]], Any], num_ranks: int, task: dict[str, Any]) -> Any:
    """Run a function on gloo ranks with one thread each; what it returned on rank 0, as JSON.

    Torch and megatron-core are imported here once, and the ranks forked, so that starting them
    costs milliseconds. What they print is shown if one of them fails.

    Args:
        work: Function that is called on each rank, in a process group of all.
        num_ranks: Number of ranks to start.
        task: Argument of `work`.

    Raises:
        RuntimeError: A rank failed; its output has been shown, and the others have been ended.
    """
    from megatron_mimo.runtime import prepare_megatron_core, resolve_device

    torch.set_num_threads(1)
    prepare_megatron_core(resolve_device("cpu"))
    # Collecting what was imported would copy its pages in every rank.
    gc.collect()
    gc.freeze()
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as made, socket.socket() as held:
        folder = Path(made)
        held.bind(("127.0.0.1", 0))
        place = {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(held.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        held.close()
        ranks = [
            context.Process(target=_rank, args=(work, task, rank, place, folder))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        failed = _first_failure(ranks)
        if failed is not None:
            sys.stderr.write(_output(folder, failed).read_text())
            raise RuntimeError(f"rank {failed} of {num_ranks} failed, given {task}")
        return json.loads((folder / "answer.json").read_text())


def _rank(
    work: Callable[[dict[str, Any]], Any],
    task: dict[str, Any],
    rank: int,
    place: dict[str, str],
    folder: Path,
) -> None:
    """One rank's process."""
    from megatron_mimo.runtime import initialize, shutdown

    with _output(folder, rank).open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        initialize("cpu")
        found = work(task)
        if rank == 0:
            (folder / "answer.json").write_text(json.dumps(found))
        shutdown()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # Threads of a broken group may not end.
        os._exit(1)


def _output(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.txt"


def _first_failure(ranks: Sequence[ForkProcess]) -> int | None:
    """Wait for all; the rank that failed first, whereupon the others are ended, or None."""
    try:
        running = dict(enumerate(ranks))
        while running:
            wait([process.sentinel for process in running.values()])
            for rank, process in list(running.items()):
                if process.is_alive():
                    continue
                del running[rank]
                if process.exitcode:
                    return rank
        return None
    finally:
        for process in ranks:
            process.kill()
            process.join()


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


def own_memory(side: str) -> None:
    """Set the allocator as a side sets it: ours keeps freed memory, the peer's returns it.

    Where both sides run in one process this is called before each turn; otherwise the peer would
    profit from a setting that is ours.
    """
    from megatron_mimo.runtime.host.memory import keep_freed_memory, return_freed_memory

    (keep_freed_memory if side == "ours" else return_freed_memory)()


def turns(names: Sequence[str], repetition: int) -> Sequence[str]:
    """Order of the sides in a repetition, reversed every other time."""
    return names if repetition % 2 else names[::-1]


def in_turns(
    ours: Callable[[], None], peer: Callable[[], None], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each call of "ours" and "peer" on the slowest rank; each one's first is not timed.

    Both run in turns, so that a busy machine is busy for both.
    """
    calls = {"ours": ours, "peer": peer}
    times = torch.zeros(2, repetitions + 1, dtype=torch.float64)
    for repetition in range(repetitions + 1):
        for side in turns(tuple(calls), repetition):
            own_memory(side)
            dist.barrier()
            start = time.perf_counter()
            calls[side]()
            times[tuple(calls).index(side), repetition] = time.perf_counter() - start
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return dict(zip(calls, times[:, 1:].tolist(), strict=True))
