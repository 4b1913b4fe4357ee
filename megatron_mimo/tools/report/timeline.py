"""Work of traced ranks in some iterations: read from their traces, summed up, and drawn."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_mimo.schedule.actions import Kind
from megatron_mimo.tools import page
from megatron_mimo.tools.plan.draw import compute_colors
from megatron_mimo.tools.report import charts
from megatron_mimo.watch.rank_report import Part
from megatron_mimo.watch.traces import timeline_files

# A browser draws so many bars without falling behind.
MOST_BARS = 6000
WAITS = (Part.BRIDGE, Part.PIPELINE, Part.DATA, Part.AGREEMENT)
"""Parts in which a rank waits for others."""
# Waits are pale, work is strong; each differs from its neighbours in a step.
PART_COLORS = {
    Part.COMPUTE: charts.ORANGE,
    Part.BRIDGE: "#a9b4bf",
    Part.PIPELINE: "#e3cf8f",
    Part.DATA: "#c28bdb",
    Part.AGREEMENT: "#e6e9ec",
    Part.GRADIENTS: "#54b8a3",
    Part.OPTIMIZER: charts.GREEN,
    Part.OTHER: "#5f6b77",
}
_ROW = 26
_ROOM = 120
# Of a window; what is shorter cannot be seen.
_SHORTEST = 1 / 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One lap of a rank.

    Attributes:
        rank: Global rank.
        iteration: Number of the iteration.
        name: Name of the action in the schedule.
        part: Part of the step that its time is added to.
        compute: Name of the module and whether it is a backward; None for other laps than forward
            and backward.
        start: Start in milliseconds from the first bar of all.
        duration: Duration in milliseconds.
    """

    rank: int
    iteration: int
    name: str
    part: Part
    compute: tuple[str, bool] | None
    start: float
    duration: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Laps of traced iterations.

    Attributes:
        source: Description of the files that were read.
        roles: Description of each rank, such as "rank 0: encoder dp 0", ranks ascending.
        bars: Bars by rank, in order for each rank.
    """

    source: str
    roles: dict[int, str]
    bars: tuple[Bar, ...]

    @property
    def iterations(self) -> tuple[int, ...]:
        """Iterations that were traced."""
        return tuple(sorted({bar.iteration for bar in self.bars}))

    def seconds_of(self, rank: int) -> dict[Part, float]:
        """Seconds that a rank spent in each part of a step."""
        spent = dict.fromkeys(Part, 0.0)
        for bar in self.bars:
            if bar.rank == rank:
                spent[bar.part] += bar.duration / 1000
        return spent


def read_timeline(folder: Path) -> Timeline | None:
    """Read the files of `--timeline-profile` in a folder; None where there are none.

    Raises:
        ValueError: A file is damaged.
    """
    files = timeline_files(folder)
    if not files:
        return None
    roles: dict[int, str] = {}
    found: list[Bar] = []
    for path in files:
        try:
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
            roles |= {
                event["pid"]: event["args"]["name"]
                for event in events
                if event["name"] == "process_name"
            }
            found += [_bar(event) for event in events if event["ph"] == "X" and "args" in event]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a timeline as --timeline-profile writes it: {error!r}"
            ) from error
    origin = min((bar.start for bar in found), default=0.0)
    bars = [replace(bar, start=bar.start - origin) for bar in found]
    return Timeline(
        source=f"{folder} ({len(roles)} rank{'s' if len(roles) > 1 else ''})",
        roles=dict(sorted(roles.items())),
        bars=tuple(sorted(bars, key=lambda bar: (bar.rank, bar.start))),
    )


def section(timeline: Timeline) -> str:
    """HTML of the timeline, and of the time of each rank by part."""
    shown, left_out = _that_fit(timeline)
    first, last = timeline.iterations[0], timeline.iterations[-1]
    which = f"iteration {first}" if first == last else f"iterations {first} to {last}"
    remarks = (
        f"Traced: {which}. Grey, sand and lilac are waits: the bubbles. Drag to zoom, "
        f"double-click to zoom out. {timeline.source} holds all of it, for Perfetto."
    )
    return (
        page.note(remarks + left_out)
        + _draw(shown, timeline.roles)
        + "<h3>Where the traced time went</h3>"
        + _shares(timeline)
    )


def _that_fit(timeline: Timeline) -> tuple[list[Bar], str]:
    """Bars that are visible and not too many to draw, and a remark on those left out."""
    ends = [bar.start + bar.duration for bar in timeline.bars]
    shortest = max(ends) * _SHORTEST / len(timeline.iterations)
    bars = [bar for bar in timeline.bars if bar.duration >= shortest]
    kept = bars
    remark = ""
    if len(kept) > MOST_BARS:
        last = timeline.iterations[-1]
        kept = [bar for bar in kept if bar.iteration == last]
        remark = f" Drawn: iteration {last}."
    if len(kept) > MOST_BARS:
        ranks = sorted({bar.rank for bar in kept})
        # Evenly over all grids, rather than the first ranks of one.
        step = -(-len(kept) // MOST_BARS)
        chosen = set(ranks[::step])
        kept = [bar for bar in kept if bar.rank in chosen]
        remark = f"{remark[:-1]}, of every {step}th rank."
    return kept, remark


def _draw(bars: Sequence[Bar], roles: dict[int, str]) -> str:
    figure = go.Figure()
    ranks = sorted({bar.rank for bar in bars})
    for label, color, mine in _groups(bars):
        figure.add_bar(
            orientation="h",
            name=label,
            base=np.array([bar.start for bar in mine], dtype=np.float64),
            x=np.array([bar.duration for bar in mine], dtype=np.float64),
            y=[roles[bar.rank] for bar in mine],
            customdata=[f"{bar.name}, iteration {bar.iteration}" for bar in mine],
            hovertemplate="%{customdata}<br>%{x:.3f} ms from %{base:.3f}<extra>%{y}</extra>",
            marker={"color": color, "line": {"width": 0}},
        )
    figure.update_layout(barmode="overlay", bargap=0.12, hovermode="closest", dragmode="zoom")
    figure.update_xaxes(title="ms", title_standoff=5)
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[roles[rank] for rank in reversed(ranks)],
        fixedrange=True,
        automargin=True,
    )
    return charts.show(
        figure, "What each rank did when", kind="timeline", height=_ROOM + _ROW * len(ranks)
    )


def _groups(bars: Iterable[Bar]) -> list[tuple[str, str, list[Bar]]]:
    """Legend entry, colour and bars: first compute, then the rest; empty groups are left out."""
    kinds: list[tuple[str, str, list[Bar]]] = []
    listed = list(bars)
    # In the order of their first ranks, in which those of the target come last.
    modules = list(dict.fromkeys(bar.compute[0] for bar in listed if bar.compute is not None))
    for (module, backward), color in compute_colors(modules).items() if modules else ():
        mine = [bar for bar in listed if bar.compute == (module, backward)]
        kinds.append((f"{module} {'backward' if backward else 'forward'}", color, mine))
    for part in Part:
        if part is not Part.COMPUTE:
            waits = "waiting: " if part in WAITS else ""
            mine = [bar for bar in listed if bar.part is part]
            kinds.append((f"{waits}{part}", PART_COLORS[part], mine))
    return [kind for kind in kinds if kind[2]]


def _shares(timeline: Timeline) -> str:
    parts = [part for part in Part if any(bar.part is part for bar in timeline.bars)]
    head = ("rank", *(str(part) for part in parts), "waiting in all")
    rows = []
    for rank, role in timeline.roles.items():
        spent = timeline.seconds_of(rank)
        total = sum(spent.values()) or 1.0
        waiting = sum(spent[part] for part in WAITS)
        rows.append(
            (role, *(f"{spent[part] / total:.1%}" for part in parts), f"{waiting / total:.1%}")
        )
    return page.table(head, rows)


def _bar(span: dict[str, Any]) -> Bar:
    details = span["args"]
    computes = span["cat"] in (Kind.FORWARD, Kind.BACKWARD)
    return Bar(
        rank=span["pid"],
        iteration=details["iteration"],
        name=span["name"],
        part=Part(details["part"]),
        compute=(details["module"], span["cat"] == Kind.BACKWARD) if computes else None,
        start=span["ts"] / 1000,
        duration=span["dur"] / 1000,
    )
