"""Train for as long as you like, and fail if memory, open files or threads of any process grow.

    python -m tests.soak --minutes 60

It writes digits, trains on them on several ranks with reader processes, curves, evaluations and
checkpoints, and looks at every process of the run each few seconds. What a process has in the last
part of the time is compared with what it had in the first part after a warm-up.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

_TRAIN = (sys.executable, "-m", "megatron_mimo.cli", "train")
_LAYOUT = {3: ("--encoder-dp", "1", "--llm-dp", "2"), 2: ("--encoder-dp", "1", "--llm-dp", "1")}
# Parts of the time after the warm-up that are compared: the first and the last of so many.
_PARTS = 4


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process had at a time.

    Attributes:
        memory: Memory in MiB, pages that processes share divided among them.
        files: Number of open descriptors.
        threads: Number of threads.
    """

    memory: float
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """Growth that counts as none.

    Attributes:
        memory: Memory in MiB.
        files: Number of descriptors.
        threads: Number of threads.
    """

    memory: float = 24.0
    files: float = 4.0
    threads: float = 2.0


@dataclass(slots=True)
class Record:
    """What the processes of a run had over time.

    Attributes:
        names: Process -> its name.
        usages: Process -> seconds since the start, and what it had.
    """

    names: dict[int, str] = field(default_factory=dict)
    usages: dict[int, list[tuple[float, Usage]]] = field(default_factory=dict)

    def add(self, seconds: float, pid: int, usage: Usage) -> None:
        """Note what a process has."""
        self.names[pid] = _name(pid)
        self.usages.setdefault(pid, []).append((seconds, usage))


@dataclass(frozen=True, slots=True)
class Growth:
    """Growth of one process.

    Attributes:
        name: Name of the process.
        first: What it had after the warm-up.
        last: What it had at the end.
    """

    name: str
    first: Usage
    last: Usage

    def beyond(self, bounds: Bounds) -> list[str]:
        """What grew by more than the bounds."""
        fields = ("memory", "files", "threads")
        return [
            f"{name} {getattr(self.first, name):g} -> {getattr(self.last, name):g}"
            for name in fields
            if getattr(self.last, name) - getattr(self.first, name) > getattr(bounds, name)
        ]


def growths(record: Record, begin: float, end: float) -> list[Growth]:
    """Growth of each process that lived through the time.

    Args:
        record: What the processes had.
        begin: Seconds at which the warm-up is over.
        end: Seconds at which the run ends by itself.
    """
    part = (end - begin) / _PARTS
    found = []
    for pid, usages in record.usages.items():
        first = [usage for at, usage in usages if begin <= at < begin + part]
        last = [usage for at, usage in usages if end - part <= at < end]
        if first and last:
            found.append(Growth(f"{record.names[pid]} ({pid})", _typical(first), _typical(last)))
    return found


def watch(command: Sequence[str], seconds: float, every: float) -> tuple[Record, int | None]:
    """Run a command, and look at its processes.

    Args:
        command: Program and arguments.
        seconds: Time after which nothing more is noted; the command ends by itself.
        every: Seconds between two looks.

    Returns:
        The record, and the exit code if the command ended before its time, else None.
    """
    record, start = Record(), time.monotonic()
    with subprocess.Popen(command) as process:
        while (now := time.monotonic() - start) < seconds:
            if process.poll() is not None:
                return record, process.returncode
            for pid in _tree(process.pid):
                usage = _usage(pid)
                if usage is not None:
                    record.add(now, pid, usage)
            time.sleep(every)
        code = process.wait()
    return record, code or None


def table(found: Sequence[Growth], bounds: Bounds) -> str:
    """A line for each process."""
    lines = [f"{'process':<32}{'MiB':>18}{'files':>12}{'threads':>12}"]
    for each in sorted(found, key=lambda growth: growth.name):
        a, b = each.first, each.last
        lines.append(
            f"{each.name:<32}{a.memory:>8.1f} {b.memory - a.memory:>+8.1f} {a.files:>6g} "
            f"{b.files - a.files:>+4g} {a.threads:>6g} {b.threads - a.threads:>+4g}"
            f"{'  GROWS' if each.beyond(bounds) else ''}"
        )
    return "\n".join(lines)


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """What to run, and what counts as growth."""
    usual = Bounds()
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="time of the run")
    parser.add_argument("--warm-up", type=float, default=None, help="minutes; left out: a third")
    parser.add_argument("--ranks", type=int, choices=sorted(_LAYOUT), default=3)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--most-mib", type=float, default=usual.memory, help="of each process")
    parser.add_argument("--most-files", type=float, default=usual.files)
    parser.add_argument("--most-threads", type=float, default=usual.threads)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and judge; 0 if nothing grows."""
    options = read_options(argv)
    bounds = Bounds(options.most_mib, options.most_files, options.most_threads)
    warm_up = options.minutes / 3 if options.warm_up is None else options.warm_up
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "digits"
        digits = [*_TRAIN[:-1], "data", "digits", "--num-train", "2000", "--out", str(data)]
        subprocess.run(digits, check=True)
        command = [*_TRAIN, *_flags(options.ranks, options.minutes, data, Path(place))]
        record, code = watch(command, 60 * options.minutes, options.every)
    if code is not None:
        print(f"the run ended with exit code {code} before its time")
        return 1
    found = growths(record, 60 * warm_up, 60 * options.minutes)
    print(table(found, bounds))
    growing = [f"{each.name}: {', '.join(each.beyond(bounds))}" for each in found]
    growing = [line for line in growing if not line.endswith(": ")]
    print("\n".join(growing) or f"nothing grows in {options.minutes - warm_up:g} minutes")
    return 1 if growing or not found else 0


def _flags(ranks: int, minutes: float, data: Path, place: Path) -> list[str]:
    return [
        *("--nproc", str(ranks), *_LAYOUT[ranks]),
        *("--dataset-provider", "energon", "--data-path", str(data), "--seq-length", "64"),
        *("--micro-batch-size", "4", "--global-batch-size", "16", "--num-workers", "2"),
        *("--train-iters", "100000000", "--log-interval", "100", "--lr-decay-iters", "100000"),
        *("--eval-interval", "200", "--eval-iters", "2", "--tensorboard-dir", str(place / "tb")),
        *("--save", str(place / "save"), "--save-interval", "200", "--async-save"),
        *("--exit-duration-in-mins", f"{minutes + 0.05:g}"),
    ]


def _tree(top: int) -> Iterator[int]:
    """A process and all below it."""
    yield top
    try:
        for task in os.listdir(f"/proc/{top}/task"):
            children = Path(f"/proc/{top}/task/{task}/children").read_text(encoding="ascii")
            for child in children.split():
                yield from _tree(int(child))
    except OSError:
        return


def _usage(pid: int) -> Usage | None:
    """What a process has; None if it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        memory = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
        files = len(os.listdir(f"/proc/{pid}/fd"))
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except (OSError, StopIteration):
        return None
    return Usage(int(memory.split()[1]) / 1024, files, threads)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "?"


def _typical(usages: Sequence[Usage]) -> Usage:
    return Usage(
        median(usage.memory for usage in usages),
        round(median(usage.files for usage in usages)),
        round(median(usage.threads for usage in usages)),
    )


if __name__ == "__main__":
    sys.exit(main())
