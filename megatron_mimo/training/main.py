"""A rank's whole life, from the command line to the exit code."""

import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mimo.language.config import HybridConfig
from megatron_mimo.runtime import RuntimeContext, initialize, shutdown
from megatron_mimo.runtime.environment import read_environment
from megatron_mimo.runtime.failfast import EXIT_USAGE, guard_rank
from megatron_mimo.training.console import configure_logging
from megatron_mimo.training.flags import CommandLine, parse, to_yaml
from megatron_mimo.training.leaving import LeaveRequest
from megatron_mimo.training.resolve import Resolved, resolve
from megatron_mimo.training.start_record import start_record

if TYPE_CHECKING:
    from megatron_mimo.data.batch import ResumableLoader
    from megatron_mimo.training.loop import TrainResult
    from megatron_mimo.training.setup import Trainer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str], after: "Callable[[Trainer, TrainResult], None] | None" = None) -> int:
    """Train as the flags say, as one rank of a launched job or as a single process.

    Args:
        argv: Arguments after the program's name.
        after: Called on every rank when training has ended, before groups are torn down.

    Returns:
        0, or 2 when the launcher's variables are incomplete; failures end the process inside
        `guard_rank`, with 1, or 2 for wrong usage.
    """
    try:
        environment = read_environment(os.environ)
    except ValueError as error:
        # Without a rank there is nobody to guard.
        os.write(2, f"error: {error}\n".encode())
        return EXIT_USAGE
    _name_process(f"rank {environment.rank}")
    resolved: Resolved | None = None
    wrong: ValueError | None = None
    role = f"rank {environment.rank}"
    try:
        line = parse(argv, CommandLine, prog="megatron-mimo train")
        resolved = resolve(line.train, environment.world_size)
        role = resolved.layout.describe_rank(environment.rank)
        if line.print_config:
            if environment.rank == 0:
                os.write(1, to_yaml(resolved.config).encode())
            return 0
    except ValueError as error:
        wrong = error
    with guard_rank(role) as guard:
        if wrong is not None:
            # Every rank found the same; inside the guard one of them says so.
            raise wrong
        assert resolved is not None
        runtime = resolved.config.runtime
        context = initialize(runtime.device, timeout_minutes=runtime.distributed_timeout_minutes)
        _train(resolved, context, argv, guard.training_starts, after)
        shutdown()
    return 0


def _name_process(name: str) -> None:
    """For ps, top and pgrep: forked ranks share the command line of their launcher. Linux alone."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _train(
    resolved: Resolved,
    context: RuntimeContext,
    argv: Sequence[str],
    training_starts: Callable[[], None],
    after: "Callable[[Trainer, TrainResult], None] | None",
) -> None:
    # These import megatron-core, which `initialize` has prepared.
    from megatron_mimo.runtime.specs import describe
    from megatron_mimo.training.loop import train
    from megatron_mimo.training.metrics import MetricsLogger
    from megatron_mimo.training.setup import build_trainer

    leaving = LeaveRequest(resolved.config.training.exit_duration_in_mins)
    configure_logging(
        resolved.layout.describe_rank(context.rank),
        context.rank,
        is_logging_rank=context.rank == resolved.layout.logging_rank,
    )
    logger.info("%s", resolved.layout.table())
    kernels = [describe()]
    if isinstance(resolved.architecture.language, HybridConfig):
        from megatron_mimo.runtime.hybrid import describe_hybrid

        kernels.append(describe_hybrid())
    for line in kernels:
        logger.info("%s", line)
    metrics = None
    if context.rank == resolved.layout.logging_rank:
        # Before the model: a full disk should not cost the time to build one.
        metrics = MetricsLogger(
            resolved.train_iters,
            resolved.config.watching.tensorboard_dir,
            save=resolved.config.checkpoints.save,
        )
    trainer = build_trainer(resolved, context)
    if metrics is not None:
        metrics.log_start(start_record(resolved, context, trainer.loop.progress, argv, kernels))
    loader = _recorded(trainer, resolved)
    # What was built lives on; looking through it again and again would hold steps up.
    gc.collect()
    gc.freeze()
    if resolved.config.training.exit_signal_handler:
        leaving.watch_signals()
    training_starts()
    result = train(
        trainer.engine,
        loader,
        trainer.eval_loader,
        trainer.loop,
        metrics,
        trainer.checkpoints,
        leaving,
        trainer.observer,
    )
    trainer.loader.close()
    if trainer.checkpoints is not None:
        trainer.checkpoints.close()
    if metrics is not None:
        first = trainer.loop.progress.iteration
        # A run that went on from the last iteration has no loss.
        loss = "" if result.lm_loss is None else f", last lm loss {result.lm_loss:.6E}"
        metrics.close(
            f"trained {result.iteration - first} iterations"
            f"{f' after {first}' if first else ''} on {result.consumed_samples} samples in "
            f"{result.train_seconds:.0f} s{loss}"
        )
    if after is not None:
        after(trainer, result)


def _recorded(trainer: "Trainer", resolved: Resolved) -> "ResumableLoader":
    """The loader, which also has the activations of a step saved where they are asked for."""
    watching = resolved.config.watching
    if watching.save_activations is None:
        return trainer.loader
    from megatron_mimo.training.activations import RecordingLoader

    return RecordingLoader(
        trainer.loader,
        trainer.engine,
        watching.save_activations,
        first=trainer.loop.progress.iteration + 1,
        last=trainer.loop.train_iters,
        iteration=watching.save_activations_step,
    )
