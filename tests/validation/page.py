"""The table of docs/gpu-validation.md: a row for each check, of every machine that made it."""

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

BEGIN, END = "<!-- rows of scripts/validate_gpu.sh: begin -->", "<!-- end -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A check on a machine.

    Attributes:
        what: What was checked.
        layout: Ranks and grids.
        result: "PASS" or "FAIL".
        difference: How far apart two runs were, or why there is no answer.
        versions: Versions of the libraries.
        gpu: Number and kind of the GPUs.
    """

    what: str
    layout: str
    result: str
    difference: str
    versions: str
    gpu: str


def read_rows(page: str) -> list[Row]:
    """Rows of a page.

    Raises:
        ValueError: The page has no place for them.
    """
    _, table, _ = _split(page)
    names = [field.name for field in fields(Row)]
    rows = []
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if len(cells) == len(names):
            rows.append(Row(**dict(zip(names, cells, strict=True))))
    return rows


def with_rows(page: str, rows: Sequence[Row]) -> str:
    """A page with new rows in the place of earlier ones of the same GPUs.

    Raises:
        ValueError: The page has no place for them.
    """
    before, _, after = _split(page)
    new = {row.gpu for row in rows}
    kept = [row for row in read_rows(page) if row.gpu not in new]
    return f"{before}{BEGIN}\n{table([*kept, *rows])}{END}{after}"


def without_rows(page: str) -> str:
    """A page with an empty table.

    Raises:
        ValueError: The page has no place for rows.
    """
    before, _, after = _split(page)
    return f"{before}{BEGIN}\n{table([])}{END}{after}"


def table(rows: Sequence[Row]) -> str:
    """Rows as a table; a sentence where there are none."""
    if not rows:
        return "No row yet.\n"
    names = [field.name for field in fields(Row)]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(_cell(text) for text in astuple(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def update(path: Path, rows: Sequence[Row], template: Path) -> None:
    """Write rows to a page, which is made from a template where it does not exist."""
    if path.exists():
        page = path.read_text(encoding="utf-8")
    else:
        page = without_rows(template.read_text(encoding="utf-8"))
    text = with_rows(page, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _split(page: str) -> tuple[str, str, str]:
    before, begin, rest = page.partition(BEGIN)
    rows, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN!r} and {END!r} to write rows between")
    return before, rows.strip("\n"), after
