"""Sections of a report on a run."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from math import isfinite

from megatron_mimo.config.flags import flat
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.tools import page
from megatron_mimo.tools.curves import RunCurves
from megatron_mimo.tools.report.charts import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Line,
    lines_chart,
    stack_chart,
)
from megatron_mimo.tools.report.measured import timed_modules, typical
from megatron_mimo.tools.report.summary import device_word, summary
from megatron_mimo.tools.report.timeline import PART_COLORS, Timeline
from megatron_mimo.tools.report.timeline import section as timeline_section
from megatron_mimo.tools.words import in_words
from megatron_mimo.watch.rank_report import Part
from megatron_mimo.watch.start_record import StartRecord

Section = tuple[str, str]
_SKIPPED = "Skipped samples so far"
_COLORS = {"encoder": BLUE, "llm": ORANGE, "model": GREEN}
# Colours of further modules, in their order; they repeat.
_MORE_COLORS = ("#9467bd", "#8c564b", "#17becf", "#e377c2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Curves that are drawn in one chart.

    Attributes:
        title: Title above the chart.
        unit: Unit of the values; empty for a ratio or a count.
        lines: TensorBoard tag, label and colour of each curve; curves that the run does not have
            are left out.
        log: Whether values are drawn on a logarithmic axis.
        clipped: Whether a few values far above the others are cut off at first.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    log: bool = False
    clipped: bool = False


_LOSS = (
    Chart(
        title="Loss",
        unit="lm loss",
        lines=(("lm loss", "training", BLUE), ("lm loss validation", "held out", ORANGE)),
        log=True,
    ),
    Chart(
        title="Gradient norm, before clipping",
        unit="",
        lines=(("grad-norm", "", BLUE),),
        log=True,
    ),
    Chart(title="Learning rate", unit="", lines=(("learning-rate", "", BLUE),)),
)


def _speed_charts(tags: Sequence[str], device: str) -> tuple[Chart, ...]:
    return (
        Chart(
            title="Time of an iteration",
            unit="ms",
            lines=(("iteration-time-ms", "", BLUE),),
            clipped=True,
        ),
        Chart(
            title="Tokens",
            unit=f"tokens/s per {device}",
            lines=(("speed/tokens per s per GPU", "", BLUE),),
        ),
        Chart(
            title="FLOPs of the model",
            unit=f"TFLOP/s per {device}",
            lines=_by_module(tags, r"speed/(.+) TFLOP per s per GPU"),
        ),
        Chart(title="Utilisation (MFU)", unit="", lines=_by_module(tags, r"speed/(.+) MFU")),
    )


def _balance_charts(tags: Sequence[str]) -> tuple[Chart, ...]:
    return (
        *_imbalance_charts(tags),
        *_dispatch_charts(tags),
        Chart(
            title="Imbalance of the experts, fullest by mean",
            unit="1 is even",
            lines=(("experts/max over mean load", "mean of the layers", BLUE),),
        ),
        Chart(
            title="Rows of an iteration",
            unit="rows",
            lines=_by_module(tags, r"bridge/(.+) rows") or (("bridge/rows", "", BLUE),),
        ),
        Chart(
            title="Sent over the bridge in an iteration",
            unit="bytes",
            lines=(("bridge/bytes", "", BLUE),),
        ),
        Chart(title="Packing", unit="share of positions", lines=(("packing fill", "", BLUE),)),
        Chart(title=_SKIPPED, unit="samples", lines=(("data/skipped samples", "", RED),)),
        Chart(
            title="Peak memory of the fullest rank",
            unit="GiB",
            lines=_by_module(tags, r"memory/(.+) peak GiB"),
        ),
    )


def _imbalance_charts(tags: Sequence[str]) -> Iterator[Chart]:
    """A chart for each source: how far its fullest replica is above the mean."""
    counts: dict[str, list[str]] = {}
    for tag in tags:
        found = re.fullmatch(r"balance/(.+) (\S+) max over mean", tag)
        if found is not None:
            counts.setdefault(found[1], []).append(found[2])
    for name, of_source in counts.items():
        # Rows first, whatever the order of the tags.
        ordered = sorted(of_source, key=lambda count: (count != "rows", count))
        yield Chart(
            title=f"Imbalance of the {name}, fullest rank by mean",
            unit="1 is even",
            lines=tuple(
                (f"balance/{name} {count} max over mean", count, color)
                for count, color in zip(ordered, cycle((BLUE, ORANGE)), strict=False)
            ),
        )


def _dispatch_charts(tags: Sequence[str]) -> Iterator[Chart]:
    """How items are shared out over the replicas of each source, and what that takes."""
    pattern = r"dispatch/(.+) as run max over mean"
    names = [found[1] for tag in tags if (found := re.fullmatch(pattern, tag)) is not None]
    for name in names:
        yield Chart(
            title=f"Operations of the {name}, busiest rank by mean",
            unit="1 is even",
            lines=(
                (f"dispatch/{name} by lane max over mean", "by lane", ORANGE),
                (f"dispatch/{name} as run max over mean", "as run", BLUE),
                (f"dispatch/{name} least max over mean", "least possible", GREEN),
            ),
        )
    yield Chart(
        title="Items sent to other ranks in an iteration",
        unit="bytes",
        lines=_by_module(tags, r"dispatch/(.+) bytes"),
    )
    yield Chart(
        title="Exchange of items, ahead of an iteration",
        unit="ms",
        lines=(
            ("dispatch/exchange ms", "in all", BLUE),
            ("dispatch/exchange exposed ms", "waited for", RED),
        ),
    )


def _by_module(tags: Sequence[str], pattern: str) -> tuple[tuple[str, str, str], ...]:
    """A line for each tag of a pattern, whose group is the module's name."""
    found = {match[1]: tag for tag in tags if (match := re.fullmatch(pattern, tag)) is not None}
    ordered = [name for name in _COLORS if name in found]
    others = [name for name in found if name not in _COLORS]
    colors = module_colors(list(found))
    return tuple((found[name], name, colors[name]) for name in (*ordered, *others))


