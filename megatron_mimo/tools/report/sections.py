"""What a report shows of a run, section by section."""

import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from megatron_mimo.schedule.actions import Module
from megatron_mimo.tools import page
from megatron_mimo.tools.curves import Curve, RunCurves
from megatron_mimo.tools.report.charts import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Line,
    lines_chart,
    stack_chart,
)
from megatron_mimo.tools.report.timeline import PART_COLORS, WAITS, Timeline
from megatron_mimo.tools.report.timeline import section as timeline_section
from megatron_mimo.training.config import TrainConfig
from megatron_mimo.training.flags import flat
from megatron_mimo.training.rank_report import Part
from megatron_mimo.training.start_record import StartRecord

Section = tuple[str, str]
_SKIPPED = "Skipped samples so far"
_COLORS = {"encoder": BLUE, "llm": ORANGE, "model": GREEN}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Curves that are drawn together.

    Attributes:
        title: Above it.
        unit: Of its values; empty for a ratio or a count.
        lines: TensorBoard tag, label and colour of each; those that the run has not are left out.
        log: Drawn on a logarithmic axis.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    log: bool = False


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
_SPEED = (
    Chart(
        title="Time of an iteration",
        unit="ms",
        lines=(("iteration-time-ms", "", BLUE),),
    ),
    Chart(
        title="Tokens",
        unit="tokens/s per GPU",
        lines=(("speed/tokens per s per GPU", "", BLUE),),
    ),
    Chart(
        title="FLOPs of the model",
        unit="TFLOP/s per GPU",
        lines=tuple(
            (f"speed/{name} TFLOP per s per GPU", name, color) for name, color in _COLORS.items()
        ),
    ),
    Chart(
        title="Utilisation (MFU)",
        unit="",
        lines=tuple((f"speed/{name} MFU", name, color) for name, color in _COLORS.items()),
    ),
)
_BALANCE = (
    Chart(
        title="Imbalance of the encoder, fullest rank by mean",
        unit="1 is even",
        lines=(
            ("balance/encoder rows max over mean", "rows", BLUE),
            ("balance/encoder patches max over mean", "patches", ORANGE),
        ),
    ),
    Chart(
        title="Imbalance of the experts, fullest by mean",
        unit="1 is even",
        lines=(("experts/max over mean load", "mean of the layers", BLUE),),
    ),
    Chart(title="Rows of an iteration", unit="rows", lines=(("bridge/rows", "", BLUE),)),
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
        lines=tuple(
            (f"memory/{name} peak GiB", name, color)
            for name, color in _COLORS.items()
            if name != "model"
        ),
    ),
)
# Drawn as stacks, or shown as text, or of no interest as a curve.
_NOT_CHARTS = ("time/", "consumed_samples", "skipped_iterations", "nan_iterations")


def sections(
    run: RunCurves, starts: Sequence[StartRecord], timeline: Timeline | None
) -> Iterator[Section]:
    """Heading and HTML of each section.

    Args:
        run: Its curves.
        starts: Of the run, in order; empty where it kept none, as Megatron-LM.
        timeline: Of traced iterations; None where there is none.
    """
    resumes = [start.iteration for start in starts if start.iteration]
    yield "In short", _summary(run, starts, timeline)
    yield "Curves", _charts(run, _LOSS, resumes)
    speed = _charts(run, _SPEED, resumes)
    if speed:
        yield "Speed", speed
    where = _time(run, resumes)
    if where:
        yield "Where the time of a step goes", where
    if timeline is not None:
        yield "Timeline", timeline_section(timeline)
    else:
        yield "Timeline", page.note("None was recorded: train with --timeline-profile.")
    balance = _charts(run, _BALANCE, resumes)
    if balance:
        yield "Balance, data and memory", balance
    rest = _rest(run, resumes)
    if rest:
        yield "Everything else that was logged", rest
    if starts:
        yield "Configuration", _configuration(starts)
        yield "Environment", _environment(starts)


# -- numbers ---------------------------------------------------------------------------------------


