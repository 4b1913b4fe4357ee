"""Validate this machine's GPUs: `scripts/validate_gpu.sh` hands its arguments over."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mimo.tools.doctor.gather import Silent, children
from tests.validation.page import table, update
from tests.validation.plan import LAYOUTS
from tests.validation.run import ROOT, Validation

PAGE = ROOT / "docs" / "gpu-validation.md"
TESTS = "tests/unit_tests/runtime tests/unit_tests/kernels tests/unit_tests/bridge -m 'not slow'"
_PASSED, _FAILED, _UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every check and write the table.

    Returns:
        0 when all pass, 1 when one fails, 2 when nothing can be run.
    """
    given = _parser().parse_args(arguments)
    try:
        gpus = _count(given.device, given.gpus)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return _UNUSABLE
    out = Path(given.out).absolute()
    # What an earlier validation has left would be compared too.
    if out.exists() and any(out.iterdir()):
        if not (out / "doctor.out").exists():
            sys.stderr.write(f"error: --out {out} holds other files: name a new folder\n")
            return _UNUSABLE
        shutil.rmtree(out)
    rows = Validation(
        device=given.device,
        gpus=gpus,
        iterations=given.iterations,
        folder=out,
        tests=shlex.split(given.tests),
        limit_s=given.limit,
    ).rows()
    # A try on a host is no result of a GPU.
    default = PAGE if given.device == "cuda" else out / PAGE.name
    page = default if given.page is None else Path(given.page)
    update(page, rows, PAGE)
    failed = [row for row in rows if row.result != "PASS"]
    sys.stdout.write(f"{table(rows)}\n{len(rows) - len(failed)} of {len(rows)} checks pass; ")
    sys.stdout.write(f"the table is in {page}, logs are in {out}\n")
    return _FAILED if failed else _PASSED


def _count(device: str, wanted: int | None) -> int:
    """Number of GPUs to use, one that a layout is for.

    Raises:
        ValueError: There are fewer, or none, or no layout is for so many.
    """
    if wanted is not None and wanted not in LAYOUTS:
        raise ValueError(f"--gpus {wanted}: expected one of {', '.join(map(str, LAYOUTS))}")
    if device == "cpu":
        return wanted or 2
    try:
        (answer,) = children([["megatron_mimo.tools.doctor.probes", "gpus"]], 180)
    except Silent as reason:
        raise ValueError(f"CUDA gives no answer ({reason}): see `megatron-mimo doctor`") from None
    there = len(answer["gpus"])
    if not there:
        raise ValueError(
            "torch sees no GPU on this machine, and this validates GPUs: see `megatron-mimo "
            "doctor`, or try the script itself on the host with --device cpu"
        )
    if wanted is not None and wanted > there:
        raise ValueError(f"--gpus {wanted}: torch sees {there}")
    return wanted or max(size for size in LAYOUTS if size <= there)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/validate_gpu.sh",
        description="Run on 1, 2 or 8 GPUs what the tests run on hosts, and write the table of "
        "docs/gpu-validation.md. Ends with 1 when a check fails.",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself"
    )
    parser.add_argument("--gpus", type=int, help="1, 2 or 8 (default: as many as there are)")
    parser.add_argument("--out", default="runs/validate-gpu", help="folder of runs and logs")
    parser.add_argument(
        "--page",
        metavar="FILE",
        help="page that gets the rows (default: docs/gpu-validation.md, with --device cpu a copy "
        "in --out)",
    )
    parser.add_argument(
        "--iterations", type=int, default=20, metavar="N", help="length of a run (%(default)s)"
    )
    parser.add_argument(
        "--tests", default=TESTS, help="arguments of pytest; '' runs none (%(default)s)"
    )
    parser.add_argument(
        "--limit", type=float, default=1800, metavar="S", help="seconds of a command (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
