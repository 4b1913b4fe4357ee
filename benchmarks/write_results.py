"""Run benchmarks and write their tables into RESULTS.md; what is written around them stays.

A benchmark is run again while one of its ratios is too wide to judge, three times at most, and the
pairs of all its runs are taken together. Each table is written as soon as it is known.

    python benchmarks/write_results.py [--quick] [bench_step ...]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchlib.machine import REPOSITORY, RESULTS
from benchlib.report import read
from benchlib.results import Run, is_wide, pooled, replaced, tables

MOST_RUNS = 3


def main() -> None:
    """Renew the tables that the command line names, or all."""
    folder = Path(__file__).parent
    known = sorted(path.stem for path in folder.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases and turns of each")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; or all")
    flags = parser.parse_args()
    if unknown := sorted(set(flags.names) - set(known)):
        parser.error(f"no benchmark {', '.join(unknown)}: expected some of {', '.join(known)}")
    results = REPOSITORY / RESULTS
    for name in known:
        # A benchmark without a place for its tables is found before hours of measuring.
        replaced(results.read_text(), name, "")
    for name in flags.names or known:
        runs: list[Run] = []
        while len(runs) < MOST_RUNS:
            runs.append(run(folder / f"{name}.py", quick=flags.quick))
            if not any(map(is_wide, pooled([rows for _, rows in runs]))):
                break
        results.write_text(replaced(results.read_text(), name, tables(runs)))


def run(script: Path, *, quick: bool) -> Run:
    """What a benchmark measured; it prints its table, too."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        size = ["--quick"] if quick else []
        if code := subprocess.run([sys.executable, script, *size, "--json", rows]).returncode:
            sys.exit(code)
        return read(rows.read_text())


if __name__ == "__main__":
    main()
