"""Curves as interactive charts, drawn in the browser by plotly."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from megatron_mimo.tools.curves import Curve
from megatron_mimo.tools.page import escape

BLUE, ORANGE, GREEN, RED = "#3b6fb6", "#d9822b", "#2a7d4f", "#c0392b"
_BUCKETS = 500
_HEIGHT = 300
# Below, 1e-5 reads better than 10 µ.
_SMALL = 1e-2
_FEWEST_TICKS, _MOST_TICKS = 3, 8
# Of a value, which labels of six digits still tell apart.
_SMALLEST_STEP = 1e-5
# Steps that are far longer than nearly all others would flatten these.
_CLIP_PERCENTILE, _CLIP_ROOM = 95, 1.25
_LEAST_TO_CLIP = 10
_BY_ITERATION = "by-iteration"
# Charts over iterations zoom together, and those that were folded away learn how wide they are.
_SCRIPT = """
document.addEventListener("DOMContentLoaded", () => {
  const charts = [...document.querySelectorAll(".by-iteration .plotly-graph-div")];
  let follows = false;
  charts.forEach(chart => chart.on("plotly_relayout", change => {
    if (follows) return;
    const range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    const update = change["xaxis.autorange"] ? {"xaxis.autorange": true}
      : range[0] === undefined ? null : {"xaxis.range": range};
    if (update === null) return;
    follows = true;
    Promise.all(charts.filter(other => other !== chart && other.offsetWidth)
      .map(other => Plotly.relayout(other, update))).finally(() => { follows = false; });
  }));
  document.querySelectorAll("details").forEach(folded => folded.addEventListener("toggle", () =>
    folded.querySelectorAll(".plotly-graph-div").forEach(chart => Plotly.Plots.resize(chart))));
});
"""
STYLE = """
  .charts { display: grid; gap: 1.5rem;
            grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
  .charts.wide { grid-template-columns: repeat(auto-fill, minmax(min(36rem, 100%), 1fr)); }
  .charts > figure { min-width: 0; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve of a chart.

    Attributes:
        label: Label in the legend.
        curve: Values by iteration.
        color: Colour as CSS.
        marked: Whether to draw a marker at each point, for a curve of few points.
    """

    label: str
    curve: Curve
    color: str
    marked: bool = False


def head() -> str:
    """HTML that a page with charts needs in its head."""
    return f"<script>{get_plotlyjs()}</script>\n<script>{_SCRIPT}</script>"


def lines_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    resumes: Sequence[int] = (),
    log: bool = False,
    clipped: bool = False,
) -> str:
    """Chart of curves over iterations.

    Args:
        title: Title above the chart.
        lines: Curves to draw; those with many points are thinned.
        unit: Unit of the values; empty for a ratio or a count.
        resumes: Iterations after which the run was started again.
        log: Whether values are on a logarithmic axis at first; a button switches it.
        clipped: Whether a few values far above the others are cut off at first.
    """
    figure = go.Figure()
    for line in lines:
        thinned = thin(line.curve)
        mode = "lines+markers" if line.marked or len(thinned) == 1 else "lines"
        _add(figure, line, thinned, width=1.7, mode=mode)
    if log:
        _switch_scale(figure)
    remark = _clip(figure, _values(figure)) if clipped else ""
    return _by_iteration(figure, title, unit, resumes, remark)


def stack_chart(
    title: str, parts: Sequence[Line], *, unit: str, resumes: Sequence[int] = ()
) -> str:
    """Chart of stacked curves over iterations; many points are drawn as means of buckets.

    A few points far above the others are cut off at first.
    """
    figure = go.Figure()
    heights: dict[int, float] = {}
    for part in parts:
        drawn = average(part.curve)
        for iteration, value in drawn.items():
            heights[iteration] = heights.get(iteration, 0.0) + value
        # Plotly would fill with half of the colour's strength.
        _add(figure, part, drawn, width=0, mode="lines", stackgroup="all", fillcolor=part.color)
    remark = _clip(figure, [np.array(list(heights.values()))])
    return _by_iteration(figure, title, unit, resumes, remark)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: few, round, and enough to read a value.

    Those of 1, 2 and 5 times powers of ten where these are three to eight, else the powers alone,
    thinned, or, for less than that, evenly spaced round numbers.

    Args:
        low: Smallest value, above 0.
        high: Largest value.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1,)):
        ticks = [
            step * 10.0**power
            for power in range(first, last + 1)
            for step in steps
            if low <= step * 10.0**power <= high
        ]
        if _FEWEST_TICKS <= len(ticks) <= _MOST_TICKS:
            return ticks
        if len(ticks) < _FEWEST_TICKS:
            break
    else:
        return ticks[:: -(-len(ticks) // _MOST_TICKS)]
    rough = (high - low) / 5
    if rough < low * _SMALLEST_STEP:
        return [low]
    size = 10.0 ** math.floor(math.log10(rough))
    width = next(size * step for step in (1, 2, 5, 10, 20) if size * step >= rough)
    numbers = range(math.ceil(low / width), math.floor(high / width) + 1)
    return [float(f"{number * width:.12g}") for number in numbers]


def _clip(figure: go.Figure, heights: Sequence[Any]) -> str:
    """Limit the axis of values to most of the points, and a remark if that cuts any off."""
    values = np.concatenate([each[np.isfinite(each)] for each in heights])
    if len(values) < _LEAST_TO_CLIP:
        return ""
    top = float(np.percentile(values, _CLIP_PERCENTILE)) * _CLIP_ROOM
    above = int((values > top).sum())
    if not above or top <= 0:
        return ""
    figure.update_yaxes(range=[0, top])
    return f"{above} of {len(values)} values are above the edge; a double click shows all."


def thin(curve: Curve, buckets: int = _BUCKETS) -> Curve:
    """Points that draw the same picture: first, last, smallest and largest of each bucket.

    This is M4 (Jugel et al., "M4: A Visualization-Oriented Time Series Data Aggregation", 2014); no
    spike is lost. Curves with few points are returned unchanged.

    Args:
        curve: Values by iteration, ascending.
        buckets: Number of buckets, each with the same number of neighbouring points.
    """
    if len(curve) <= 4 * buckets:
        return curve
    kept: dict[int, float] = {}
    for bucket in _buckets(curve, buckets):
        low = min(bucket, key=lambda point: point[1])
        high = max(bucket, key=lambda point: point[1])
        kept |= dict(sorted({bucket[0], low, high, bucket[-1]}))
    return kept


def average(curve: Curve, buckets: int = _BUCKETS) -> Curve:
    """Means of buckets, each at its last iteration; curves with few points are unchanged."""
    if len(curve) <= buckets:
        return curve
    return {
        bucket[-1][0]: float(np.mean([value for _, value in bucket]))
        for bucket in _buckets(curve, buckets)
    }


def show(
    figure: go.Figure, title: str, *, kind: str = "", height: int = _HEIGHT, remark: str = ""
) -> str:
    """A figure as HTML, below its title.

    Args:
        figure: Figure to draw.
        title: Title as plain text; also the accessible name of the figure.
        kind: CSS class of the element.
        height: Height in pixels.
        remark: Remark below the figure as plain text; empty for none.
    """
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 10, "t": 10, "b": 40},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        font={"family": "system-ui, sans-serif", "size": 12},
        hoverlabel={"namelength": -1},
    )
    drawn: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
    name = escape(title)
    below = f"<figcaption>{escape(remark)}</figcaption>" if remark else ""
    return f'<figure class="{kind}" aria-label="{name}"><h3>{name}</h3>{drawn}{below}</figure>'


def _add(figure: go.Figure, line: Line, curve: Curve, *, width: float, **how: str) -> None:
    figure.add_scatter(
        x=np.array(list(curve), dtype=np.int32),
        y=np.array(list(curve.values()), dtype=np.float32),
        name=line.label,
        line={"color": line.color, "width": width},
        **how,
    )


def _by_iteration(
    figure: go.Figure, title: str, unit: str, resumes: Sequence[int], remark: str = ""
) -> str:
    for iteration in resumes:
        figure.add_vline(x=iteration + 0.5, line={"color": "#9aa1a8", "dash": "dot", "width": 1})
    figure.update_layout(hovermode="x unified", showlegend=len(figure.data) > 1)
    figure.update_xaxes(title="iteration", title_standoff=5)
    most = max(np.max(np.abs(y), where=np.isfinite(y), initial=0) for y in _values(figure))
    figure.update_yaxes(title=unit or None, exponentformat="e" if most < _SMALL else "SI")
    return show(figure, title, kind=_BY_ITERATION, remark=remark)


def _switch_scale(figure: go.Figure) -> None:
    values = np.concatenate([np.asarray(y, dtype=np.float64) for y in _values(figure)])
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0:
        return
    ticks = log_ticks(float(values.min()), float(values.max()))
    figure.update_yaxes(
        type="log", tickmode="array", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks]
    )
    buttons = [
        {"label": kind, "method": "relayout", "args": [{"yaxis.type": kind, "yaxis.tickmode": how}]}
        for kind, how in (("log", "array"), ("linear", "auto"))
    ]
    figure.update_layout(
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "buttons": buttons,
                **{"x": 1, "xanchor": "right", "y": 1, "yanchor": "top"},
                "pad": {"t": 4, "r": 4},
                "font": {"size": 10},
            }
        ]
    )


def _values(figure: go.Figure) -> list[Any]:
    return [np.asarray(trace.y) for trace in figure.data]


def _buckets(curve: Mapping[int, Any], number: int) -> list[list[tuple[int, float]]]:
    """Neighbouring points, as many in each bucket."""
    size = -(-len(curve) // number)
    return [list(bucket) for bucket in itertools.batched(curve.items(), size)]
