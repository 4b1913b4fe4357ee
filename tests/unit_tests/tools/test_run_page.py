"""`megatron-mimo report`: what goes into the page, and what is refused."""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_mimo.cli import main
from megatron_mimo.config.flags import flat
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.tools import page
from megatron_mimo.tools.curves import read_run
from megatron_mimo.tools.report import timeline as timelines
from megatron_mimo.tools.report.charts import average, log_ticks, thin
from megatron_mimo.tools.report.sections import sections
from megatron_mimo.tools.report.timeline import PART_COLORS as COLORS
from megatron_mimo.tools.report.timeline import Bar, Timeline, read_timeline
from megatron_mimo.watch.event_file import EventFile
from megatron_mimo.watch.rank_report import Part
from megatron_mimo.watch.start_record import STARTS_FILE, StartRecord, read_starts

START = StartRecord(
    time="2026-01-02T03:04:05+00:00",
    iteration=0,
    consumed_samples=0,
    train_iters=30,
    world_size=3,
    layout="layout: 3 ranks",
    flags=flat(TrainConfig()),
    command=["--llm-dp", "2"],
    software={"torch": "2"},
    machine={"device": "host, 2 cores"},
    kernels=["device host"],
    variables={"OMP_NUM_THREADS": "1"},
)


GPU_START = replace(START, machine={"device": "NVIDIA H100 80GB HBM3, 8 visible"})


def text(body: str) -> str:
    """What a reader sees of HTML, scripts left out."""
    return re.sub(r"<script.*?</script>|<[^>]*>", " ", body, flags=re.DOTALL)


def write_run(folder: Path, iterations: int = 30, **values: float | None) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"iteration": i, "consumed_samples": 8 * i, "lm_loss": 4 - 0.1 * i} | values)
        for i in range(1, iterations + 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def by_name(run: Path, starts: list[StartRecord], timeline: Timeline | None = None) -> dict:
    return dict(sections(read_run(str(run)), starts, timeline))


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    st.integers(1, 20),
)
@example([0.0, 1.0, 9.0, 1.0, -9.0, 0.0, 0.0], 1)
def test_thinning_loses_neither_ends_nor_spikes(values: list[float], buckets: int) -> None:
    curve = dict(enumerate(values, start=5))
    thinned = thin(curve, buckets)
    assert list(thinned) == sorted(thinned)
    assert thinned.items() <= curve.items()
    assert (min(thinned), max(thinned)) == (min(curve), max(curve))
    assert min(thinned.values()) == min(values) and max(thinned.values()) == max(values)
    assert len(thinned) <= max(4 * buckets, 4)
    if len(curve) <= 4 * buckets:
        assert thinned == curve


def test_averages_stand_at_the_end_of_what_they_are_of() -> None:
    curve = {i: float(i) for i in range(1, 11)}
    assert average(curve, 10) == curve
    assert average(curve, 5) == {2: 1.5, 4: 3.5, 6: 5.5, 8: 7.5, 10: 9.5}
    assert average(curve, 4) == {3: 2.0, 6: 5.0, 9: 8.0, 10: 10.0}


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.1, 10, [0.1, 0.2, 0.5, 1, 2, 5, 10]),
        (2.6, 6.3, [3, 4, 5, 6]),
        (2.61, 2.64, [2.61, 2.62, 2.63, 2.64]),
        (1e-12, 1e3, [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1, 100]),
        (7, 7, [7]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_few_and_round(
    low: float, high: float, ticks: list[float]
) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


@given(st.floats(1e-30, 1e30), st.floats(1, 1e40))
def test_a_logarithmic_axis_always_has_some_ticks(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert len(ticks) <= 12
    assert all(low * 0.999999 <= tick <= low * ratio * 1.000001 for tick in ticks)
    if ratio > 1.5:
        assert len(ticks) >= 2


def test_a_few_long_steps_are_cut_off(tmp_path: Path) -> None:
    """As the first one, which would flatten all others."""
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    slow = [json.dumps(json.loads(line) | {"iteration_time_ms": 100.0}) for line in lines]
    slow[0] = json.dumps(json.loads(lines[0]) | {"iteration_time_ms": 9000.0})
    (run / "metrics.jsonl").write_text("\n".join(slow) + "\n")
    speed = by_name(run, [])["Speed"]
    assert "1 of 30 values are above the edge; a double click shows all." in text(speed)
    assert '"range":[0,125.0]' in speed
    even = write_run(tmp_path / "even", iteration_time_ms=100.0)
    assert "above the edge" not in by_name(even, [])["Speed"]


def test_the_parts_of_a_step_have_colours_that_differ() -> None:
    """In one of the three channels, by a sixth of the way from black to white."""
    colors = {part: [int(c[at : at + 2], 16) for at in (1, 3, 5)] for part, c in COLORS.items()}
    for one, other in itertools.combinations(colors, 2):
        apart = max(abs(a - b) for a, b in zip(colors[one], colors[other], strict=True))
        assert apart >= 40, (one, other)


def test_ranks_without_a_gpu_are_called_ranks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **{"speed/tokens per s per GPU": 7.0})
    on_host, on_gpu = by_name(run, [START]), by_name(run, [GPU_START])
    assert "tokens/s per rank, median 7" in " ".join(text(on_host["In short"]).split())
    # As the page's JSON writes it.
    assert "tokens\\u002fs per rank" in on_host["Speed"]
    assert "GPU" not in "".join(on_host.values())
    assert "tokens/s per GPU, median 7" in " ".join(text(on_gpu["In short"]).split())
    assert "tokens\\u002fs per GPU" in on_gpu["Speed"]


def test_the_summary_is_first_and_begins_with_conclusions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **{"data/skipped samples": 90})
    found = by_name(run, [])
    assert next(iter(found)) == "In short"
    said = " ".join(text(found["In short"]).split())
    assert said.startswith("90 samples were left out, 27 % of those read. See why with")
    assert said.index("See why") < said.index("iterations 30")
    quiet = by_name(write_run(tmp_path / "quiet", iterations=8), [])["In short"]
    assert "Too short to judge where its time goes: that takes 20 iterations" in quiet


