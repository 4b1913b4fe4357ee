"""What a run records of itself: curves, timelines, and nothing where nobody asks."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.schedule.actions import build_schedule
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.topology import Layout
from tests.integration.engines import beside
from tests.integration.test_train_cli import train

pytestmark = pytest.mark.slow

LAYOUT = beside({}, {"dp": 2})
# Four samples of a lane, one by one.
MICROBATCHES = 4
PHASES = ["data", "agreement", "prepare", "drain", "gradient finalisation", "optimizer", "loss"]


def spans(events: list[dict[str, Any]], rank: int, iteration: int) -> list[dict[str, Any]]:
    """What a rank did in an iteration, in the order of the file."""
    return [
        event
        for event in events
        if event["ph"] == "X"
        and event["pid"] == rank
        and event.get("args", {}).get("iteration") == iteration
    ]


def test_a_run_writes_curves_and_timelines(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs, traces = tmp_path / "tensorboard", tmp_path / "traces"
    run = train(
        *("--encoder-dp", "1", "--llm-dp", "2", "--global-batch-size", "8", "--train-iters", "4"),
        *("--log-interval", "2", "--tensorboard-dir", str(logs), "--peak-tflops", "0.5"),
        *("--timeline-profile", "--timeline-dir", str(traces), "--timeline-ranks", "all"),
        *("--profile-step-start", "2", "--profile-step-end", "4"),
        nproc=3,
    )
    assert run.returncode == 0, run.stderr
    events = EventAccumulator(str(logs)).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    check_scalars({tag: [point.value for point in points] for tag, points in found.items()})
    assert [point.step for point in found["bridge/bytes"]] == [2, 4]
    assert [point.step for point in found["bridge/bytes vs samples"]] == [16, 32]
    check_timelines(traces)
    assert {path.name for path in traces.iterdir()} == {
        "timeline.json",
        *(f"timeline-rank-0000{rank}.json" for rank in range(3)),
    }


def check_scalars(values: dict[str, list[float]]) -> None:
    for interval in range(2):
        now = {tag: each[interval] for tag, each in values.items() if "vs samples" not in tag}
        step = now["iteration-time-ms"]
        for module in ("encoder", "llm"):
            parts = {
                tag: ms for tag, ms in now.items() if tag.startswith(f"time/{module} ") and ms > 0
            }
            assert f"time/{module} pipeline ms" not in parts
            assert {f"time/{module} {part} ms" for part in ("compute", "bridge", "data")} <= set(
                parts
            )
            # Every moment of a step counts, and what lies between steps is little. In their first
            # step ranks also wait for those that were not ready yet.
            assert interval == 0 or 0.75 * step < sum(parts.values()) < 1.1 * step
        # Float32 rows of 128 numbers go to one lane each, and their gradients back.
        assert now["bridge/bytes"] == 2 * now["bridge/rows"] * 128 * 4 > 0
        assert now["balance/encoder rows max over mean"] == 1
        assert now["data/skipped samples"] == 0
        assert now["memory/encoder peak GiB"] > 0.05 < now["memory/llm peak GiB"]
        tokens = now["speed/tokens per s"]
        assert tokens == pytest.approx(8 * 64 / step * 1000, rel=1e-4)
        assert now["speed/tokens per s per GPU"] == pytest.approx(tokens / 3)
        parts = {name: now[f"speed/{name} TFLOP per s per GPU"] for name in ("encoder", "llm")}
        assert now["speed/model TFLOP per s per GPU"] == pytest.approx(
            (parts["encoder"] + 2 * parts["llm"]) / 3, rel=1e-4
        )
        for name, speed in parts.items():
            assert now[f"speed/{name} MFU"] == pytest.approx(speed / 0.5)


def check_timelines(folder: Path) -> None:
    schedule = build_schedule(
        LAYOUT,
        num_microbatches=MICROBATCHES,
        run_ahead=1,
        gradients=True,
        flow=GradientFlow(returning=frozenset({"encoder"}), inside=frozenset({"encoder"})),
    )
    merged = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    for rank in range(3):
        events = json.loads((folder / f"timeline-rank-0000{rank}.json").read_text())["traceEvents"]
        assert [event for event in merged if event["pid"] == rank] == events
        for iteration in range(1, 5):
            names = [event["name"] for event in spans(events, rank, iteration)]
            actions = [str(action) for action in schedule[LAYOUT.stages_of(rank)]]
            expected = [*PHASES[:3], *actions, *PHASES[3:]] if iteration in (2, 3) else []
            assert names == expected
        laps = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
        for one, next_one in itertools.pairwise(laps):
            # Microseconds; the end is a sum of rounded numbers.
            assert one["ts"] + one["dur"] <= next_one["ts"] + 0.01
    check_clocks(merged)


def check_clocks(events: list[dict[str, Any]]) -> None:
    """On one clock no rank has its rows before the encoder sends them.

    What ranks believe of each other's clocks is right to half of a message's way there and back,
    which on a busy machine is some tenths of a millisecond.
    """
    for m in range(MICROBATCHES):
        (sent,) = [e for e in spans(events, 0, 2) if e["name"] == f"encoder send output {m}"]
        for rank in (1, 2):
            (taken,) = [e for e in spans(events, rank, 2) if e["name"] == f"llm wait input {m}"]
            assert taken["ts"] + taken["dur"] > sent["ts"] - 3000


def watched_parts(engine: Any, traces: Any = None) -> tuple[Any, ...]:
    """Arguments of an `Observer` over a small engine."""
    from megatron_mimo.config.presets import model_config
    from megatron_mimo.config.watch_config import WatchConfig
    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.model.flops import model_flops
    from megatron_mimo.runtime import Device
    from megatron_mimo.watch.observe import Speed
    from megatron_mimo.watch.usage import UsageMeter
    from tests.integration.engines import small_parts

    architecture, freeze, _ = small_parts()
    return (
        WatchConfig(tensorboard_dir="unused", traces=traces),
        engine.topology,
        Device("cpu"),
        UsageMeter(
            topology=engine.topology,
            architecture=model_config("mock"),
            row_bytes=4,
            returning=frozenset({"encoder"}),
        ),
        Speed(
            flops=lambda work: model_flops(
                architecture,
                freeze,
                work,
                vocab_size=ByteTokenizer.vocab_size,
                seq_length=64,
            ),
            tokens_per_step=8 * 64,
            peak_tflops=None,
        ),
        lambda: 0,
    )


def collectives(layout: Layout, watched: bool, steps: int) -> dict[str, int]:
    """Calls of torch.distributed in a rank's loop."""
    from collections import Counter

    import torch.distributed as dist

    from megatron_mimo.training.loop import LoopConfig, train
    from megatron_mimo.watch.observe import Observer
    from tests.integration.engines import mock_data, mock_loader, small_runner

    engine = small_runner(layout)
    observer = Observer(*watched_parts(engine)) if watched else None
    loader = mock_loader(layout, mock_data())
    counts: Counter[str] = Counter()
    names = [
        *("all_reduce", "all_gather", "gather", "broadcast", "barrier", "reduce_scatter_tensor"),
        *("all_gather_into_tensor", "all_gather_object", "gather_object", "all_to_all_single"),
        *("send", "recv", "batch_isend_irecv", "reduce", "scatter"),
    ]
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    loop = LoopConfig(
        train_iters=steps,
        global_batch_size=8,
        log_interval=3,
    )
    try:
        for name in names:
            setattr(dist, name, counting(name))
        train(engine, loader, lambda: loader, loop, None, observer=observer)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return dict(counts)


