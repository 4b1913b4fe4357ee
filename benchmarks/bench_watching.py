"""What watching costs: steps of the demo that record themselves, against steps that do not.

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

    python benchmarks/bench_watching.py [--quick] [--json FILE]
"""

import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchlib.ranks import answer, is_rank, run_ranks, task
from benchlib.report import Row, arguments, show, write

TARGET = 1.02
INTERVAL = 10
SIDES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "curves": ("--tensorboard-dir",),
    "timeline": (
        *("--timeline-profile", "--timeline-ranks", "all", "--profile-step-start", "1"),
        *("--profile-step-end", str(INTERVAL + 1), "--timeline-dir"),
    ),
}
DEMO = (
    *("--encoder-dp", "2", "--llm-dp", "2", "--llm-ep", "2"),
    *("--model-provider", "nemotron-moe-vlm-tiny", "--seq-length", "64"),
    *("--micro-batch-size", "16", "--lr", "1e-4", "--train-iters", str(INTERVAL)),
    *("--log-interval", str(INTERVAL), "--lr-decay-style", "constant"),
)


def main() -> None:
    """Run every case and print the comparison."""
    flags = arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(prefix="bench-watching-") as folder:
        from megatron_mimo.data.digits import DigitsConfig, write_digits_dataset

        digits = DigitsConfig(num_train=256, num_val=16, val_fraction=16 / 1797)
        write_digits_dataset(Path(folder) / "digits", digits)
        given = {"folder": folder, "rounds": 4 if flags.quick else 20}
        rows = list(compared(run_ranks(__file__, 4, given)))
    show(__doc__.splitlines()[0], rows)
    write(rows, flags.json)


def compared(found: dict[str, dict[str, list[float]]]) -> Iterator[Row]:
    """The rows, of a step."""
    for side in SIDES:
        for kind, name in (("wall", "step"), ("cpu", "CPU time of a step, all ranks")):
            off = found[f"{side} off"][kind]
            ratios = [one / other for one, other in zip(found[side][kind], off, strict=True)]
            peer = statistics.median(off) * 1e3 / INTERVAL
            spread = statistics.quantiles(ratios, n=4)
            yield Row(
                case=f"{side}: {name} ({len(ratios)} pairs, {spread[0]:.3f} to {spread[2]:.3f})",
                ours=peer * statistics.median(ratios),
                peer=peer,
                target=TARGET if SIDES[side] else None,
                unit="ms",
            )
        if not SIDES[side]:
            continue
        off = [own / INTERVAL * 1e3 for own in found[f"{side} off"]["own cpu"]]
        spent = (statistics.median(found[name]["calls"]) for name in (side, f"{side} off"))
        calls = (next(spent) - next(spent)) / INTERVAL * 1e3
        yield Row(
            case=f"{side}: the calls alone, CPU time of a rank's step",
            ours=statistics.median(off) + calls,
            peer=statistics.median(off),
            target=TARGET,
            unit="ms",
        )


def work() -> None:
    """Measure on this rank."""
    from megatron_mimo.runtime import initialize, shutdown

    context = initialize("cpu")
    given = task()
    answer(measure(context, Path(given["folder"]), given["rounds"]))
    shutdown()


def measure(context: Any, folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every interval; the first round is not counted."""
    import torch.distributed as dist

    from megatron_mimo.training.setup import build_trainer

    trainer = build_trainer(resolved(()), context)
    loader = drawn(trainer, folder / "digits")
    # As a run does: else what is collected depends on how much was made in between.
    gc.collect()
    gc.freeze()
    found: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in ("wall", "cpu", "own cpu", "calls")}
        for side in SIDES
        for name in (side, f"{side} off")
    }
    for repetition in range(rounds + 1):
        for side, flags in SIDES.items():
            turns = [side, f"{side} off"]
            for name in turns if repetition % 2 else reversed(turns):
                out = folder / f"{side} {repetition}"
                given = (*flags, str(out)) if flags and name == side else ()
                observer, metrics = watching(given, context, trainer, out)
                dist.barrier()
                interval = partial(trained, trainer, loader, observer, metrics)
                seconds = timed(interval, observer)
                if repetition:
                    for kind, value in seconds.items():
                        found[name][kind].append(value)
    trainer.loader.close()
    return found


def timed(interval: Callable[[], None], observer: Any) -> dict[str, float]:
    """Of all ranks: wall time and calls of the slowest, CPU time of all, and of one in the mean."""
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

    train(trainer.engine, loader, lambda: loader, trainer.loop, metrics, observer=observer)
    if metrics is not None:
        observer.spent += metrics.spent


def resolved(flags: Sequence[str]) -> Any:
    """The demo's training, and more flags."""
    from megatron_mimo.training.flags import CommandLine, parse
    from megatron_mimo.training.resolve import resolve

    return resolve(parse([*DEMO, *flags], CommandLine, prog="bench").train, 4)


def watching(flags: Sequence[str], context: Any, trainer: Any, out: Path) -> tuple[Any, Any]:
    """What watches this rank with these flags, and on the logging rank what writes."""
    from megatron_mimo.training.observe import Unobserved
    from megatron_mimo.training.setup import build_observer

    settings = resolved(flags)
    built = build_observer(settings, context, trainer.engine, None, trainer.tokenizer)
    metrics = None
    if context.rank == settings.layout.logging_rank:
        folder = settings.config.watching.tensorboard_dir
        metrics = counted_metrics(folder)
    return counted(built or Unobserved()), metrics


def counted(observer: Any) -> Any:
    """The observer, with the CPU time that is spent in its calls; what ends a run is left out."""
    from megatron_mimo.training.observe import Unobserved

    class Counted(Unobserved):
        spent = 0.0

        def note(self, what: Any) -> None:
            start = time.thread_time()
            observer.note(what)
            self.spent += time.thread_time() - start

        def planned(self, data: Any, crossings: Any) -> None:
            start = time.thread_time()
            observer.planned(data, crossings)
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


def counted_metrics(folder: str | None) -> Any:
    """What writes on the logging rank, with the CPU time that it takes."""
    from megatron_mimo.training.metrics import MetricsLogger

    class Counted(MetricsLogger):
        spent = 0.0

        def log_iteration(self, metrics: Any) -> None:
            start = time.thread_time()
            super().log_iteration(metrics)
            self.spent += time.thread_time() - start

    return Counted(INTERVAL, folder, io.StringIO())


def drawn(trainer: Any, digits: Path) -> Any:
    """Steps over and over, read before anything is timed."""
    from itertools import cycle

    from megatron_mimo.data.digits import read_digits_split
    from megatron_mimo.data.loader import build_list_loader

    samples = read_digits_split(digits, "train")
    source = build_list_loader(samples, trainer.data, trainer.role, trainer.tokenizer)
    steps = cycle([source.next_step() for _ in range(len(samples) // 32)])

    class Drawn:
        def next_step(self) -> Any:
            return next(steps)

    return Drawn()


if __name__ == "__main__":
    work() if is_rank() else main()
