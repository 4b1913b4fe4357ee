"""Whether two runs follow one curve: `megatron-mimo parity`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from megatron_mimo.settings import File, Switch, Within, check_bounds
from megatron_mimo.tools.curves import read_run
from megatron_mimo.tools.parity.compare import (
    Difference,
    Parity,
    compare_runs,
    few_steps,
    relative_words,
    verdict,
)
from megatron_mimo.tools.parity.outcome import EXIT_FAIL, EXIT_PASS, write_json

_FIRST_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Compare the curves of two runs, ours or stock Megatron's, or their saved activations.

    RUN_A is the reference. Each is metrics.jsonl, a TensorBoard event file, or a folder with
    either. The exit code is 0 when they agree and 3 when they differ.

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
    tolerance: Annotated[float, Within(0, 1e9)] = 1e-5
    norm_tolerance: Annotated[float, Within(0, 1e9)] = 1e-4
    steps: Annotated[str | None, arg(metavar="N,N,...", help_behavior_hint="")] = None
    png: File = None
    json: File = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.tensors and (self.png is not None or self.steps is not None):
            raise ValueError(
                f"{'--png' if self.png is not None else '--steps'} shows curves, which --tensors "
                f"does not read: drop one of them"
            )


def run_parity(a: str, b: str, config: ParityConfig) -> int:
    """Compare two runs, print the result, and draw and write it where requested.

    Returns:
        0 when they agree, 3 when they differ.

    Raises:
        ValueError: A run cannot be read, the runs have no step in common, or a file cannot be
            written.
    """
    if config.tensors:
        from megatron_mimo.tools.parity.tensors import run_tensor_parity

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
        from megatron_mimo.tools.parity.draw import draw_png

        draw_png(parity, config.png)
        sys.stdout.write(f"wrote {config.png}\n")
    return EXIT_PASS if parity.passes else EXIT_FAIL


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
            f"--steps {text}: the runs have no common loss at {few_steps(missing)}; they have one "
            f"at {len(parity.steps)} steps from {parity.steps[0]} to {parity.steps[-1]}"
        )
    return tuple(chosen)


def default_steps(common: Sequence[int]) -> tuple[int, ...]:
    """The first three steps, powers of ten, and the last."""
    first = set(common[:_FIRST_STEPS]) | {common[-1]}
    powers = {10**n for n in range(1, len(str(common[-1])))}
    return tuple(step for step in common if step in first | powers)


def as_json(parity: Parity) -> dict[str, Any]:
    """The complete result, for other programs; numbers that are not finite are None."""
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
            for cell in ("", f"step {comparison.worst.step}", relative_words(comparison.worst))
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
            cells += [f"{difference.a:.7g}", f"{difference.b:.7g}", relative_words(difference)]
    return cells