def test_watching_adds_one_gather_per_log_interval(run_ranks: Callable[..., list]) -> None:
    off = run_ranks(3, collectives, LAYOUT, False, 6)
    on = run_ranks(3, collectives, LAYOUT, True, 6)
    for without, watched in zip(off, on, strict=True):
        assert "gather" not in without
        assert watched == without | {"gather": 2}
        assert without["all_reduce"] >= 6


def calls_within_steps(layout: Layout, folder: str | None, steps: int) -> list[dict[str, int]]:
    """Of each step of a rank: its collectives, and reads that would wait for a device.

    Some reads dispatch an operator, others only call a method of a tensor; both are counted.
    """
    import threading
    from collections import Counter

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_mimo.config.watch_config import TraceConfig
    from megatron_mimo.training.loop import LoopConfig, train
    from megatron_mimo.watch.observe import Observer, Unobserved
    from tests.integration.engines import mock_data, mock_loader, small_runner

    names = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")
    methods = {name: getattr(torch.Tensor, name) for name in names}
    found: list[Counter[str]] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.namespace == "c10d" or func is torch.ops.aten._local_scalar_dense.default:
                found[-1][str(func)] += 1
            return func(*args, **(kwargs or {}))

    def counted(name: str) -> Callable[..., Any]:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # Readers draw the next step meanwhile, in a thread of their own.
            found[-1][name] += threading.current_thread() is threading.main_thread()
            return methods[name](self, *args, **kwargs)

        return call

    class Counting(Observer if folder else Unobserved):  # type: ignore[misc]
        def begin_step(self, iteration: int) -> None:
            found.append(Counter())
            self.operators = Operators()
            self.operators.__enter__()
            for name in methods:
                setattr(torch.Tensor, name, counted(name))
            super().begin_step(iteration)

        def end_step(self, iteration: int) -> None:
            super().end_step(iteration)
            for name, method in methods.items():
                setattr(torch.Tensor, name, method)
            self.operators.__exit__(None, None, None)

    engine = small_runner(layout)
    loader = mock_loader(layout, mock_data())
    ranks = frozenset(range(layout.world_size))
    traces = folder and TraceConfig(
        folder=Path(folder),
        first=1,
        end=steps + 1,
        timeline_ranks=ranks,
        profile_ranks=frozenset(),
    )
    observer = Counting(*watched_parts(engine, traces)) if folder else Counting()
    loop = LoopConfig(
        train_iters=steps,
        global_batch_size=8,
        log_interval=steps,
    )
    train(engine, loader, lambda: loader, loop, None, observer=observer)
    return [dict(step) for step in found]


