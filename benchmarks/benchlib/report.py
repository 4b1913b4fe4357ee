"""Rows of a benchmark, as a table and as JSON."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        case: What was run.
        ours: Our figure, lower is better.
        peer: The peer's, or the limit's.
        target: Largest ratio that meets the target; None where there is none.
        unit: Of both figures.
    """

    case: str
    ours: float
    peer: float
    target: float | None
    unit: str

    @property
    def ratio(self) -> float:
        """Ours by the peer's."""
        if self.peer == 0:
            return 1.0 if self.ours == 0 else float("inf")
        return self.ours / self.peer

    @property
    def met(self) -> bool:
        """Whether the target is met; true without one."""
        return self.target is None or self.ratio <= self.target


def arguments(description: str) -> argparse.Namespace:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few cases and repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    return parser.parse_args()


def median_ratio(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float]:
    """Medians of both; they were measured in turns, so that noise hits both alike."""
    return statistics.median(ours), statistics.median(peer)


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows, and how many meet their target."""
    table = Table(title=title, title_justify="left")
    for name in ("case", "ours", "peer", "unit", "ratio", "target", ""):
        justify: Literal["left", "right"] = "left" if name in ("case", "unit", "") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(
            row.case,
            f"{row.ours:.4g}",
            f"{row.peer:.4g}",
            row.unit,
            f"{row.ratio:.3f}",
            "" if row.target is None else f"{row.target:.2f}",
            "" if row.target is None else ("met" if row.met else "missed"),
        )
    # A file has no width; keep each case on one line.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    judged = [row for row in rows if row.target is not None]
    console.print(f"{sum(row.met for row in judged)} of {len(judged)} targets met")


def write(rows: Sequence[Row], path: Path | None) -> None:
    """Write the rows as a JSON list of {case, ours, peer, ratio, target, unit}."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1))
