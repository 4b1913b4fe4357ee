"""A rank that sums over all ranks for ever, until one of them fails in a chosen way.

    failfast_worker.py HOW RANK FOLDER

Each rank writes its process id to FOLDER/pid-RANK when it takes part, and the failing rank the
time to FOLDER/failed. HOW is a key of `FAILURES`, "usage", "hold", which ends well, or "transfer":
rank 0 sends rows to rank 1 over a bridge, and one of the two is killed in the middle of a message.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mimo.bridge.plan import Message
from megatron_mimo.bridge.transport import Channel, Incoming, Outgoing
from megatron_mimo.failfast import guard_rank
from megatron_mimo.runtime.environment import first_node, read_environment


def raise_error() -> None:
    images = {"cat": 1}
    images["dog"] += 1


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_myself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def crash() -> None:
    ctypes.string_at(0)


def vanish() -> None:
    """Like the loss of a machine: the rank and its watcher end at the same time."""
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    kill_myself()


def kill_the_launcher() -> None:
    os.kill(int(os.environ["LAUNCHER"]), signal.SIGKILL)


def stop_my_watcher() -> None:
    """Nobody sees this rank any more; it goes on."""
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), signal.SIGSTOP)


def hold_the_lock() -> None:
    """Keep Python's lock, so that no thread of this process runs, for longer than the limit."""
    ctypes.PyDLL(None).usleep(4_000_000)


def wait_in_python() -> None:
    """Not in a collective: only this rank's watcher can end it."""
    threading.Event().wait()


FAILURES = {
    "exception": raise_error,
    "kill": kill_myself,
    "stop": stop_myself,
    "crash": crash,
    "vanish": vanish,
    "orphan": kill_the_launcher,
    "unwatched": stop_my_watcher,
}


def sum_for_ever(how: str, failing_rank: int, folder: Path) -> None:
    rank = dist.get_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    for iteration in range(1_000_000):
        total = torch.ones(1000)
        dist.all_reduce(total)
        if iteration == 20 and how == "hold" and rank == failing_rank:
            hold_the_lock()
        if iteration == 40 and how == "hold":
            return
        if iteration == 20 and how in FAILURES:
            if rank == failing_rank:
                (folder / "failed").write_text(str(time.time()))
                FAILURES[how]()
            elif rank == failing_rank + 1:
                wait_in_python()


def send_for_ever(failing_rank: int, folder: Path) -> None:
    rank = dist.get_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    num_rows, width = 16384, 2688
    channel = Channel(
        "rows",
        dist.group.WORLD,
        rank=rank,
        width=width,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rows = torch.ones(num_rows, width)
    whole = ((0, num_rows),)
    for m in range(1_000_000):
        if rank > 1:
            # Waits for what never ends.
            dist.barrier()
        pending = channel.post(
            m,
            Outgoing((Message(1, whole),), rows) if rank == 0 else None,
            Incoming((Message(0, whole),), num_rows) if rank == 1 else None,
        )
        if m == 3 and rank == failing_rank:
            (folder / "failed").write_text(str(time.time()))
            kill_myself()
        if pending is not None:
            pending.wait()
            pending.release()
        channel.drain()


def main() -> None:
    how, failing_rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    environment = read_environment(os.environ)
    roles = ("encoder dp 0 tp 0", "encoder dp 0 tp 1", "llm dp 0", "llm dp 1")
    with guard_rank(roles[environment.rank]):
        if how == "usage":
            first_node("")
        dist.init_process_group(
            "gloo",
            init_method=environment.init_method,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timedelta(minutes=10),
        )
        if how == "transfer":
            send_for_ever(failing_rank, folder)
        else:
            sum_for_ever(how, failing_rank, folder)
        dist.destroy_process_group()
    print(f"rank {environment.rank} done", flush=True)


if __name__ == "__main__":
    main()
