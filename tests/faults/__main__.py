"""Which tests find which planted fault: `python -m tests.faults`, from the repository's root."""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence

from tests.faults.fault import Fault
from tests.faults.run import ROOT, Outcome, run_tests
from tests.faults.table import FAULTS

EVERYDAY = (
    "tests/integration/test_cover.py tests/integration tests/unit_tests -m 'not slow' "
    # They say that an edit no longer applies where it has been applied.
    "--ignore=tests/unit_tests/faults"
)
"""What `make test` runs, the cover of layouts first, since it finds most."""
_FOUND, _MISSED, _UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tests against faults, a row for each.

    Returns:
        0 when every fault is found, 1 when one is missed, 2 when nothing can be said.
    """
    given = _parser().parse_args(arguments)
    try:
        chosen = _chosen(given.names)
        if given.list:
            for fault in chosen:
                print(f"{fault.name}\n    {fault.path}\n    {fault.why}")
            return _FOUND
        for fault in chosen:
            # One that is out of date is told of before anything is run.
            fault.edited((ROOT / fault.path).read_text(encoding="utf-8"))
        return _compare(chosen, shlex.split(given.against), baseline=given.baseline)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _UNUSABLE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Plant faults in copies of the repository, one at a time, and see whether the "
        "tests find them. Ends with 1 when one is missed.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault; all when none is named")
    parser.add_argument("--list", action="store_true", help="say what the faults are, and end")
    parser.add_argument(
        "--against",
        default=EVERYDAY,
        metavar="ARGUMENTS",
        help="what pytest is called with, in one string (default: %(default)s)",
    )
    parser.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="do not run the tests without a fault first, to see that they pass",
    )
    return parser


def _chosen(names: Sequence[str]) -> tuple[Fault, ...]:
    known = {fault.name: fault for fault in FAULTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no fault is called {', '.join(unknown)}: --list names them")
    return tuple(known[name] for name in names) or FAULTS


def _compare(chosen: Sequence[Fault], tests: Sequence[str], *, baseline: bool) -> int:
    if baseline:
        whole = run_tests(tests, None)
        if whole.found_by is not None:
            raise RuntimeError(
                f"{whole.found_by} fails without a fault, so it can find none:\n{whole.output}"
            )
        _print("(no fault)", whole, "passes")
    missed = []
    for fault in chosen:
        outcome = run_tests(tests, fault)
        _print(fault.name, outcome, "MISSED")
        if outcome.found_by is None:
            missed.append(fault.name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults found")
    if missed:
        print(f"missed: {', '.join(missed)}")
    return _MISSED if missed else _FOUND


def _print(name: str, outcome: Outcome, otherwise: str) -> None:
    print(
        f"{name:<46} {outcome.cpu_s:7.1f} s of processor {outcome.wall_s:7.1f} s  "
        f"{outcome.found_by or otherwise}" + (f": {outcome.why}" if outcome.why else ""),
        flush=True,
    )


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.exit(main())
