"""Comparison of two runs' curves: how far they differ, from which step on, and a verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.tools.curves import LOSS, NORM, Quantity, RunCurves


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One quantity at one step of both runs.

    Attributes:
        step: Iteration of both runs.
        a: Value of the reference.
        b: Value of the other run.
        relative: (b - a) / |a|; nan where a value is not finite.
    """

    step: int
    a: float
    b: float
    relative: float

    @property
    def size(self) -> float:
        """|relative|, infinite where it is undefined."""
        return math.inf if math.isnan(self.relative) else abs(self.relative)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One quantity over the steps that both runs have logged.

    Attributes:
        quantity: Quantity that is compared.
        tolerance: Largest relative difference that passes.
        differences: Differences at each step that was compared, ascending.
        skipped: Steps at which neither run has a finite value.
    """

    quantity: Quantity
    tolerance: float
    differences: tuple[Difference, ...]
    skipped: tuple[int, ...]

    @property
    def worst(self) -> Difference:
        """The step at which the runs are furthest apart; the first such."""
        return max(self.differences, key=lambda difference: difference.size)

    @property
    def first_beyond(self) -> Difference | None:
        """The first step beyond the tolerance."""
        return next((d for d in self.differences if d.size > self.tolerance), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Result of comparing two runs.

    Attributes:
        a: Curves of the reference.
        b: Curves of the other run.
        comparisons: Comparison of the loss, and of the gradient norm where both runs have logged
            it.
        notes: Remarks on the runs for the reader.
    """

    a: RunCurves
    b: RunCurves
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether every quantity stays within its tolerance at every common step."""
        return all(comparison.first_beyond is None for comparison in self.comparisons)

    @property
    def steps(self) -> tuple[int, ...]:
        """Iterations whose loss is compared."""
        return tuple(difference.step for difference in self.comparisons[0].differences)


def compare_runs(a: RunCurves, b: RunCurves, *, tolerance: float, norm_tolerance: float) -> Parity:
    """Compare two runs at the iterations that both have logged.

    Args:
        a: Curves of the reference.
        b: Curves of the other run.
        tolerance: Largest relative difference of the loss.
        norm_tolerance: Largest relative difference of the gradient norm.

    Raises:
        ValueError: No iteration has a finite loss in either run.
    """
    comparisons, notes = [], [*_notes("RUN_A", a), *_notes("RUN_B", b), *_range_notes(a, b)]
    for quantity, limit in ((LOSS, tolerance), (NORM, norm_tolerance)):
        missing = [n for n, run in (("RUN_A", a), ("RUN_B", b)) if quantity.tag not in run.curves]
        if missing:
            notes.append(f"{quantity.name}: not in {' and '.join(missing)}, so not compared")
            continue
        found = compare(quantity, a.curves[quantity.tag], b.curves[quantity.tag], limit)
        if found.differences:
            comparisons.append(found)
        elif quantity is LOSS:
            raise ValueError(_nothing_in_common(a, b))
        else:
            notes.append(f"{quantity.name}: no common step with a number, so not compared")
        if found.skipped:
            notes.append(
                f"{quantity.name}: not finite in both runs at {few_steps(found.skipped)}, so not "
                f"compared there"
            )
    return Parity(a=a, b=b, comparisons=tuple(comparisons), notes=tuple(notes))


def compare(
    quantity: Quantity, a: Mapping[int, float], b: Mapping[int, float], tolerance: float
) -> Comparison:
    """Relative differences of a quantity at the common iterations of two curves."""
    common = sorted(a.keys() & b.keys())
    neither = [s for s in common if not math.isfinite(a[s]) and not math.isfinite(b[s])]
    skipped = set(neither)
    return Comparison(
        quantity=quantity,
        tolerance=tolerance,
        differences=tuple(
            Difference(step=s, a=a[s], b=b[s], relative=relative_difference(a[s], b[s]))
            for s in common
            if s not in skipped
        ),
        skipped=tuple(neither),
    )


def relative_difference(a: float, b: float) -> float:
    """(b - a) / |a|; nan where a value is not finite, infinite where only a is zero."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.nan
    if a == b:
        return 0.0
    return math.copysign(math.inf, b) if a == 0 else (b - a) / abs(a)


def verdict(parity: Parity) -> str:
    """PASS or FAIL with the reason, one line for each quantity."""
    lines = []
    for comparison in parity.comparisons:
        beyond, worst = comparison.first_beyond, comparison.worst
        name, limit = comparison.quantity.name, f"{comparison.tolerance:g}"
        if beyond is None:
            most = f"at most {worst.relative:+.2e}, at step {worst.step}"
            lines.append(f"{name} within {limit}: {most if worst.size else 'equal at every step'}")
            continue
        number = sum(d.size > comparison.tolerance for d in comparison.differences)
        lines.append(
            f"{name} beyond {limit} first at step {beyond.step}: {_apart(beyond)}; in {number} of "
            f"{len(comparison.differences)} steps, most at step {worst.step} "
            f"({relative_words(worst)})"
        )
    return "\n".join([f"{'PASS' if parity.passes else 'FAIL'}: {lines[0]}", *lines[1:]])


def relative_words(difference: Difference) -> str:
    """A relative difference as text, or which run is not finite."""
    if math.isnan(difference.relative):
        return f"{'RUN_B' if math.isfinite(difference.a) else 'RUN_A'} not finite"
    return f"{difference.relative:+.2e}"


def _apart(difference: Difference) -> str:
    values = f"{difference.a:.7g} in RUN_A, {difference.b:.7g} in RUN_B"
    return f"{values} ({relative_words(difference)})"


def _notes(name: str, run: RunCurves) -> list[str]:
    if not run.rewritten:
        return []
    return [
        f"{name} went back and wrote {few_steps(run.rewritten)} again, as after a resume: what it "
        f"wrote last counts"
    ]


def _range_notes(a: RunCurves, b: RunCurves) -> list[str]:
    notes = []
    steps_a, steps_b = list(a.loss), list(b.loss)
    common = a.loss.keys() & b.loss.keys()
    if steps_a != steps_b and common:
        notes.append(
            f"RUN_A has {_range(steps_a)}, RUN_B {_range(steps_b)}: {len(common)} in common are "
            f"compared"
        )
    if a.interval and b.interval and a.interval != b.interval:
        notes.append(
            f"RUN_A logs every {a.interval} iterations, RUN_B every {b.interval}: our losses are "
            f"means since the last log line, so log both alike (--log-interval) for a verdict"
        )
    return notes


def _nothing_in_common(a: RunCurves, b: RunCurves) -> str:
    steps_a, steps_b = list(a.loss), list(b.loss)
    if not set(steps_a) & set(steps_b):
        return (
            f"no step in common: {a.name} has {_range(steps_a)}, {b.name} {_range(steps_b)}; let "
            f"both log the same iterations (--log-interval)"
        )
    return f"the loss of {a.name} and {b.name} is not finite at any common step: nothing to compare"


def _range(steps: Sequence[int]) -> str:
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def few_steps(steps: Sequence[int]) -> str:
    """Steps as text, only the first ones if there are many."""
    shown = ", ".join(map(str, steps[:5]))
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"