@pytest.mark.parametrize("cell", ["1", "1,234.5", "93.1%", "-2e-05", "7 ms", "1.5 GiB"])
def test_numbers_stand_to_the_right(cell: str) -> None:
    assert f"<td class=number>{cell}</td>" in page.table(("a",), [(cell,)])


@pytest.mark.parametrize("cell", ["", "a1", "1 sample", "<b>", "2026-01-02"])
def test_text_stands_to_the_left(cell: str) -> None:
    assert f"<td>{page.escape(cell)}</td>" in page.table(("a",), [(cell,)])


def test_a_run_without_anything_of_ours(tmp_path: Path) -> None:
    """As of Megatron-LM: curves that we do not know are shown too."""
    events = EventFile(tmp_path)
    for step in range(1, 5):
        scalars = {"lm loss": 1 / step, "lm loss vs samples": 1.0, "params-norm": 3.0, "<i>": 1.0}
        events.add_scalars(scalars, step)
    events.close()
    found = by_name(tmp_path, [])
    assert list(found) == ["In short", "Curves", "Timeline", "Everything else that was logged"]
    assert "params-norm" in found["Everything else that was logged"]
    assert "<h3>&lt;i&gt;</h3>" in found["Everything else that was logged"]
    assert "vs samples" not in "".join(found.values())
    assert "None was recorded: train with --timeline-profile" in found["Timeline"]
    assert main(["report", str(tmp_path)]) == 0
    assert "Megatron" not in (tmp_path / "report.html").read_text().split("</head>")[1]


def test_only_what_was_logged_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **{"speed/llm MFU": 0.4, "data/skipped samples": 0})
    found = by_name(run, [])
    assert "Utilisation" in found["Speed"] and "Tokens" not in found["Speed"]
    assert "Balance, data and memory" not in found
    assert "skipped samples 0" in " ".join(text(found["In short"]).split())
    assert (
        "Skipped samples so far"
        in by_name(write_run(tmp_path / "other", **{"data/skipped samples": 3}), [])[
            "Balance, data and memory"
        ]
    )


def test_values_that_are_not_finite_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", grad_norm=None, learning_rate=0.0)
    found = by_name(run, [])
    assert "Gradient norm" in found["Curves"] and "Learning rate" in found["Curves"]


def test_the_configuration_of_every_start(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    again = replace(
        START,
        time="2026-01-03T00:00:00+00:00",
        iteration=20,
        flags=dict(START.flags) | {"llm-dp": 4, "bf16": True, "override": ["a.b=<1>"]},
    )
    found = by_name(run, [START, again])
    configuration = " ".join(text(found["Configuration"]).split())
    changed, everything = configuration.split("all ")
    assert "--llm-dp 4" in changed and "--bf16 on" in changed
    assert "--override a.b=&lt;1&gt;" in changed
    assert "--seed" not in changed and "--seed 1234" in everything
    assert "after iteration 20, 2026-01-03T00:00:00+00:00 --llm-dp left out 4" in changed
    assert "2; again after iteration 20" in found["In short"]
    assert "30 of 30" in found["In short"]
    assert "OMP_NUM_THREADS" in found["Environment"]


def test_starts_read_back(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == []
    (tmp_path / STARTS_FILE).write_text(f"{START.to_json()}\n{START.to_json()}\n")
    assert read_starts(tmp_path) == [START, START]


# -- timelines -------------------------------------------------------------------------------------


def span(rank: int, start: float, length: float, **args: Any) -> dict[str, Any]:
    """Microseconds, as in the file."""
    details = {"iteration": 3, "part": "compute", "module": "llm", "microbatch": 0} | args
    kind = details.pop("kind", "forward")
    return {
        "name": f"{details['module']} {kind} 0",
        "cat": kind,
        "ph": "X",
        **{"ts": start, "dur": length, "pid": rank, "tid": 0, "args": details},
    }


def trace(*events: Mapping[str, Any], ranks: int = 2) -> str:
    names = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}: r"}}
        for rank in range(ranks)
    ]
    steps = {"name": "iteration 3", "cat": "iteration", "ph": "X", "ts": 0, "dur": 9, "pid": 0}
    return json.dumps({"traceEvents": [*names, *events, steps | {"tid": 1}]})


