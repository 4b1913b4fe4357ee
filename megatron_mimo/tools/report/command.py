"""`megatron-mimo report`: reads the files of a run, and writes one page about it."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from megatron_mimo.tools.curves import RunCurves, read_run
from megatron_mimo.tools.page import write_page
from megatron_mimo.tools.report import charts, summary
from megatron_mimo.tools.report.sections import Section, sections
from megatron_mimo.tools.report.timeline import Timeline, read_timeline
from megatron_mimo.watch.start_record import StartRecord, read_starts

_WIDTH = 84


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Make one HTML page of a run: curves, timeline, balance, speed, configuration, environment.

    RUN is the folder of --tensorboard-dir, or one above it; a folder of Megatron-LM's event files
    will do too, and gives the curves.

    Attributes:
        out: The page; left out: report.html in RUN.
        timeline: Folder of --timeline-profile's traces; left out: where the run has put them.
        title: Heading; left out: RUN.
    """

    out: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    timeline: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    title: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None


def run_report(path: str, config: ReportConfig) -> int:
    """Read a run, write its page, and print the page's path.

    Args:
        path: Path to the run.
        config: Values of the flags.

    Returns:
        Exit code 0.

    Raises:
        ValueError: There is nothing to read, a file is damaged, or the page cannot be written.
    """
    run = read_run(path)
    starts = read_starts(run.folder)
    timeline = _timeline(run, starts, config.timeline)
    given = Path(path)
    out = Path(config.out or (given if given.is_dir() else given.parent) / "report.html")
    write_run_page(
        out,
        title=config.title or path,
        lead=lead(run, starts),
        parts=sections(run, starts, timeline),
    )
    sys.stdout.write(f"wrote {out}\n")
    return 0


def write_run_page(
    path: Path, *, title: str, lead: str, parts: Iterable[Section], style: str = ""
) -> None:
    """Write a page that may have charts.

    Args:
        path: Path to the HTML file; missing folders are created.
        title: Heading of the page.
        lead: Sentence below the heading.
        parts: Heading and HTML of each section.
        style: Additional CSS.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(
            path,
            title=title,
            lead=lead,
            sections=parts,
            style=charts.STYLE + summary.STYLE + style,
            head=charts.head(),
            width=_WIDTH,
        )
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror or error}; name another file with --out"
        ) from error


def run_sections(folder: Path) -> Sequence[Section]:
    """All sections on the run that has written to a folder."""
    run = read_run(str(folder))
    starts = read_starts(run.folder)
    return list(sections(run, starts, _timeline(run, starts, None)))


def lead(run: RunCurves, starts: Sequence[StartRecord]) -> str:
    """Sentence on the subject of a page."""
    if not starts:
        return f"Read from {run.source}."
    last = starts[-1]
    flags = last.flags
    ranks = f"{last.world_size} rank{'s' if last.world_size > 1 else ''}"
    return (
        f"{flags.get('model-provider')} on {ranks} ({last.machine.get('device')}), first started "
        f"{starts[0].time}. Read from {run.source}."
    )


def _timeline(run: RunCurves, starts: Sequence[StartRecord], folder: str | None) -> Timeline | None:
    """Timeline from the folder that was named, else from the one of the run's last start."""
    if folder is not None:
        found = read_timeline(Path(folder))
        if found is None:
            raise ValueError(
                f"--timeline {folder} has no timeline: expected what --timeline-profile writes, "
                f"timeline.json or timeline-rank-00000.json"
            )
        return found
    named = starts[-1].flags.get("timeline-dir") if starts else None
    for place in (*([Path(str(named))] if named else []), run.folder / "timeline"):
        found = read_timeline(place)
        if found is not None:
            return found
    return None
