"""Megatron's log line, TensorBoard scalars and metrics.jsonl, written by one rank."""

import contextlib
import errno
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_mimo.training.event_file import EventFile
from megatron_mimo.training.start_record import STARTS_FILE, StartRecord
from megatron_mimo.training.tags import METRICS_FILE, TAGS

if TYPE_CHECKING:
    from megatron_mimo.training.experts import LayerLoad

_PROBE_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationMetrics:
    """One logged iteration; averages are over the log interval.

    Attributes:
        iteration: Counts from 1.
        consumed_samples: Trained on so far.
        lm_loss: Mean cross entropy per target token, over the interval.
        grad_norm: Global gradient norm over all modules, before clipping.
        learning_rate: After this iteration.
        loss_scale: 1.0 without fp16.
        num_zeros: Zeros in the gradients; None when they are not counted.
        iteration_time_ms: Wall time of an iteration, over the interval.
        global_batch_size: Samples per iteration.
        skipped_iterations: In the interval, updates that were not applied.
        nan_iterations: In the interval, iterations whose gradients were not finite.
        packing_fill: Share of the sequences' positions that is no padding, over the interval; None
            without packing.
        experts: Load of each E layer in this iteration; empty for a model without experts.
        observed: More of the interval, by TensorBoard tag (`rank_report.run_scalars`).
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
    """The line that Megatron-LM prints, field for field."""
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
        # Behind Megatron's own fields, where programs that read its lines do not look.
        parts.append(f"packing fill: {metrics.packing_fill:.4f}")
    return " | ".join(parts) + " |"


class MetricsLogger:
    """Writes what the logging rank reports.

    On a terminal a progress bar stands below the log lines. metrics.jsonl is appended to, one
    object per line; what is not finite is null there.

    Args:
        train_iters: Iterations of the whole run.
        tensorboard_dir: Folder for event files and metrics.jsonl; None writes no event files.
        stream: Where log lines go; standard output when None.
        save: Folder of --save, for metrics.jsonl where there is no other; None writes none.

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
    ) -> None:
        self._train_iters = train_iters
        self._where = f"--tensorboard-dir {tensorboard_dir}"
        self._events: EventFile | None = None
        self._file: TextIO | None = None
        self._starts: Path | None = None
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

    def log_start(self, start: StartRecord) -> None:
        """Keep what the run starts with, beside metrics.jsonl.

        Raises:
            RuntimeError: The disk is full or gone.
        """
        if self._starts is None:
            return
        with self._named_errors(), self._starts.open("a", encoding="utf-8") as file:
            file.write(start.to_json() + "\n")

    def log_iteration(self, metrics: IterationMetrics) -> None:
        """Report a logged iteration.

        Raises:
            RuntimeError: The disk is full or gone.
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
        more = _expert_scalars(metrics.experts) | dict(metrics.observed)
        self._write_json(values | more)
        scalars = _tagged(values) | more
        self._write_scalars(scalars, metrics.iteration, metrics.consumed_samples)

    def log_evaluation(self, iteration: int, consumed_samples: int, loss: float) -> None:
        """Report the held-out loss, and its perplexity, after an iteration.

        Raises:
            RuntimeError: The disk is full or gone.
        """
        # Megatron's cap, so that an early loss does not overflow.
        perplexity = math.exp(min(20.0, loss))
        self._console.print(
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {perplexity:.6E} |"
        )
        values = {"lm_loss_validation": loss, "lm_loss_validation_ppl": perplexity}
        self._write_json({"iteration": iteration, "consumed_samples": consumed_samples} | values)
        self._write_scalars(_tagged(values), iteration, consumed_samples)

    def close(self, summary: str) -> None:
        """End with a line on the whole run.

        Raises:
            RuntimeError: The disk is full or gone.
        """
        if self._progress is not None:
            self._progress.stop()
        self._console.print(summary)
        with self._named_errors():
            if self._events is not None:
                self._events.close()
            if self._file is not None:
                self._file.close()

    def _open(self, folder: Path, *, with_events: bool) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A full disk lets files be made, not filled.
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0" * _PROBE_BYTES)
                probe.flush()
                os.fsync(probe.fileno())
            self._file = (folder / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
            self._starts = folder / STARTS_FILE
            if with_events:
                self._events = EventFile(folder)
        except OSError as error:
            raise ValueError(
                f"{self._where} cannot be written to: {error.strerror or error}; "
                f"{_remedy(error)}name another folder"
            ) from error

    def _write_json(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        # JSON has no nan and no infinity.
        strict = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with self._named_errors():
            self._file.write(json.dumps(strict, allow_nan=False) + "\n")

    def _write_scalars(self, scalars: dict[str, float], iteration: int, samples: int) -> None:
        if self._events is None:
            return
        with self._named_errors():
            self._events.add_scalars(scalars, iteration)
            by_samples = {f"{tag} vs samples": value for tag, value in scalars.items()}
            self._events.add_scalars(by_samples, samples)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn a failed write into an error that names the folder and what to do."""
        try:
            yield
        except OSError as error:
            raise RuntimeError(
                f"cannot write metrics to {self._where}: "
                f"{error.strerror or error}; {_remedy(error)}train without it"
            ) from error


def _tagged(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that TensorBoard gets, by tag."""
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


def _remedy(error: OSError) -> str:
    return "free space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
