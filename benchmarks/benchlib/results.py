"""Tables of RESULTS.md, from the rows of one or more runs of a benchmark."""

import re
import statistics
from collections.abc import Sequence

from benchlib.machine import Circumstances
from benchlib.report import Row, targets_met

WIDEST = 0.1
"""A ratio whose margin is a larger part of it says too little."""

Run = tuple[Circumstances, Sequence[Row]]


def is_wide(row: Row) -> bool:
    """Whether a row's pairs lie too far apart to judge it."""
    return row.verdict == "unclear" or (
        row.margin is not None and row.margin > WIDEST * abs(row.ratio)
    )


def pooled(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of all runs together: the pairs of each run count alike, whatever they show.

    Raises:
        ValueError: The runs have other rows.
    """
    cases = [row.case for row in runs[0]]
    for rows in runs[1:]:
        if [row.case for row in rows] != cases:
            other = sorted({row.case for row in rows} ^ set(cases))
            raise ValueError(f"two runs of a benchmark differ in their rows: {other}")
    return [
        Row(
            table=same[0].table,
            line=same[0].line,
            column=same[0].column,
            ours=tuple(figure for row in same for figure in row.ours),
            peer=tuple(figure for row in same for figure in row.peer),
            target=same[0].target,
            unit=same[0].unit,
        )
        for same in zip(*runs, strict=True)
    ]


def tables(runs: Sequence[Run]) -> str:
    """Markdown: what the figures depend on, a table for each title, and the targets."""
    rows = pooled([rows for _, rows in runs])
    parts = [_said_of([found for found, _ in runs], rows)]
    for title in dict.fromkeys(row.table for row in rows):
        if title:
            parts.append(f"**{title}**")
        parts.append(_table([row for row in rows if row.table == title]))
    if any(row.target is not None for row in rows):
        parts.append(f"{targets_met(rows)}.")
    return "\n\n".join(parts)


def _said_of(runs: Sequence[Circumstances], rows: Sequence[Row]) -> str:
    last = runs[-1]
    threads = "one thread" if last.threads == 1 else f"{last.threads} threads"
    loads = ", ".join(f"{found.load:.1f}" for found in runs)
    text = (
        f"*{last.size.capitalize()} run of commit {last.commit}, {last.date}; {last.processor}, "
        f"{last.cores} cores, {threads} a process; {last.software}; load before it {loads}.*"
    )
    wide = sum(map(is_wide, rows))
    if len(runs) > 1:
        text += f" *The pairs of {len(runs)} runs, as one told too little.*"
    if wide:
        text += f" *{wide} of {len(rows)} ratios stayed too wide to judge, marked with ~.*"
    return text


def _table(rows: Sequence[Row]) -> str:
    lines = list(dict.fromkeys(row.line for row in rows))
    columns = list(dict.fromkeys(row.column for row in rows))
    cells = {(row.line, row.column): _cell(row) for row in rows}
    written = [["", *columns], ["---"] * (len(columns) + 1)]
    written += [[line, *(cells.get((line, column), "") for column in columns)] for line in lines]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '\\|') for cell in line)} |" for line in written
    )


def _cell(row: Row) -> str:
    if len(set(row.ours)) == len(set(row.peer)) == 1:
        text = f"{row.ours[0]:.4g} / {row.peer[0]:.4g} = {row.ratio:.3g}"
    elif row.margin is None:
        ours, peer = statistics.median(row.ours), statistics.median(row.peer)
        text = f"{ours:.4g} / {peer:.4g} {row.unit} = {row.ratio:.2f}"
    else:
        text = f"{row.ratio:.3f} ± {row.margin:.3f}"
    if is_wide(row):
        text = f"~ {text}"
    return text if row.target is None else f"{text} ({row.target:.3g} {row.verdict})"


def replaced(text: str, name: str, block: str) -> str:
    """RESULTS.md with a benchmark's tables renewed; what stands around them stays.

    Raises:
        ValueError: The text does not have, exactly once, the two lines that enclose the tables.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    found = re.findall(f"{re.escape(begin)}\n.*?{re.escape(end)}", text, flags=re.DOTALL)
    if len(found) != 1:
        raise ValueError(
            f"RESULTS.md has {len(found)} places for {name}, expected one: write the lines "
            f"{begin!r} and {end!r} where its tables belong"
        )
    return text.replace(found[0], f"{begin}\n{block}\n{end}")