def test_a_timeline_is_read_in_order(tmp_path: Path) -> None:
    assert read_timeline(tmp_path) is None
    (tmp_path / "timeline.json").write_text(
        trace(
            span(1, 2000, 500, kind="backward", module="encoder"),
            span(0, 1500, 250, kind="wait input", part="bridge"),
            span(0, 1000, 500),
        )
    )
    found = read_timeline(tmp_path)
    assert found is not None
    assert found.roles == {0: "rank 0: r", 1: "rank 1: r"}
    assert [(bar.rank, bar.start, bar.duration) for bar in found.bars] == [
        (0, 0.0, 0.5),
        (0, 0.5, 0.25),
        (1, 1.0, 0.5),
    ]
    assert [bar.compute for bar in found.bars] == [
        ("llm", False),
        None,
        ("encoder", True),
    ]
    assert found.iterations == (3,)
    drawn = " ".join(text(timelines.section(found)).split())
    # Two thirds of rank 0's time was compute, a third waiting.
    assert "rank 0: r 66.7% 33.3% 33.3%" in drawn
    assert "rank 1: r 100.0% 0.0% 0.0%" in drawn


def test_the_files_of_ranks_do_where_there_is_no_merged_one(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"timeline-rank-0000{rank}.json").write_text(trace(span(rank, 5, 5)))
    found = read_timeline(tmp_path)
    assert found is not None and [bar.rank for bar in found.bars] == [0, 1]


def many(ranks: int, iterations: int, each: int) -> Timeline:
    return Timeline(
        source="somewhere",
        roles={rank: f"rank {rank}" for rank in range(ranks)},
        bars=tuple(
            Bar(
                rank=rank,
                iteration=iteration,
                name="llm forward 0",
                part=Part.COMPUTE,
                compute=("llm", False),
                start=float(iteration * each + at),
                duration=1.0,
            )
            for rank in range(ranks)
            for iteration in range(iterations)
            for at in range(each)
        ),
    )


@pytest.mark.parametrize(
    ("ranks", "iterations", "remark", "bars"),
    [
        (2, 2, None, 400),
        (50, 2, "Drawn: iteration 1.", 5000),
        (800, 3, "Drawn: iteration 2, of every 14th rank.", 58 * 100),
    ],
)
def test_a_browser_gets_no_more_than_it_can_draw(
    ranks: int, iterations: int, remark: str | None, bars: int
) -> None:
    timeline = many(ranks, iterations, 100)
    kept, said = timelines._that_fit(timeline)
    assert len(kept) == bars <= timelines.MOST_BARS
    assert said.strip() == (remark or "")


def test_what_cannot_be_seen_is_not_drawn() -> None:
    timeline = many(1, 1, 3)
    speck = replace(timeline.bars[0], duration=1e-4)
    kept, _ = timelines._that_fit(replace(timeline, bars=(*timeline.bars, speck)))
    assert kept == list(timeline.bars)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "megatron-mimo report RUN: expected one RUN, got 0"),
        (["nowhere"], "nowhere does not exist: expected a run's folder"),
        (["run", "--timeline", "run"], "--timeline run has no timeline: expected what"),
        (["run", "--output", "x"], "unknown flag --output: the nearest is --out"),
        (["run", "--out", "run/metrics.jsonl/x"], "run/metrics.jsonl/x cannot be written: "),
        (["bad-start"], "starts.jsonl, line 1: expected what a run writes when it starts"),
        (["bad-trace"], "timeline.json is not a timeline as --timeline-profile writes it: Key"),
    ],
)
def test_wrong_usage_is_one_line(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (write_run(tmp_path / "bad-start") / STARTS_FILE).write_text('{"time": 1}\n')
    traces = write_run(tmp_path / "bad-trace") / "timeline"
    traces.mkdir()
    (traces / "timeline.json").write_text('{"events": []}')
    assert main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_items_that_are_shared_out_have_charts(tmp_path: Path) -> None:
    curves = {
        "dispatch/encoder by lane max over mean": 2.25,
        "dispatch/encoder as run max over mean": 1.02,
        "dispatch/encoder least max over mean": 1.0,
        "dispatch/encoder bytes": 4096.0,
        "dispatch/exchange ms": 3.5,
        "dispatch/exchange exposed ms": 0.0,
    }
    found = by_name(write_run(tmp_path / "run", **curves), [START])
    balance = found["Balance, data and memory"]
    for title in (
        "Operations of the encoder, busiest rank by mean",
        "Items sent to other ranks in an iteration",
        "Exchange of items, ahead of an iteration",
    ):
        assert title in balance
    assert "Everything else that was logged" not in found
    summary = text(found["In short"])
    assert re.search(r"encoder imbalance, operations by lane, median\s+2\.25", summary)
    assert re.search(r"encoder imbalance, operations as run, median\s+1\.02", summary)
    # A run without it has none of them.
    plain = by_name(write_run(tmp_path / "plain"), [START])
    assert "Exchange of items" not in plain.get("Balance, data and memory", "")
