"""Start of a rank by a launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

RANK = """
from megatron_mimo.runtime import initialize, shutdown
context = initialize("cpu", timeout_minutes=1)
import torch
total = torch.tensor(context.rank + 1)
torch.distributed.all_reduce(total)
print(context.rank, context.local_rank, context.world_size, total.item())
shutdown()
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_slurm_tasks_meet() -> None:
    shared = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    } | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0].splitlines()[-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert outputs == ["0 0 2 3", "1 1 2 3"]
