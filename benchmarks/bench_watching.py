"""Cost of observation: steps of the demo that are recorded, against steps that are not.

Four ranks train the demo's model on its digits: an encoder of dp 2 beside a language model of dp 2
and ep 2, 16 samples a lane. Every log interval of ten steps runs as `train` does it, in turns, in
the same processes and over the same data:

- *off*: nothing is recorded;
- *curves*: `--tensorboard-dir`; ranks measure, the logging rank gathers and writes an event file
  and `metrics.jsonl`;
- *timeline*: `--timeline-profile --timeline-ranks all`; the traces are written when a run ends,
  and that is not counted;
- *nothing*: another interval without watching, to show what the machine alone makes of such a pair.

Wall time is that of the slowest rank, CPU time that of all ranks and all of their threads. Each
interval is compared with the one without watching beside it, sometimes before, sometimes after;
*ours* is the time without, by the median of these ratios. What else runs on the machine shows in
wall time first, then in CPU time. *The calls alone* counts the CPU time of the training thread
inside the calls that watch, log and write, on the rank where it is most, less that without
watching, and adds it to the time without: this hardly depends on the machine's other work.

    python benchmarks/bench_watching.py [--smoke | --quick] [--json FILE]
"""

import gc
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchlib.ranks import run_ranks, turns
from benchlib.report import Row, Size, run_benchmark

TARGET = 1.02
# With the folder that each writes into after them.
SIDES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "curves": ("--tensorboard-dir",),
    "timeline": (
        *("--timeline-profile", "--timeline-ranks", "all", "--profile-step-start", "1"),
        *("--profile-step-end", "{after}", "--timeline-dir"),
    ),
}
DEMO = (
    *("--encoder-dp", "2", "--llm-dp", "2", "--llm-ep", "2"),
    *("--model-provider", "nemotron-moe-vlm-tiny", "--seq-length", "64"),
    *("--micro-batch-size", "{samples}", "--lr", "1e-4", "--train-iters", "{interval}"),
    *("--log-interval", "{interval}", "--lr-decay-style", "constant"),
)


# Log intervals of each side, steps of each, and samples of a microbatch.
CASES: dict[Size, tuple[int, int, int]] = {
    "smoke": (1, 1, 4),
    "quick": (4, 10, 16),
    "full": (20, 10, 16),
}


def measure(size: Size) -> Iterator[Row]:
    """The rows of every side."""
    with tempfile.TemporaryDirectory(prefix="bench-watching-") as folder:
        from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset

        digits = DigitsConfig(num_train=256, num_val=16, val_fraction=16 / 1797)
        write_digits_dataset(Path(folder) / "digits", digits)
        rounds, interval, samples = CASES[size]
        given = {"folder": folder, "rounds": rounds, "interval": interval, "samples": samples}
        yield from compared(run_ranks(watched, 4, given), interval)


def compared(found: dict[str, dict[str, list[float]]], interval: int) -> Iterator[Row]:
    """The rows, of a step."""
    for side in SIDES:
        on, off = found[side], found[f"{side} off"]
        # Cost of the calls in addition to those of a step without observation.
        calls = [
            own + more - less
            for own, more, less in zip(off["own cpu"], on["calls"], off["calls"], strict=True)
        ]
        for line, unit, ours, peer in (
            ("wall time", "ms", on["wall"], off["wall"]),
            ("CPU time of all ranks", "CPU ms", on["cpu"], off["cpu"]),
            ("CPU time inside the calls alone", "CPU ms", calls, off["own cpu"]),
        ):
            yield Row(
                line=line,
                column=side,
                ours=tuple(1e3 * seconds / interval for seconds in ours),
                peer=tuple(1e3 * seconds / interval for seconds in peer),
                target=TARGET if SIDES[side] else None,
                unit=unit,
            )


