"""Megatron's log line, metrics.jsonl, and scalars for TensorBoard and services, by one rank."""

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_mimo.checkpoint.progress import Progress as RunProgress
from megatron_mimo.runtime.output import LastingFile, named_errors, require_folder, unwritable
from megatron_mimo.watch.event_file import EventFile, undo_events
from megatron_mimo.watch.services.courier import Courier, end_services
from megatron_mimo.watch.start_record import STARTS_FILE, StartRecord
from megatron_mimo.watch.tags import METRICS_FILE, TAGS, over_samples

if TYPE_CHECKING:
    from megatron_mimo.watch.experts import LayerLoad

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationMetrics:
    """One logged iteration; averages are over the log interval.

    Attributes:
        iteration: Number of the iteration, from 1.
        consumed_samples: Number of samples trained on so far.
        lm_loss: Mean cross entropy per target token, over the interval.
        grad_norm: Global gradient norm over all modules, before clipping.
        learning_rate: Learning rate after this iteration.
        loss_scale: Scale of the loss; 1.0 without fp16.
        num_zeros: Number of zeros in the gradients; None when they are not counted.
        iteration_time_ms: Mean wall time of an iteration over the interval, in milliseconds.
        global_batch_size: Number of samples per iteration.
        skipped_iterations: Number of updates in the interval that were not applied.
        nan_iterations: Number of iterations in the interval whose gradients were not finite.
        packing_fill: Fraction of the sequences' positions that are not padding, over the interval;
            None without packing.
        experts: Load of each E layer in this iteration; empty for a model without experts.
        observed: Further scalars of the interval by TensorBoard tag (`rank_report.run_scalars`).
    """

    iteration: int
    consumed_samples: int
    lm_loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    num_zeros: int | None
    iteration_time_ms: float
    global_batch_size: int
    skipped_iterations: int
    nan_iterations: int
    packing_fill: float | None = None
    experts: tuple["LayerLoad", ...] = ()
    observed: Mapping[str, float] = field(default_factory=dict)


def log_line(metrics: IterationMetrics, train_iters: int) -> str:
    """The log line of Megatron-LM, field for field."""
    parts = [
        f" iteration {metrics.iteration:8d}/{train_iters:8d}",
        f"consumed samples: {metrics.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {metrics.iteration_time_ms:.1f}",
        f"learning rate: {metrics.learning_rate:.1E}",
        f"global batch size: {metrics.global_batch_size:5d}",
        f"lm loss: {metrics.lm_loss:.6E}",
        f"loss scale: {metrics.loss_scale:.1f}",
        f"grad norm: {metrics.grad_norm:.3f}",
    ]
    if metrics.num_zeros is not None:
        parts.append(f"num zeros: {metrics.num_zeros}")
    parts += [
        f"number of skipped iterations: {metrics.skipped_iterations:3d}",
        f"number of nan iterations: {metrics.nan_iterations:3d}",
    ]
    if metrics.packing_fill is not None:
        # After Megatron's own fields, where programs that read its lines do not look.
        parts.append(f"packing fill: {metrics.packing_fill:.4f}")
    return " | ".join(parts) + " |"