def module_colors(modules: Sequence[str]) -> dict[str, str]:
    """Colour of each module in all charts over iterations."""
    others = [name for name in modules if name not in _COLORS]
    return _COLORS | dict(zip(others, cycle(_MORE_COLORS), strict=False))


# Drawn as stacks, or shown as text, or of no interest as a curve.
_NOT_CHARTS = ("time/", "consumed_samples", "skipped_iterations", "nan_iterations")


def sections(
    run: RunCurves, starts: Sequence[StartRecord], timeline: Timeline | None
) -> Iterator[Section]:
    """Heading and HTML of each section.

    Args:
        run: Curves of the run.
        starts: Starts of the run, in order; empty where the run recorded none, as Megatron-LM.
        timeline: Timeline of traced iterations; None where there is none.
    """
    resumes = [start.iteration for start in starts if start.iteration]
    yield "In short", summary(run, starts, timeline)
    yield "Curves", _charts(run, _LOSS, resumes)
    tags = list(run.curves)
    speed = _charts(run, _speed_charts(tags, device_word(starts)), resumes)
    if speed:
        yield "Speed", speed
    where = _time(run, resumes)
    if where:
        yield "Where the time of a step goes", where
    if timeline is not None:
        yield "Timeline", timeline_section(timeline)
    else:
        yield "Timeline", page.note("None was recorded: train with --timeline-profile.")
    balance = _charts(run, _balance_charts(tags), resumes)
    if balance:
        yield "Balance, data and memory", balance
    rest = _rest(run, resumes)
    if rest:
        yield "Everything else that was logged", rest
    if starts:
        yield "Configuration", _configuration(starts)
        yield "Environment", _environment(starts)


# -- charts ----------------------------------------------------------------------------------------