def watched(given: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every interval; the first round is not counted."""
    import torch.distributed as dist

    from megatron_mimo.runtime import RuntimeContext, resolve_device
    from megatron_mimo.training.setup import build_trainer

    folder = Path(given["folder"])
    rank = dist.get_rank()
    context = RuntimeContext(
        rank=rank,
        local_rank=rank,
        world_size=dist.get_world_size(),
        device=resolve_device("cpu"),
    )
    trainer = build_trainer(resolved((), given), context)
    loader = drawn(trainer, folder / "digits")
    # As a run does: else what is collected depends on how much was made in between.
    gc.collect()
    gc.freeze()
    found: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in ("wall", "cpu", "own cpu", "calls")}
        for side in SIDES
        for name in (side, f"{side} off")
    }
    for repetition in range(given["rounds"] + 1):
        for side, flags in SIDES.items():
            for name in turns([side, f"{side} off"], repetition):
                out = folder / f"{side} {repetition}"
                watch = (*flags, str(out)) if flags and name == side else ()
                observer, metrics = watching(watch, given, context, trainer)
                dist.barrier()
                seconds = timed(partial(trained, trainer, loader, observer, metrics), observer)
                if repetition:
                    for kind, value in seconds.items():
                        found[name][kind].append(value)
    trainer.loader.close()
    return found


def timed(interval: Callable[[], None], observer: Any) -> dict[str, float]:
    """Wall time and calls of the slowest rank, CPU time of all ranks, and their mean CPU time."""
    import torch
    import torch.distributed as dist

    wall, cpu = time.perf_counter(), time.process_time()
    interval()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    most = torch.tensor([wall, observer.spent], dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    total = torch.tensor([cpu], dtype=torch.float64)
    dist.all_reduce(total)
    slowest, calls = most.tolist()
    all_cpu = float(total)
    return {
        "wall": slowest,
        "cpu": all_cpu,
        "own cpu": all_cpu / dist.get_world_size(),
        "calls": calls,
    }


def trained(trainer: Any, loader: Any, observer: Any, metrics: Any) -> None:
    """One log interval, as a run has it."""
    from megatron_mimo.training.loop import train

    train(trainer.runner, loader, lambda: loader, trainer.loop, metrics, observer=observer)
    if metrics is not None:
        observer.spent += metrics.spent


def resolved(flags: Sequence[str], given: dict[str, Any]) -> Any:
    """The demo's training, and more flags, with the numbers of this size."""
    from megatron_mimo.config.flags import CommandLine, parse
    from megatron_mimo.config.resolve import resolve

    numbers = {name: given[name] for name in ("interval", "samples")}
    numbers["after"] = given["interval"] + 1
    line = [flag.format(**numbers) for flag in (*DEMO, *flags)]
    return resolve(parse(line, CommandLine, prog="bench").train, 4)


def watching(
    flags: Sequence[str], given: dict[str, Any], context: Any, trainer: Any
) -> tuple[Any, Any]:
    """Observer of this rank with these flags, and on the logging rank the metrics writer."""
    from megatron_mimo.training.setup import build_observer
    from megatron_mimo.watch.observe import Unobserved

    settings = resolved(flags, given)
    built = build_observer(settings, context, trainer.runner, None, trainer.tokenizer)
    metrics = None
    if context.rank == settings.layout.logging_rank:
        folder = settings.watch.tensorboard_dir
        metrics = counted_metrics(given["interval"], folder)
    return counted(built or Unobserved()), metrics


def counted(observer: Any) -> Any:
    """The observer, with the CPU time that is spent in its calls; what ends a run is left out."""
    from megatron_mimo.watch.observe import Unobserved

    class Counted(Unobserved):
        spent = 0.0

        def note(self, what: Any) -> None:
            start = time.thread_time()
            observer.note(what)
            self.spent += time.thread_time() - start

        def planned(self, data: Any, plans: Any) -> None:
            start = time.thread_time()
            observer.planned(data, plans)
            self.spent += time.thread_time() - start

        def begin_step(self, iteration: int) -> None:
            start = time.thread_time()
            observer.begin_step(iteration)
            self.spent += time.thread_time() - start

        def end_step(self, iteration: int) -> None:
            start = time.thread_time()
            observer.end_step(iteration)
            self.spent += time.thread_time() - start

        def report(self, seconds_per_step: float) -> dict[str, float]:
            start = time.thread_time()
            found: dict[str, float] = observer.report(seconds_per_step)
            self.spent += time.thread_time() - start
            return found

        def close(self) -> None:
            # A timeline is written when a run ends.
            pass

    return Counted()


def counted_metrics(interval: int, folder: str | None) -> Any:
    """What writes on the logging rank, with the CPU time that it takes."""
    from megatron_mimo.watch.metrics import MetricsLogger

    class Counted(MetricsLogger):
        spent = 0.0

        def log_iteration(self, metrics: Any) -> None:
            start = time.thread_time()
            super().log_iteration(metrics)
            self.spent += time.thread_time() - start

    return Counted(interval, folder, io.StringIO())


def drawn(trainer: Any, digits: Path) -> Any:
    """Steps over and over, read before anything is timed."""
    from itertools import cycle

    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from megatron_mimo.data.samples.digits import read_digits_split

    samples = read_digits_split(digits, "train")
    source = build_list_loader(samples, trainer.data, trainer.role, trainer.tokenizer)
    steps = cycle([source.next_step() for _ in range(len(samples) // 32)])

    class Drawn:
        def next_step(self) -> Any:
            return next(steps)

    return Drawn()


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
