"""Time and machine of a benchmark run."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/RESULTS.md"


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """Conditions of a measurement beside the code.

    Attributes:
        size: Amount of work: smoke, quick or full.
        commit: Commit of the code, with "and changes" where files differed from it.
        date: Date of the run, in UTC.
        processor: Name of the processor.
        cores: Number of cores that the benchmark may use.
        threads: Number of threads of each process that computes.
        load: Load average of the minute before, from other work.
        software: Versions of torch and megatron-core.
    """

    size: str
    commit: str
    date: str
    processor: str
    cores: int
    threads: int
    load: float
    software: str


def circumstances(size: str, threads: int) -> Circumstances:
    """Conditions of a run that begins now."""
    return Circumstances(
        size=size,
        commit=commit(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        processor=processor(Path("/proc/cpuinfo")),
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        load=round(os.getloadavg()[0], 1),
        software=f"torch {version('torch')}, megatron-core {version('megatron-core')}",
    )


def commit() -> str:
    """The commit that is checked out; RESULTS.md itself may differ from it."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        found = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", f":!{RESULTS}")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found} and changes" if changed else found


def processor(cpuinfo: Path) -> str:
    """Name, family and model, since clouds give several models one name."""
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip()
        for key, _, value in (
            line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
        )
    }
    name = fields.get("model name", platform.machine())
    if "model" in fields:
        name += f" (family {fields.get('cpu family', '?')}, model {fields['model']})"
    return name