def _charts(run: RunCurves, wanted: Sequence[Chart], resumes: Sequence[int]) -> str:
    """Charts for which the run has curves; empty for none."""
    drawn = []
    for chart in wanted:
        lines = [
            Line(label=label, curve=run.curves[tag], color=color, marked="validation" in tag)
            for tag, label, color in chart.lines
            if tag in run.curves
        ]
        if lines and (chart.title != _SKIPPED or any(lines[0].curve.values())):
            drawn.append(
                lines_chart(
                    chart.title,
                    lines,
                    unit=chart.unit,
                    resumes=resumes,
                    log=chart.log,
                    clipped=chart.clipped,
                )
            )
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _time(run: RunCurves, resumes: Sequence[int]) -> str:
    drawn, rows = [], []
    modules = timed_modules(run.curves)
    for module in modules:
        parts = {part: run.curves.get(f"time/{module} {part} ms") for part in Part}
        there = {part: curve for part, curve in parts.items() if curve and any(curve.values())}
        if not there:
            continue
        # Computing has the colour that the module has in other charts.
        colors = PART_COLORS | {Part.COMPUTE: module_colors(modules)[module]}
        lines = [
            Line(label=str(part), curve=curve, color=colors[part]) for part, curve in there.items()
        ]
        title = f"A step of the {in_words(module)}"
        drawn.append(stack_chart(title, lines, unit="ms", resumes=resumes))
        usual = {part: typical(curve) or 0.0 for part, curve in there.items()}
        total = sum(usual.values()) or 1.0
        rows.append(
            (
                module,
                *(
                    f"{usual[part]:,.1f} ms ({usual[part] / total:.0%})" if part in usual else ""
                    for part in Part
                ),
            )
        )
    if not drawn:
        return ""
    remark = page.note("Mean over the ranks of each module; below, medians over the run.")
    table = page.table(("", *map(str, Part)), rows)
    return f'{remark}<div class="charts wide">{"".join(drawn)}</div>{table}'


def _rest(run: RunCurves, resumes: Sequence[int]) -> str:
    tags = list(run.curves)
    charts_above = (*_LOSS, *_speed_charts(tags, ""), *_balance_charts(tags))
    # Where rows have a line for each bridge, their sum is not drawn again.
    shown = {tag for chart in charts_above for tag, _, _ in chart.lines} | {"bridge/rows"}
    rest = [
        Chart(title=tag, unit="", lines=((tag, "", BLUE),))
        for tag, curve in sorted(run.curves.items())
        if tag not in shown
        and not tag.startswith(_NOT_CHARTS)
        and any(map(isfinite, curve.values()))
    ]
    charts = _charts(run, rest, resumes)
    return page.folded(f"{len(rest)} curves", charts) if charts else ""


# -- what it ran with ------------------------------------------------------------------------------


def _configuration(starts: Sequence[StartRecord]) -> str:
    last = starts[-1]
    defaults = flat(TrainConfig())
    changed = {name: value for name, value in last.flags.items() if value != defaults.get(name)}
    parts = [f"<pre>{page.escape(last.layout)}</pre>", _flags(changed)]
    if len(starts) > 1:
        parts.append("<h3>What changed between starts</h3>")
        parts.append(_changes(starts))
    parts.append(page.folded(f"all {len(last.flags)} flags", _flags(last.flags)))
    parts.append(
        page.folded(
            "command line", f"<pre>{page.escape(shlex.join(last.command) or 'no flags')}</pre>"
        )
    )
    return "".join(parts)


def _flags(flags: Mapping[str, object]) -> str:
    return page.facts((f"--{name}", _value(value)) for name, value in flags.items())


def _changes(starts: Sequence[StartRecord]) -> str:
    rows = []
    for before, after in pairwise(starts):
        where = f"after iteration {after.iteration:,}, {after.time}"
        differing = [
            (f"--{name}", _value(before.flags.get(name)), _value(value))
            for name, value in after.flags.items()
            if before.flags.get(name) != value
        ]
        rows += [(where, *change) for change in differing or [("nothing", "", "")]]
    return page.table(("start", "flag", "before", "now"), rows)


def _value(value: object) -> str:
    if value is None:
        return "left out"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _environment(starts: Sequence[StartRecord]) -> str:
    last = starts[-1]
    rows = [
        ("started", last.time),
        ("ranks", str(last.world_size)),
        *last.machine.items(),
        *(("computes with", line) for line in last.kernels),
        *last.software.items(),
    ]
    return page.facts(rows) + page.folded(
        f"{len(last.variables)} environment variables", page.facts(last.variables.items())
    )
