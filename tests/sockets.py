"""Counts the open files and sockets of each rank of runs of several sizes, as a table.

    python -m tests.sockets 4 8 16 24

Each run trains the mock model on this machine, a quarter of the ranks as encoder. It is ended when
its second iteration is done; a rank has about 500 MB.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_LIMIT_S = 600.0
_ESTABLISHED = "01"


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank has open.

    Attributes:
        rank: Its number.
        files: Open files, sockets among them.
        sockets: Established TCP connections.
    """

    rank: int
    files: int
    sockets: int


def measure(world_size: int) -> list[Rank]:
    """Run a job of `world_size` ranks for two iterations, and count.

    Raises:
        RuntimeError: The run did not get that far.
    """
    sources = max(1, world_size // 4)
    lanes = world_size - sources
    flags = (
        f"train --nproc {world_size} --encoder-dp {sources} --llm-dp {lanes} --seq-length 64 "
        f"--micro-batch-size 1 --global-batch-size {lanes} --train-iters 100000 --log-interval 1"
    )
    with tempfile.TemporaryFile("w+") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "megatron_mimo.cli", *flags.split()],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.monotonic() + _LIMIT_S
            while not re.search(r"iteration +2/", _text(log.fileno())):
                if run.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(_text(log.fileno())[-2000:])
                time.sleep(0.5)
            return [_count(rank, pid) for rank, pid in sorted(_ranks(run.pid).items())]
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait()


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 24, 0).decode(errors="replace")


def _ranks(launcher: int) -> dict[int, int]:
    """Rank -> process id, of the ranks that a launcher started. Their readers have their names."""
    parents: dict[int, int] = {}
    names: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        pid = int(folder.name)
        parents[pid] = int(stat[stat.rindex(")") + 1 :].split()[1])
        found = re.fullmatch(r"rank (\d+)", stat[stat.index("(") + 1 : stat.rindex(")")])
        if found:
            names[pid] = int(found[1])

    def descends(pid: int) -> bool:
        while pid in parents and pid != launcher:
            pid = parents[pid]
        return pid == launcher

    return {rank: pid for pid, rank in names.items() if parents[pid] not in names and descends(pid)}


def _count(rank: int, pid: int) -> Rank:
    targets = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(os.readlink(entry))
        except OSError:
            continue
    established = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _ESTABLISHED:
                established.add(f"socket:[{fields[9]}]")
    return Rank(rank, len(targets), sum(target in established for target in targets))


def main() -> None:
    """Measure, and print a line for each number of ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ranks", type=int, nargs="+", help="numbers of ranks, such as 4 8 16")
    print("| ranks | sockets: median | most | rank 0 | open files: median | most | rank 0 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for world_size in parser.parse_args().ranks:
        found = measure(world_size)
        assert len(found) == world_size, found
        cells = [world_size]
        for counts in ([one.sockets for one in found], [one.files for one in found]):
            cells += [int(statistics.median(counts)), max(counts), counts[0]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