def test_a_watched_step_neither_waits_nor_communicates_more(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    """Measuring and tracing every rank, between the first line of a step and its last."""
    steps = 3
    off = run_ranks(3, calls_within_steps, LAYOUT, None, steps)
    on = run_ranks(3, calls_within_steps, LAYOUT, str(tmp_path), steps)
    assert len(list(tmp_path.glob("timeline-rank-*.json"))) == 3
    assert on == off
    for rank in off:
        assert len(rank) == steps
        # The step's own: what the ranks agree on before it, and the gradients' norm.
        assert all(step["c10d.allreduce_.default"] >= 2 for step in rank)
        assert all(step["tolist"] + step.get("item", 0) >= 1 for step in rank)


def test_a_run_that_nobody_watches_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train("--train-iters", "2", "--log-interval", "1")
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.iterdir()) == []


def test_traces_alone_record_their_steps_only(tmp_path: Path) -> None:
    run = train(
        *("--train-iters", "4", "--log-interval", "4", "--timeline-dir", str(tmp_path)),
        *("--timeline-profile", "--profile", "--profile-step-start", "3"),
        *("--profile-step-end", "9"),
    )
    assert run.returncode == 0, run.stderr
    events = json.loads((tmp_path / "timeline-rank-00000.json").read_text())["traceEvents"]
    found = {event["args"]["iteration"] for event in events if "iteration" in event.get("args", {})}
    assert found == {3, 4}
    profiled = json.loads((tmp_path / "profile-rank-00000.json").read_text())["traceEvents"]
    optimizer_steps = [e for e in profiled if str(e.get("name")).startswith("Optimizer.step")]
    assert len(optimizer_steps) % 2 == 0 < len(optimizer_steps)


def test_a_run_that_leaves_before_its_window_says_so(tmp_path: Path) -> None:
    run = train(
        *("--train-iters", "20", "--exit-interval", "1", "--timeline-dir", str(tmp_path / "t")),
        *("--timeline-profile", "--profile"),
    )
    assert run.returncode == 0, run.stderr
    assert "nothing was traced" in run.stdout + run.stderr
    assert not (tmp_path / "t").exists()
