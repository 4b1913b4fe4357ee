"""Whether two runs follow one curve: `megatron-mimo parity`."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from megatron_mimo.tools.curves import LOSS, NORM, Quantity, RunCurves, read_run
from megatron_mimo.training.config import File, Switch

EXIT_PASS, EXIT_FAIL = 0, 3
_FIRST_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Compare the curves of two runs, ours or stock Megatron's, or their saved activations.

    RUN_A is the reference. Each is metrics.jsonl, a TensorBoard event file, or a folder with
    either. The exit code is 0 when they agree and 3 when they part.

    Attributes:
        tensors: Compare folders of --save-activations instead of curves.
        tolerance: Largest relative difference of the loss; with --tensors, of a sample at each
            point.
        norm_tolerance: Largest relative difference of the gradient norm.
        steps: Iterations to show, as in 1,2,3,10; left out: the first three, powers of ten and the
            last.
        png: Draw both curves and their relative difference into this file.
        json: Write what was found into this file.
    """

    tensors: Switch = False
    tolerance: float = 1e-5
    norm_tolerance: float = 1e-4
    steps: Annotated[str | None, arg(metavar="N,N,...", help_behavior_hint="")] = None
    png: File = None
    json: File = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--tolerance", self.tolerance),
            ("--norm-tolerance", self.norm_tolerance),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{flag} is {value}: expected a number from 0 on")
        if self.tensors and (self.png is not None or self.steps is not None):
            raise ValueError(
                f"{'--png' if self.png is not None else '--steps'} shows curves, which --tensors "
                f"does not read: drop one of them"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One quantity at one step of both runs.

    Attributes:
        step: Iteration.
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
        quantity: Which.
        tolerance: Largest relative difference that passes.
        differences: At each step compared, ascending.
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
    """What comparing two runs found.

    Attributes:
        a: The reference.
        b: The other run.
        comparisons: The loss, and the gradient norm where both runs have logged it.
        notes: What a reader should know of the runs.
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


def run_parity(a: str, b: str, config: ParityConfig) -> int:
    """Compare two runs, print what was found, and draw and write it where asked for.

    Returns:
        0 when they agree, 3 when they part.

    Raises:
        ValueError: A run cannot be read, they have no step in common, or a file cannot be written.
    """
    if config.tensors:
        from megatron_mimo.tools.parity_tensors import run_tensor_parity

        return run_tensor_parity(a, b, tolerance=config.tolerance, json_path=config.json)
    parity = compare_runs(
        read_run(a),
        read_run(b),
        tolerance=config.tolerance,
        norm_tolerance=config.norm_tolerance,
    )
    shown = _chosen_steps(config.steps, parity)
    _print(parity, shown)
    if config.json is not None:
        write_json(config.json, as_json(parity))
    if config.png is not None:
        from megatron_mimo.tools.parity_draw import draw_png

        draw_png(parity, config.png)
        sys.stdout.write(f"wrote {config.png}\n")
    return EXIT_PASS if parity.passes else EXIT_FAIL


def compare_runs(a: RunCurves, b: RunCurves, *, tolerance: float, norm_tolerance: float) -> Parity:
    """Compare two runs at the iterations that both have logged.

    Args:
        a: The reference.
        b: The other run.
        tolerance: Largest relative difference of the loss.
        norm_tolerance: Of the gradient norm.

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
                f"{quantity.name}: not finite in both runs at {_few(found.skipped)}, so not "
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


def default_steps(common: Sequence[int]) -> tuple[int, ...]:
    """The first three steps, powers of ten, and the last."""
    first = set(common[:_FIRST_STEPS]) | {common[-1]}
    powers = {10**n for n in range(1, len(str(common[-1])))}
    return tuple(step for step in common if step in first | powers)


def verdict(parity: Parity) -> str:
    """PASS or FAIL, and why, in a line for each quantity."""
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
            f"{len(comparison.differences)} steps, most at step {worst.step} ({_relative(worst)})"
        )
    return "\n".join([f"{'PASS' if parity.passes else 'FAIL'}: {lines[0]}", *lines[1:]])


def as_json(parity: Parity) -> dict[str, Any]:
    """Everything that was found, for other programs; what is not finite is None."""
    return {
        "verdict": "PASS" if parity.passes else "FAIL",
        "run_a": parity.a.name,
        "run_b": parity.b.name,
        "quantities": {
            comparison.quantity.field: {
                "tolerance": comparison.tolerance,
                "worst": asdict(comparison.worst),
                "first_beyond": comparison.first_beyond and asdict(comparison.first_beyond),
                "steps": [asdict(difference) for difference in comparison.differences],
            }
            for comparison in parity.comparisons
        },
        "notes": list(parity.notes),
    }


def write_json(path: str, values: dict[str, Any]) -> None:
    """Write values to a file and say so; numbers that JSON does not have become null.

    Raises:
        ValueError: The file cannot be written.
    """
    text = json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"wrote {path}\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _chosen_steps(text: str | None, parity: Parity) -> tuple[int, ...]:
    if text is None:
        return default_steps(parity.steps)
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--steps {text}: expected iterations, as in 1,2,3,10") from None
    missing = [step for step in chosen if step not in parity.steps]
    if missing:
        raise ValueError(
            f"--steps {text}: the runs have no common loss at {_few(missing)}; they have one at "
            f"{len(parity.steps)} steps from {parity.steps[0]} to {parity.steps[-1]}"
        )
    return tuple(chosen)


def _print(parity: Parity, shown: Sequence[int]) -> None:
    # A table in a log should not break where a terminal would.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    console.print(f"RUN_A {parity.a.name}: {parity.a.source}", soft_wrap=True)
    console.print(f"RUN_B {parity.b.name}: {parity.b.source}", soft_wrap=True)
    for note in parity.notes:
        console.print(f"note: {note}", soft_wrap=True)
    table = Table()
    table.add_column("step", justify="right")
    for comparison in parity.comparisons:
        name = comparison.quantity.name
        for heading in (f"{name} A", f"{name} B", "(B - A) / A"):
            table.add_column(heading, justify="right")
    by_step = [{d.step: d for d in c.differences} for c in parity.comparisons]
    for step in shown:
        table.add_row(str(step), *_cells([found.get(step) for found in by_step]))
    table.add_section()
    table.add_row(
        "worst",
        *(
            cell
            for comparison in parity.comparisons
            for cell in ("", f"step {comparison.worst.step}", _relative(comparison.worst))
        ),
    )
    console.print(table)
    console.print(verdict(parity), soft_wrap=True)


def _cells(found: Sequence[Difference | None]) -> list[str]:
    cells: list[str] = []
    for difference in found:
        if difference is None:
            cells += ["", "", ""]
        else:
            cells += [f"{difference.a:.7g}", f"{difference.b:.7g}", _relative(difference)]
    return cells


def _relative(difference: Difference) -> str:
    if math.isnan(difference.relative):
        return f"{'RUN_B' if math.isfinite(difference.a) else 'RUN_A'} not finite"
    return f"{difference.relative:+.2e}"


def _apart(difference: Difference) -> str:
    values = f"{difference.a:.7g} in RUN_A, {difference.b:.7g} in RUN_B"
    return f"{values} ({_relative(difference)})"


def _notes(name: str, run: RunCurves) -> list[str]:
    if not run.rewritten:
        return []
    return [
        f"{name} went back and wrote {_few(run.rewritten)} again, as after a resume: what it wrote "
        f"last counts"
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


def _few(steps: Sequence[int]) -> str:
    """Steps in words, the first few of many."""
    shown = ", ".join(map(str, steps[:5]))
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"
