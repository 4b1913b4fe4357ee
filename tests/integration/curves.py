"""Curves that tests have trained, held against each other as `megatron-mimo parity` does it."""

from collections.abc import Sequence
from pathlib import Path

from megatron_mimo.tools.curves import LOSS, NORM, RunCurves
from megatron_mimo.tools.parity.command import ParityConfig
from megatron_mimo.tools.parity.compare import compare_runs, verdict


def assert_parity(wanted: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> None:
    """The tool says PASS at its own tolerances, 1e-5 in loss and 1e-4 in norm.

    Args:
        wanted: (loss, gradient norm, ...) of each step of the reference.
        found: The same of as many steps of another layout, or of fewer.
    """
    assert 0 < len(found) <= len(wanted)
    defaults = ParityConfig()
    parity = compare_runs(
        _run("one rank", wanted),
        _run("this layout", found),
        tolerance=defaults.tolerance,
        norm_tolerance=defaults.norm_tolerance,
    )
    assert (defaults.tolerance, defaults.norm_tolerance) == (1e-5, 1e-4)
    assert [len(comparison.differences) for comparison in parity.comparisons] == [len(found)] * 2
    assert parity.passes, verdict(parity)


def _run(name: str, points: Sequence[Sequence[float]]) -> RunCurves:
    return RunCurves(
        name=name,
        files=(Path(name),),
        curves={
            quantity.tag: {step: point[at] for step, point in enumerate(points, start=1)}
            for at, quantity in enumerate((LOSS, NORM))
        },
        rewritten=(),
    )
