"""The training loop: steps, evaluation, logging, the end."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.data.batch import ResumableLoader, StepLoader
from megatron_mimo.language.config import HybridConfig
from megatron_mimo.training.experts import LayerLoad, read_load
from megatron_mimo.training.leaving import Leave, LeaveRequest
from megatron_mimo.training.metrics import IterationMetrics, MetricsLogger
from megatron_mimo.training.observe import Unobserved
from megatron_mimo.training.step import (
    Engine,
    StepMetrics,
    evaluate,
    train_step,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long to train and when to look.

    Attributes:
        train_iters: Optimizer steps, those before this run included.
        global_batch_size: Samples per step.
        exit_interval: Stop after an iteration that this divides; None trains to the end.
        log_interval: Iterations per log line.
        eval_interval: Iterations between evaluations; 0 evaluates never.
        eval_iters: Global batches per evaluation.
        progress: Where this run goes on.
    """

    train_iters: int
    global_batch_size: int
    exit_interval: int | None
    log_interval: int
    eval_interval: int
    eval_iters: int
    progress: Progress = Progress(0, 0)  # noqa: RUF009 (frozen)

    def is_last(self, iteration: int) -> bool:
        """Whether training ends after this iteration."""
        exits = self.exit_interval is not None and iteration % self.exit_interval == 0
        return exits or iteration == self.train_iters


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How training ended.

    Attributes:
        iteration: Last finished iteration.
        consumed_samples: Samples trained on.
        lm_loss: Mean loss over the last log interval; None on ranks without the language model.
        train_seconds: Wall time of the loop.
    """

    iteration: int
    consumed_samples: int
    lm_loss: float | None
    train_seconds: float


class Checkpoints(Protocol):
    """What a run asks of a `Checkpointer`, or of a `ReaderSaver`."""

    def is_due(self, iteration: int) -> bool:
        """Whether to save after an iteration."""
        ...

    def save(self, progress: Progress, loader: dict[int, Any]) -> None:
        """Save, or begin to."""
        ...

    def poll(self) -> None:
        """Publish what is ready."""
        ...

    def finish(self) -> None:
        """Publish what is still being written."""
        ...

    def close(self) -> None:
        """Training has ended."""
        ...


class _Interval:
    """Sums over the iterations of one log interval; read back to the host once, when it ends."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps: list[StepMetrics] = []
        self.skipped = 0
        self.seconds_per_step = 0.0
        self.observed: dict[str, float] = {}

    def add(self, step: StepMetrics) -> None:
        self.steps.append(step)
        self.skipped += not step.update.applied

    def mean_loss(self) -> float:
        """Mean over the iterations whose gradients were finite, as Megatron reports it."""
        losses = [float(step.loss) for step in self.steps if step.update.applied]
        return sum(losses) / len(losses) if losses else float("nan")

    def packing_fill(self) -> float | None:
        fills = [step.packing_fill for step in self.steps if step.packing_fill is not None]
        return sum(fills) / len(fills) if fills else None

    def stop(self) -> None:
        """What follows is no part of an iteration's time."""
        self.seconds_per_step = (time.perf_counter() - self.start) / len(self.steps)


def train(
    engine: Engine,
    loader: ResumableLoader,
    eval_loader: Callable[[], StepLoader],
    config: LoopConfig,
    metrics: MetricsLogger | None,
    checkpoints: Checkpoints | None = None,
    leaving: LeaveRequest | None = None,
    observer: Unobserved | None = None,
) -> TrainResult:
    """Train until the last iteration, an exit interval, or until a rank is told to leave.

    Args:
        engine: This rank's parts.
        loader: Training samples.
        eval_loader: Gives the evaluation samples from their start.
        config: How long, and when to look.
        metrics: Writes the log line, TensorBoard and metrics.jsonl; on the logging rank only.
        checkpoints: Saves; None saves nothing.
        leaving: Whether this rank wants to leave early; None never does.
        observer: Watches this rank's steps; None records nothing, then on every rank.
    """
    engine.model.train()
    leaving, observer = leaving or LeaveRequest(), observer or Unobserved()
    is_llm = engine.topology.llm is not None
    start = time.perf_counter()
    interval = _Interval()
    iteration, consumed, loss = config.progress.iteration, config.progress.consumed_samples, None
    finished = iteration >= config.train_iters
    while not finished:
        iteration += 1
        consumed += config.global_batch_size
        observer.begin_step(iteration)
        step = train_step(
            engine,
            loader,
            iteration,
            config.global_batch_size,
            leaving.wish(),
            observer,
        )
        observer.end_step(iteration)
        finished = config.is_last(iteration) or step.leave is not Leave.NOT
        interval.add(step)
        if iteration % config.log_interval == 0 or finished:
            loss = interval.mean_loss() if is_llm else None
            interval.stop()
            interval.observed = observer.report(interval.seconds_per_step)
            if metrics is not None and loss is not None:
                metrics.log_iteration(
                    _report(
                        interval, loss, iteration, consumed, config, expert_load(engine, interval)
                    )
                )
            interval = _Interval()
        if step.leave is not Leave.NOT:
            logger.info("%s at iteration %d", leaving.explain(step.leave), iteration)
        elif config.eval_interval and (iteration % config.eval_interval == 0 or finished):
            held_out = evaluate(engine, eval_loader(), config.eval_iters)
            if metrics is not None:
                metrics.log_evaluation(iteration, consumed, float(held_out))
            # Evaluation is not part of an iteration's time.
            interval.start = time.perf_counter()
        if checkpoints is not None:
            begin = time.perf_counter()
            checkpoints.poll()
            if finished or checkpoints.is_due(iteration):
                checkpoints.save(Progress(iteration, consumed), _lane_states(engine, loader))
            interval.start += time.perf_counter() - begin
    if checkpoints is not None:
        checkpoints.finish()
    seconds = time.perf_counter() - start
    observer.close()
    dist.barrier(group=engine.topology.control)
    return TrainResult(
        iteration=iteration,
        consumed_samples=consumed,
        lm_loss=loss,
        train_seconds=seconds,
    )


def _lane_states(engine: Engine, loader: ResumableLoader) -> dict[int, Any]:
    """Of the lane for which this rank answers: one rank of its replica does."""
    llm = engine.topology.llm
    if llm is None or (llm.place.tp, llm.place.cp, llm.place.pp) != (0, 0, 0):
        return {}
    lane = llm.place.dp
    return {lane: loader.state()[lane]}


def expert_load(engine: Engine, interval: _Interval) -> tuple[LayerLoad, ...]:
    """Of the interval's last step; empty for a model without experts."""
    found, language = interval.steps[-1].experts, engine.model.language
    if found is None or language is None:
        return ()
    architecture = language.module.architecture
    assert isinstance(architecture, HybridConfig)
    return read_load(found, architecture)


def _report(
    interval: _Interval,
    loss: float,
    iteration: int,
    consumed: int,
    config: LoopConfig,
    experts: tuple[LayerLoad, ...],
) -> IterationMetrics:
    last = interval.steps[-1]
    return IterationMetrics(
        iteration=iteration,
        consumed_samples=consumed,
        lm_loss=loss,
        grad_norm=last.update.grad_norm,
        learning_rate=last.learning_rate,
        loss_scale=last.update.loss_scale,
        num_zeros=last.update.num_zeros,
        iteration_time_ms=interval.seconds_per_step * 1000,
        global_batch_size=config.global_batch_size,
        skipped_iterations=interval.skipped,
        nan_iterations=interval.skipped,
        experts=experts,
        packing_fill=interval.packing_fill(),
        observed=interval.observed,
    )