def _summary(run: RunCurves, starts: Sequence[StartRecord], timeline: Timeline | None) -> str:
    rows = list(_progress(run, starts))
    for label, tag, form in (
        ("time of an iteration", "iteration-time-ms", "{:,.1f} ms"),
        ("tokens/s", "speed/tokens per s", "{:,.0f}"),
        ("tokens/s per GPU", "speed/tokens per s per GPU", "{:,.0f}"),
        ("TFLOP/s per GPU", "speed/model TFLOP per s per GPU", "{:,.4g}"),
        ("MFU", "speed/model MFU", "{:.1%}"),
        ("encoder imbalance, rows", "balance/encoder rows max over mean", "{:.2f}"),
        ("packing fill", "packing fill", "{:.1%}"),
    ):
        typical = _median(run.curves.get(tag, {}))
        if typical is not None:
            rows.append((f"{label}, median", form.format(typical)))
    samples = run.curves.get("data/skipped samples")
    if samples:
        rows.append(("skipped samples", f"{samples[max(samples)]:,.0f}"))
    if timeline is not None:
        waiting = _waiting(timeline)
        rows.append(("waiting for other ranks, of the traced time", f"{waiting:.1%}"))
    return page.facts(rows)


def _progress(run: RunCurves, starts: Sequence[StartRecord]) -> Iterator[tuple[str, str]]:
    last = max(run.loss)
    goal = f" of {starts[-1].train_iters:,}" if starts else ""
    yield "iterations", f"{last:,}{goal}"
    samples = run.curves.get("consumed_samples", {}).get(last)
    if samples is not None:
        yield "samples", f"{samples:,.0f}"
    yield "last lm loss", f"{run.loss[last]:.6g}"
    held_out = run.curves.get("lm loss validation")
    if held_out:
        yield "last held-out lm loss", f"{held_out[max(held_out)]:.6g}"
    skipped = sum(run.curves.get("skipped_iterations", {}).values())
    if skipped:
        yield "skipped updates", f"{skipped:,.0f}"
    if len(starts) > 1:
        behind = ", ".join(f"{start.iteration:,}" for start in starts[1:])
        yield "starts", f"{len(starts)}; again behind iteration {behind}"


def _median(curve: Curve) -> float | None:
    """Of finite values, the first left out, in which a run warms up."""
    values = [value for value in list(curve.values())[1:] or curve.values() if isfinite(value)]
    return statistics.median(values) if values else None


def _waiting(timeline: Timeline) -> float:
    total = sum(bar.duration for bar in timeline.bars)
    return sum(bar.duration for bar in timeline.bars if bar.part in WAITS) / total if total else 0.0


# -- charts ----------------------------------------------------------------------------------------


def _charts(run: RunCurves, wanted: Sequence[Chart], resumes: Sequence[int]) -> str:
    """Those for which the run has curves; empty for none."""
    drawn = []
    for chart in wanted:
        lines = [
            Line(label=label, curve=run.curves[tag], color=color, marked="validation" in tag)
            for tag, label, color in chart.lines
            if tag in run.curves
        ]
        if lines and (chart.title != _SKIPPED or any(lines[0].curve.values())):
            drawn.append(
                lines_chart(chart.title, lines, unit=chart.unit, resumes=resumes, log=chart.log)
            )
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _time(run: RunCurves, resumes: Sequence[int]) -> str:
    drawn, rows = [], []
    for module in Module:
        parts = {part: run.curves.get(f"time/{module} {part} ms") for part in Part}
        there = {part: curve for part, curve in parts.items() if curve and any(curve.values())}
        if not there:
            continue
        lines = [
            Line(label=str(part), curve=curve, color=PART_COLORS[part])
            for part, curve in there.items()
        ]
        drawn.append(stack_chart(f"A step of the {module}", lines, unit="ms", resumes=resumes))
        typical = {part: _median(curve) or 0.0 for part, curve in there.items()}
        total = sum(typical.values()) or 1.0
        rows.append(
            (
                str(module),
                *(
                    f"{typical[part]:,.1f} ms ({typical[part] / total:.0%})"
                    if part in typical
                    else ""
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
    shown = {tag for chart in (*_LOSS, *_SPEED, *_BALANCE) for tag, _, _ in chart.lines}
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
        where = f"behind iteration {after.iteration:,}, {after.time}"
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
