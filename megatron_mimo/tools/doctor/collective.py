"""One rank of the doctor's trial: a sum over the ranks of this machine, as training makes them.

NCCL fails in ways that only a first collective shows: shared memory that is too small, GPUs that
cannot reach each other, a library of another version.
"""

import json
import os
import sys
import time
from datetime import timedelta

_ELEMENTS = 1 << 22
"""16 MiB of float32: enough that the speed of a link shows, little for any GPU."""
_REPEATS = 5


def main(argv: list[str]) -> int:
    """Sum a tensor over all ranks, and print how fast that went.

    Args:
        argv: Backend, rank, number of ranks, path of the file that they meet at, limit in seconds.

    Returns:
        Exit code 0, or 1 when the sum is wrong.
    """
    backend, rank_text, size_text, meeting, limit_s = argv
    rank, size = int(rank_text), int(size_text)
    import torch
    import torch.distributed as dist

    # Ranks of one machine reach each other whatever its name leads to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=float(limit_s)),
        device_id=device if backend == "nccl" else None,
    )
    value = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(value)
    # Asking for a value waits for the device.
    least, most = value.min().item(), value.max().item()
    expected = size * (size + 1) / 2
    if (least, most) != (expected, expected):
        sys.stderr.write(f"the sum over {size} ranks is {least} to {most}, not {expected}\n")
        return 1
    value.zero_()
    started = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(value)
    value[0].item()
    seconds = (time.perf_counter() - started) / _REPEATS
    answer = {"gb_per_s": value.nbytes / seconds / 1e9, "megabytes": value.nbytes >> 20}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
