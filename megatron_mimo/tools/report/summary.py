"""The first section of a report: what to conclude, then the numbers of the run."""

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from megatron_mimo.tools.curves import RunCurves
from megatron_mimo.tools.report.conclusions import Conclusion, conclude, nothing_found
from megatron_mimo.tools.report.measured import measured, typical
from megatron_mimo.tools.report.rules import RULES
from megatron_mimo.tools.report.timeline import WAITS, Timeline
from megatron_mimo.watch.start_record import StartRecord

STYLE = """
  .conclusions { list-style: none; margin: 0 0 1.2rem; padding: 0; max-width: 60rem; }
  .conclusions li { margin: 0 0 .6rem; padding: .6rem .9rem; background: #fff;
                    border: 1px solid #e0e3e6; border-left: .3rem solid #d9822b;
                    border-radius: .3rem; }
  .conclusions li.none { border-left-color: #2a7d4f; }
  .conclusions code { font: .9em ui-monospace, monospace; background: #f1f3f5;
                      padding: .1rem .3rem; border-radius: .2rem; white-space: nowrap; }
  .conclusions .small { display: block; }
  .tiles { display: grid; gap: .6rem; margin: 0;
           grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
  .tiles div { padding: .5rem .8rem; background: #fff; border: 1px solid #e0e3e6;
               border-radius: .3rem; display: flex; flex-direction: column;
               justify-content: space-between; }
  .tiles dt { font-size: .8rem; color: #5a6168; }
  .tiles dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums;
              overflow-wrap: anywhere; }
"""


def summary(run: RunCurves, starts: Sequence[StartRecord], timeline: Timeline | None) -> str:
    """HTML of the conclusions and of the numbers.

    Args:
        run: Curves of the run.
        starts: Starts of the run, in order; empty where the run recorded none.
        timeline: Timeline of traced iterations; None where there is none.
    """
    return _conclusions(run, starts, timeline) + _tiles(_numbers(run, starts, timeline))


def device_word(starts: Sequence[StartRecord]) -> str:
    """Word for what a rank computes on: "GPU", or "rank" in a run without any."""
    return "rank" if starts and starts[-1].machine.get("device", "").startswith("host") else "GPU"


def _conclusions(run: RunCurves, starts: Sequence[StartRecord], timeline: Timeline | None) -> str:
    found = measured(run, starts, timeline)
    items = [_item(conclusion) for _, conclusion in conclude(found, RULES)]
    if not items:
        items = [f'<li class="none">{escape(nothing_found(found))}</li>']
    return f'<ul class="conclusions">{"".join(items)}</ul>'


def _item(conclusion: Conclusion) -> str:
    said = f"{conclusion.found[0].upper()}{conclusion.found[1:]}."
    advice = _marked(conclusion.advice)
    tried = f"try <code>{escape(conclusion.tokens)}</code>" if conclusion.flags else ""
    todo = "; ".join(part for part in (advice, tried) if part)
    small = f'<span class="small">{todo[0].upper()}{todo[1:]}.</span>' if todo else ""
    return f"<li>{escape(said)}{small}</li>"


def _marked(text: str) -> str:
    """Plain text as HTML, with what stands in backquotes as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _tiles(rows: Iterable[tuple[str, str]]) -> str:
    tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _numbers(
    run: RunCurves, starts: Sequence[StartRecord], timeline: Timeline | None
) -> Iterator[tuple[str, str]]:
    device = device_word(starts)
    yield from _progress(run, starts)
    for label, tag, form in (
        ("time of an iteration", "iteration-time-ms", "{:,.1f} ms"),
        ("tokens/s", "speed/tokens per s", "{:,.0f}"),
        (f"tokens/s per {device}", "speed/tokens per s per GPU", "{:,.0f}"),
        (f"TFLOP/s per {device}", "speed/model TFLOP per s per GPU", "{:,.4g}"),
        ("MFU", "speed/model MFU", "{:.1%}"),
        *_imbalances(run.curves),
        ("packing fill", "packing fill", "{:.1%}"),
    ):
        value = typical(run.curves.get(tag, {}))
        if value is not None:
            yield f"{label}, median", form.format(value)
    samples = run.curves.get("data/skipped samples")
    if samples:
        yield "skipped samples", f"{samples[max(samples)]:,.0f}"
    if timeline is not None:
        yield "waiting for other ranks, of the traced time", f"{_waiting(timeline):.1%}"


def _imbalances(tags: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Label, tag and form of the imbalance of each source's rows, and of its operations."""
    for tag in tags:
        found = re.fullmatch(r"balance/(.+) rows max over mean", tag)
        if found is not None:
            yield f"{found[1]} imbalance, rows", tag, "{:.2f}"
        found = re.fullmatch(r"dispatch/(.+) (by lane|as run) max over mean", tag)
        if found is not None:
            yield f"{found[1]} imbalance, operations {found[2]}", tag, "{:.2f}"


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
        after = ", ".join(f"{start.iteration:,}" for start in starts[1:])
        yield "starts", f"{len(starts)}; again after iteration {after}"


def _waiting(timeline: Timeline) -> float:
    total = sum(bar.duration for bar in timeline.bars)
    return sum(bar.duration for bar in timeline.bars if bar.part in WAITS) / total if total else 0.0
