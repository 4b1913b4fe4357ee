"""Rows of a benchmark, its command line, and what it prints and writes."""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchlib.machine import Circumstances, circumstances

Size = Literal["smoke", "quick", "full"]
"""How much is measured: seconds that show that it runs, minutes for a first look, everything."""

Verdict = Literal["met", "missed", "unclear"]

FEWEST_PAIRS = 3
"""Fewer measurements have no spread."""
NOTCH = 1.57
"""Interquartile ranges, by the square root of the pairs, that a median may be off: the notch of a
box plot, which holds the median of many more pairs 19 times in 20."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison, which is a cell of a table.

    Attributes:
        table: Title of the table; empty where a benchmark has only one.
        line: Case that was run.
        column: Quantity that was measured, or the peer that it is compared with.
        ours: Our figures, lower is better; one of each pair that was measured in turns.
        peer: Figures of the peer, or of the limit.
        target: Largest ratio that meets the target; None where there is none.
        unit: Unit of both figures.

    Raises:
        ValueError: The numbers of our figures and of the peer's differ, or there are none.
    """

    table: str = ""
    line: str
    column: str
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    target: float | None = None
    unit: str

    def __post_init__(self) -> None:
        if not 0 < len(self.ours) == len(self.peer):
            raise ValueError(
                f"{self.case}: {len(self.ours)} figures of ours and {len(self.peer)} of the "
                f"peer's, expected pairs and at least one"
            )

    @property
    def case(self) -> str:
        """Table, line and column as one name."""
        return ", ".join(name for name in (self.table, self.line, self.column) if name)

    @property
    def ratios(self) -> list[float]:
        """Our figure divided by the peer's, for each pair."""
        return [_ratio(one, other) for one, other in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios."""
        return statistics.median(self.ratios)

    @property
    def margin(self) -> float | None:
        """How far the ratio may be off; None with too few pairs to tell."""
        ratios = self.ratios
        if len(ratios) < FEWEST_PAIRS or not all(map(math.isfinite, ratios)):
            return None
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return NOTCH * (third - first) / math.sqrt(len(ratios))

    @property
    def verdict(self) -> Verdict | None:
        """Whether the target is met; unclear where the margin reaches it, None without one."""
        if self.target is None:
            return None
        if abs(self.ratio - self.target) < (self.margin or 0.0):
            return "unclear"
        return "met" if self.ratio <= self.target else "missed"


def _ratio(ours: float, peer: float) -> float:
    if peer == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / peer


def run_benchmark(
    description: str, measure: Callable[[Size], Iterable[Row]], *, threads: int
) -> None:
    """The command line that every benchmark has: measure, print, and write with `--json`.

    Args:
        description: Docstring of the benchmark; its first line is the title.
        measure: Function that yields the rows of a size.
        threads: Number of threads of each process that computes; one in a smoke run.
    """
    title = description.splitlines()[0]
    parser = argparse.ArgumentParser(description=title)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--smoke", action="store_const", const="smoke", dest="size", help="seconds: that it runs"
    )
    size.add_argument(
        "--quick", action="store_const", const="quick", dest="size", help="few cases and turns"
    )
    parser.set_defaults(size="full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    flags = parser.parse_args()
    threads = 1 if flags.size == "smoke" else threads
    # Processes that are started from here have as many, too.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    found = circumstances(flags.size, threads)
    rows = list(measure(flags.size))
    show(title, rows)
    if flags.json is not None:
        flags.json.write_text(written(found, rows))


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows, and how many meet their target."""
    table = Table(title=title, title_justify="left")
    for name in ("case", "ours", "peer", "unit", "ratio", "+-", "target", ""):
        justify: Literal["left", "right"] = "left" if name in ("case", "unit", "") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(
            row.case,
            f"{statistics.median(row.ours):.4g}",
            f"{statistics.median(row.peer):.4g}",
            row.unit,
            f"{row.ratio:.3f}",
            "" if row.margin is None else f"{row.margin:.3f}",
            "" if row.target is None else f"{row.target:.2f}",
            row.verdict or "",
        )
    # A file has no width; keep each case on one line.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(targets_met(rows))


def targets_met(rows: Sequence[Row]) -> str:
    """How many of those rows that have a target meet it."""
    verdicts = [row.verdict for row in rows if row.target is not None]
    unclear = verdicts.count("unclear")
    return f"{verdicts.count('met')} of {len(verdicts)} targets met" + (
        f", {unclear} unclear" if unclear else ""
    )


def written(found: Circumstances, rows: Sequence[Row]) -> str:
    """A run as JSON: its circumstances, and its rows with the ratio of each."""
    return json.dumps(
        {
            "circumstances": asdict(found),
            "rows": [asdict(row) | {"ratio": row.ratio, "margin": row.margin} for row in rows],
        },
        indent=1,
    )


def read(text: str) -> tuple[Circumstances, list[Row]]:
    """What `written` wrote."""
    given: dict[str, Any] = json.loads(text)
    rows = [
        Row(
            **{key: value for key, value in row.items() if key not in ("ratio", "margin")}
            | {side: tuple(row[side]) for side in ("ours", "peer")}
        )
        for row in given["rows"]
    ]
    return Circumstances(**given["circumstances"]), rows
