"""Runs tests in a copy of the repository, with a fault in it or without."""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.descendants import adopt_orphans, end_descendants
from tests.faults.fault import Fault
from tests.faults.watch import COLLECTION, VARIABLE

ROOT = Path(__file__).resolve().parents[2]
# Of pytest: tests were run, and some failed; nothing was collected.
_SOME_FAILED, _NONE_COLLECTED = 1, 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of tests went.

    Attributes:
        found_by: The first test that failed, or that was running when the run was cut; None when
            all passed.
        why: The first line of its error.
        cpu_s: Seconds of processor time, of all processes.
        wall_s: Seconds.
        output: The end of what pytest printed.
    """

    found_by: str | None
    why: str
    cpu_s: float
    wall_s: float
    output: str


def run_tests(arguments: Sequence[str], fault: Fault | None) -> Outcome:
    """Run pytest until the first failure, in a copy that is removed afterwards.

    Args:
        arguments: Of pytest: files, tests, options.
        fault: Planted in the copy; None for none.

    Raises:
        ValueError: The fault does not apply.
        RuntimeError: There is no git repository, tests could not be collected, or pytest was given
            what it does not know.
    """
    with _copy() as folder:
        if fault is not None:
            path = folder / fault.path
            path.write_text(fault.edited(path.read_text(encoding="utf-8")), encoding="utf-8")
        return _run(arguments, folder)


@contextmanager
def _copy() -> Iterator[Path]:
    """The working tree, but for what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        raise RuntimeError(f"git cannot list the files of {ROOT}: {listed.stderr.strip()}")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name) / "copy"
        for file in filter(None, listed.stdout.split("\0")):
            if (ROOT / file).is_file():
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / file, target)
                shutil.copymode(ROOT / file, target)
        # Fetched, not written; tests look for it at the top of the repository.
        if (ROOT / ".cache").is_dir():
            (folder / ".cache").symlink_to(ROOT / ".cache")
        yield folder


def _run(arguments: Sequence[str], folder: Path) -> Outcome:
    log, watch = folder.parent / "output", folder.parent / "watch"
    watch.touch()
    command = [
        *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
        *(
            "-p",
            "tests.faults.watch",
            "--timeout=1500",
            f"--basetemp={folder.parent / 'tmp'}",
            *arguments,
        ),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "TMPDIR": str(folder.parent),
        VARIABLE: str(watch),
    }
    adopt_orphans()
    start, cpu = time.perf_counter(), _cpu_seconds()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            end_descendants()
    text = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    found_by, why = _found_by(watch, code, command, text)
    return Outcome(found_by, why, _cpu_seconds() - cpu, time.perf_counter() - start, text)


def _found_by(
    watch: Path, code: int, command: Sequence[str], output: str
) -> tuple[str | None, str]:
    lines = [json.loads(line) for line in watch.read_text(encoding="utf-8").splitlines()]
    failures = [line for line in lines if "failed" in line]
    began = [line["began"] for line in lines if "began" in line]
    if code == 0:
        return None, ""
    if failures and failures[0]["when"] != COLLECTION:
        return str(failures[0]["failed"]), str(failures[0]["why"])
    # A time limit, or a crash of pytest itself, ends it in the middle of a test.
    if not failures and began and (code < 0 or code == _SOME_FAILED):
        return str(began[-1]), "the run was cut in this test"
    why = "no test was collected" if code == _NONE_COLLECTED else f"pytest ended with {code}"
    raise RuntimeError(f"{why}, so nothing was found out: {shlex.join(command)}\n{output.rstrip()}")


def _cpu_seconds() -> float:
    """Of children that have ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