class MetricsLogger:
    """Writes the reports of the logging rank.

    On a terminal there is a progress bar below the log lines. metrics.jsonl is appended to, one
    object per line; numbers that are not finite are null in it. Files that are removed while the
    run writes to them are begun again, with a warning.

    Args:
        train_iters: Number of iterations of the whole run.
        tensorboard_dir: Folder for event files and metrics.jsonl; None for no event files.
        stream: Stream for log lines; None for standard output.
        save: Folder of --save, for metrics.jsonl where `tensorboard_dir` is None; None for no file.
        services: Further services that get the scalars of the event files.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(
        self,
        train_iters: int,
        tensorboard_dir: str | None,
        stream: TextIO | None = None,
        *,
        save: str | None = None,
        services: Sequence[Courier] = (),
    ) -> None:
        self._services = services
        self._train_iters = train_iters
        self._where = f"--tensorboard-dir {tensorboard_dir}"
        self._events: EventFile | None = None
        self._file: LastingFile | None = None
        self._starts: Path | None = None
        self._start_line = ""
        if tensorboard_dir is not None:
            self._open(Path(tensorboard_dir), with_events=True)
        elif save is not None:
            self._where = f"--save {save}"
            self._open(Path(save), with_events=False)
        self._console = Console(
            file=stream or sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self._progress: Progress | None = None
        if self._console.is_terminal:
            # Redrawn with each log line: a thread that redraws would outlive a failing rank's
            # last words, and other output would run into the bar.
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task("training", total=train_iters)

    def undo(self, progress: RunProgress) -> None:
        """Take out of the event files what the run wrote after the point where it now continues.

        metrics.jsonl keeps it: the later of two lines of an iteration counts.

        Raises:
            RuntimeError: A file cannot be written, for instance to a full disk.
        """
        if self._events is None:
            return
        with named_errors(f"metrics to {self._where}"):
            number = undo_events(
                self._events.path.parent, progress.iteration, progress.consumed_samples
            )
        if number:
            logger.info(
                "took %d events after iteration %d out of the event files in %s",
                *(number, progress.iteration, self._events.path.parent),
            )

    def log_start(self, start: StartRecord) -> None:
        """Write the record of this start of the run, beside metrics.jsonl, and begin in services.

        Raises:
            RuntimeError: The record cannot be written, for instance to a full disk.
            ValueError: A service begins no run.
        """
        self._start_line = start.to_json() + "\n"
        self._write_start()
        for service in self._services:
            service.open(start)

    def _write_start(self) -> None:
        if self._starts is None:
            return
        with (
            named_errors(f"metrics to {self._where}"),
            self._starts.open("a", encoding="utf-8") as file,
        ):
            file.write(self._start_line)

    def log_iteration(self, metrics: IterationMetrics) -> None:
        """Report a logged iteration.

        Raises:
            RuntimeError: The report cannot be written, for instance to a full disk.
        """
        if self._progress is not None:
            self._progress.start()
            self._progress.update(self._task, completed=metrics.iteration, refresh=True)
            # A run that is killed must not leave the terminal without a cursor.
            self._console.show_cursor()
        self._console.print(log_line(metrics, self._train_iters))
        values = asdict(metrics)
        for name in ("num_zeros", "packing_fill"):
            if values[name] is None:
                del values[name]
        del values["experts"], values["observed"]
        self._revive(metrics.iteration)
        more = _expert_scalars(metrics.experts) | dict(metrics.observed)
        self._write_json(values | more)
        scalars = _tagged(values) | more
        self._write_scalars(scalars, metrics.iteration, metrics.consumed_samples)

    def log_evaluation(self, iteration: int, consumed_samples: int, loss: float) -> None:
        """Report the held-out loss, and its perplexity, after an iteration.

        Raises:
            RuntimeError: The report cannot be written, for instance to a full disk.
        """
        # Megatron's cap, so that an early loss does not overflow.
        perplexity = math.exp(min(20.0, loss))
        self._console.print(
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {perplexity:.6E} |"
        )
        self._revive(iteration)
        values = {"lm_loss_validation": loss, "lm_loss_validation_ppl": perplexity}
        self._write_json({"iteration": iteration, "consumed_samples": consumed_samples} | values)
        self._write_scalars(_tagged(values), iteration, consumed_samples)

    def close(self, summary: str) -> None:
        """Write a last line that summarises the run.

        Raises:
            RuntimeError: The line cannot be written, for instance to a full disk.
        """
        if self._progress is not None:
            self._progress.stop()
        self._console.print(summary)
        with named_errors(f"metrics to {self._where}"):
            if self._events is not None:
                self._events.close()
            if self._file is not None:
                self._file.close()
        end_services(self._services)

    def _open(self, folder: Path, *, with_events: bool) -> None:
        require_folder(self._where.split()[0], folder)
        try:
            self._file = LastingFile(folder / METRICS_FILE)
            self._starts = folder / STARTS_FILE
            if with_events:
                self._events = EventFile(folder)
        except OSError as error:
            raise unwritable(self._where, error) from error

    def _revive(self, iteration: int) -> None:
        """Begin files again that somebody has removed, and warn of what is lost."""
        gone = [file for file in (self._file, self._events) if file and file.has_vanished]
        if not gone:
            return
        with named_errors(f"metrics to {self._where}"):
            for file in gone:
                file.begin_again()
        if self._starts is not None and self._start_line and not self._starts.exists():
            self._write_start()
        logger.warning(
            "removed while the run writes to it: %s; begun again from iteration %d on, earlier "
            "values are lost",
            *(" and ".join(str(file.path) for file in gone), iteration),
        )

    def _write_json(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        # JSON has no nan and no infinity.
        strict = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with named_errors(f"metrics to {self._where}"):
            self._file.append((json.dumps(strict, allow_nan=False) + "\n").encode())

    def _write_scalars(self, scalars: dict[str, float], iteration: int, samples: int) -> None:
        for service in self._services:
            service.add_scalars(scalars, iteration, samples)
        if self._events is None:
            return
        with named_errors(f"metrics to {self._where}"):
            self._events.add_scalars(scalars, iteration)
            self._events.add_scalars(over_samples(scalars), samples)


def _tagged(values: Mapping[str, Any]) -> dict[str, float]:
    """Values that have a TensorBoard tag, by tag."""
    return {tag: values[name] for name, tag in TAGS.items() if name in values}


def _expert_scalars(experts: Sequence["LayerLoad"]) -> dict[str, float]:
    """Means over the E layers under Megatron's and our own tag, then layer by layer."""
    if not experts:
        return {}
    number = len(experts)
    scalars = {
        "seq_load_balancing_loss": sum(load.balance_loss for load in experts) / number,
        "experts/max over mean load": sum(load.max_over_mean for load in experts) / number,
    }
    for load in experts:
        layer = f"experts/layer {load.layer}"
        scalars[f"{layer} max over mean load"] = load.max_over_mean
        scalars[f"{layer} most tokens"] = max(load.tokens)
        scalars[f"{layer} fewest tokens"] = min(load.tokens)
    return scalars
