"""The training loop: steps, evaluation, logging, and the end of training."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.config.loop_config import EvaluationConfig, StopConfig
from megatron_mimo.data.loader.batch import ResumableLoader, StepLoader
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.training.leaving import Leave, LeaveRequest
from megatron_mimo.training.nonfinite import NonfiniteRow
from megatron_mimo.training.runner import StepRunner
from megatron_mimo.training.step import (
    StepMetrics,
    evaluate,
    train_step,
)
from megatron_mimo.watch.experts import LayerLoad, read_load
from megatron_mimo.watch.metrics import IterationMetrics, MetricsLogger
from megatron_mimo.watch.observe import Unobserved

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Length of training, and times of logging and evaluation.

    Attributes:
        train_iters: Number of iterations, those before this run included.
        global_batch_size: Number of samples per iteration.
        log_interval: Number of iterations per log line.
        stop: Conditions that stop training before its end.
        evaluation: Times and length of evaluations.
        progress: Progress at which this run continues.
    """

    train_iters: int
    global_batch_size: int
    log_interval: int
    stop: StopConfig = field(default_factory=StopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    progress: Progress = Progress(0, 0)  # noqa: RUF009 (frozen)

    def is_last(self, iteration: int) -> bool:
        """Whether training ends after this iteration."""
        interval = self.stop.exit_interval
        exits = interval is not None and iteration % interval == 0
        return exits or iteration == self.train_iters


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Result of training.

    Attributes:
        iteration: Number of the last finished iteration.
        consumed_samples: Number of samples trained on.
        lm_loss: Mean loss over the last log interval; None on ranks without the language model.
        train_seconds: Wall time of the loop, seconds.
    """

    iteration: int
    consumed_samples: int
    lm_loss: float | None
    train_seconds: float


class Checkpoints(Protocol):
    """Interface of a `Checkpointer` and of a `ReaderSaver`."""

    def is_due(self, iteration: int) -> bool:
        """Whether to save after an iteration."""
        ...

    def save(self, progress: Progress, loader: dict[int, Any]) -> None:
        """Save, or begin to save in the background."""
        ...

    def poll(self) -> None:
        """Publish checkpoints that are complete."""
        ...

    def finish(self) -> None:
        """Wait for checkpoints that are still being written, and publish them."""
        ...

    def close(self) -> None:
        """Release resources after training."""
        ...


class _Interval:
    """Sums over the iterations of one log interval; read back to the host once, when it ends."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps: list[StepMetrics] = []
        self.skipped = 0
        self.seconds_per_step = 0.0
        self.checkpoint_seconds = 0.0
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

    def stand_still(self, seconds: float) -> None:
        """Leave the time of checkpoints out of an iteration's."""
        self.start += seconds
        self.checkpoint_seconds += seconds

    def scalars(self) -> dict[str, float]:
        """What was observed, and the time of checkpoints, per iteration."""
        stalled = self.checkpoint_seconds * 1000 / len(self.steps)
        return self.observed | (
            {"time/checkpoints ms": stalled} if self.observed and stalled else {}
        )

    def stop(self) -> None:
        """Stop the clock; what follows is not part of an iteration's time."""
        self.seconds_per_step = (time.perf_counter() - self.start) / len(self.steps)


def train(
    runner: StepRunner,
    loader: ResumableLoader,
    eval_loader: Callable[[], StepLoader],
    config: LoopConfig,
    metrics: MetricsLogger | None,
    checkpoints: Checkpoints | None = None,
    leaving: LeaveRequest | None = None,
    observer: Unobserved | None = None,
) -> TrainResult:
    """Train until the last iteration, an exit interval, or until a rank has a reason to stop.

    Args:
        runner: Model, optimizer and executor of this rank.
        loader: Loader of the training samples.
        eval_loader: Function that returns a loader of the evaluation samples from their start.
        config: Length of training, and times of logging and evaluation.
        metrics: Writer of the log line, TensorBoard and metrics.jsonl; on the logging rank only.
        checkpoints: Checkpointer; None saves nothing.
        leaving: Request of this rank to stop early; None for no such request.
        observer: Observer of this rank's steps; None, on every rank alike, records nothing.

    Raises:
        RuntimeError: Too many steps in a row, or the last one, have a loss or gradients that are
            not finite.
    """
    runner.model.train()
    leaving, observer = leaving or LeaveRequest(), observer or Unobserved()
    holds_target, evaluation = runner.topology.target is not None, config.evaluation
    start = time.perf_counter()
    interval = _Interval()
    iteration, consumed, loss = config.progress.iteration, config.progress.consumed_samples, None
    finished = iteration >= config.train_iters
    nonfinite = NonfiniteRow(config.stop.max_nonfinite_steps, iteration)
    while not finished:
        iteration += 1
        consumed += config.global_batch_size
        observer.begin_step(iteration)
        step = train_step(
            runner,
            loader,
            iteration,
            config.global_batch_size,
            leaving.wish(),
            observer,
        )
        observer.end_step(iteration)
        nonfinite.note(iteration, step)
        finished = config.is_last(iteration) or step.leave is not Leave.NOT or nonfinite.is_full
        interval.add(step)
        if iteration % config.log_interval == 0 or finished:
            loss = interval.mean_loss() if holds_target else None
            interval.stop()
            interval.observed = observer.report(interval.seconds_per_step)
            if metrics is not None and loss is not None:
                metrics.log_iteration(
                    _report(
                        interval, loss, iteration, consumed, config, expert_load(runner, interval)
                    )
                )
            interval = _Interval()
        if finished and nonfinite:
            if checkpoints is not None:
                checkpoints.finish()  # What was saved before is whole when the run ends.
            nonfinite.require_none()
        if step.leave is not Leave.NOT:
            logger.info("%s at iteration %d", leaving.explain(step.leave), iteration)
        elif evaluation.eval_interval and (iteration % evaluation.eval_interval == 0 or finished):
            held_out = evaluate(runner, eval_loader(), evaluation.eval_iters)
            if metrics is not None:
                metrics.log_evaluation(iteration, consumed, float(held_out))
            # Evaluation is not part of an iteration's time.
            interval.start = time.perf_counter()
        if checkpoints is not None:
            begin = time.perf_counter()
            checkpoints.poll()
            # Weights that give no finite loss must not replace those that did.
            if finished or (checkpoints.is_due(iteration) and not nonfinite):
                checkpoints.save(Progress(iteration, consumed), _lane_states(runner, loader))
            interval.stand_still(time.perf_counter() - begin)
    if checkpoints is not None:
        checkpoints.finish()
    seconds = time.perf_counter() - start
    observer.close()
    dist.barrier(group=runner.topology.control)
    return TrainResult(
        iteration=iteration,
        consumed_samples=consumed,
        lm_loss=loss,
        train_seconds=seconds,
    )


def _lane_states(runner: StepRunner, loader: ResumableLoader) -> dict[int, Any]:
    """Reader state of the lane that this rank reports; one rank of each replica does."""
    target = runner.topology.target
    if target is None or not target.answers_for_replica:
        return {}
    lane = target.place.dp
    return {lane: loader.state()[lane]}


def expert_load(runner: StepRunner, interval: _Interval) -> tuple[LayerLoad, ...]:
    """Load of the experts in the interval's last step; empty for a model without experts."""
    found, language = interval.steps[-1].experts, runner.model.target
    if found is None or language is None:
        return ()
    experts = adapter_of(language.config).experts(language.config)
    assert experts is not None
    return read_load(found, experts)


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
        observed=interval.scalars(),
    )
