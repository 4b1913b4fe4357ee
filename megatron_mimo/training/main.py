"""The program of one rank, from the command line to the exit code."""

import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mimo import interrupts
from megatron_mimo.border import printable, show_traceback, take_traceback_flag
from megatron_mimo.config.flags import CommandLine, parse, to_yaml
from megatron_mimo.config.resolve import Resolved, check_paths, resolve
from megatron_mimo.failfast import EXIT_USAGE, guard_rank
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.runtime import RuntimeContext, initialize, shutdown
from megatron_mimo.runtime.environment import RankEnvironment, read_environment
from megatron_mimo.schedule.bubble import few_microbatches
from megatron_mimo.training.files import check_open_files
from megatron_mimo.training.folders import require_folders
from megatron_mimo.training.leaving import LeaveRequest
from megatron_mimo.watch.console import configure_logging
from megatron_mimo.watch.start_record import start_record

if TYPE_CHECKING:
    from megatron_mimo.data.loader.batch import ResumableLoader
    from megatron_mimo.training.loop import TrainResult
    from megatron_mimo.training.setup import Trainer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str], after: "Callable[[Trainer, TrainResult], None] | None" = None) -> int:
    """Train as the flags say, as one rank of a launched job or as a single process.

    Args:
        argv: Arguments after the program's name.
        after: Function that every rank calls after training, before groups are destroyed.

    Returns:
        Exit code 0, or 2 when the launcher's variables are incomplete; failures end the process
        inside `guard_rank`, with 1, or 2 for wrong usage.
    """
    argv = take_traceback_flag(argv)
    try:
        environment = read_environment(os.environ)
    except ValueError as error:
        # Without a rank there is no process to guard.
        return _refusal(error)
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
                os.write(1, to_yaml(resolved.config).encode(errors="backslashreplace"))
            return 0
        if (refusal := _too_few_files(resolved, environment)) is not None:
            return refusal
    except ValueError as error:
        show_traceback(error)
        wrong = error
    # Where the flags are wrong, no time of theirs is known.
    join_s = None if resolved is None else 60 * resolved.runtime.distributed_timeout_minutes
    try:
        guarded = guard_rank(role, join_s=join_s)
    except ValueError as error:
        return _refusal(error)
    with guarded as guard:
        if wrong is not None:
            # Every rank found the same error; inside the guard one of them reports it.
            raise wrong
        assert resolved is not None
        runtime = resolved.runtime
        context = initialize(
            runtime.device,
            timeout_minutes=runtime.distributed_timeout_minutes,
            allow_missing_kernels=runtime.allow_missing_kernels,
        )
        try:
            _train(resolved, context, argv, guard.training_starts, after)
        except ValueError as error:
            # Of a user's mistake the report has the message only.
            show_traceback(error)
            raise
        shutdown()
    return 0


def _too_few_files(resolved: Resolved, environment: RankEnvironment) -> int | None:
    """Exit code where the ranks of this machine may not open enough files; one of them says so.

    The watchers need files as well, so none is started for this.
    """
    try:
        check_open_files(resolved, environment.rank)
    except ValueError as error:
        return _refusal(error) if environment.local_rank == 0 else EXIT_USAGE
    return None


def _refusal(error: ValueError) -> int:
    """Exit code of a rank that does not begin, after one line that says why."""
    os.write(2, f"error: {printable(str(error))}\n".encode())
    return EXIT_USAGE


def _name_process(name: str) -> None:
    """Set the name in ps, top and pgrep: forked ranks share their launcher's. Linux only."""
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
    import torch.distributed as dist

    from megatron_mimo.checkpoint.collectives import on_first_rank
    from megatron_mimo.kernels.specs import describe
    from megatron_mimo.training.loop import train
    from megatron_mimo.training.setup import build_trainer
    from megatron_mimo.watch.metrics import MetricsLogger
    from megatron_mimo.watch.services.courier import start_services

    # Before a folder is made or a file is written; disks of several machines may differ.
    world = dist.group.WORLD
    assert world is not None
    on_first_rank(world, lambda: check_paths(resolved))
    leaving = LeaveRequest(resolved.stop.exit_duration_in_mins)
    configure_logging(
        resolved.layout.describe_rank(context.rank),
        context.rank,
        is_logging_rank=context.rank == resolved.layout.logging_rank,
    )
    logger.info("%s", resolved.layout.table())
    kernels = [describe()]
    for module in resolved.architecture.modules.values():
        kernels += adapter_of(module).kernels(module)
    for line in kernels:
        logger.info("%s", line)
    target, lanes = resolved.layout.target, resolved.layout.num_lanes
    few = few_microbatches(target.flag("pp"), target.pp, resolved.data.num_microbatches(lanes))
    if few is not None and context.rank == resolved.layout.logging_rank:
        logger.warning("%s", few)
    if resolved.lora is not None:
        logger.info("%s", resolved.lora.describe(resolved.architecture.parts, resolved.freeze))
    require_folders(resolved, context)
    metrics = None
    if context.rank == resolved.layout.logging_rank:
        # Before the model: a full disk should not cost the time to build one.
        save = None if resolved.save is None else resolved.save.root
        metrics = MetricsLogger(
            resolved.train_iters,
            resolved.watch.tensorboard_dir,
            save=save,
            services=start_services(resolved.watch, save),
        )
    trainer = build_trainer(resolved, context)
    if metrics is not None:
        metrics.undo(trainer.loop.progress)
        metrics.log_start(start_record(resolved, context, trainer.loop.progress, argv, kernels))
    loader = _recorded(trainer, resolved)
    # Objects built so far stay; collecting garbage among them again would delay steps.
    gc.collect()
    gc.freeze()
    if resolved.stop.exit_signal_handler:
        leaving.watch_signals()
    interrupts.end_quiet_imports()
    training_starts()
    result = train(
        trainer.runner,
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
        # A run that continued from the last iteration has no loss.
        loss = "" if result.lm_loss is None else f", last lm loss {result.lm_loss:.6E}"
        metrics.close(
            f"trained {result.iteration - first} iterations"
            f"{f' after {first}' if first else ''} on {result.consumed_samples} samples in "
            f"{result.train_seconds:.0f} s{loss}"
        )
    if after is not None:
        after(trainer, result)


def _recorded(trainer: "Trainer", resolved: Resolved) -> "ResumableLoader":
    """The loader; where it is requested, it also makes the activations of a step be saved."""
    watch = resolved.watch
    if watch.save_activations is None:
        return trainer.loader
    from megatron_mimo.watch.activations import ActivationTap

    return ActivationTap(
        trainer.loader,
        trainer.runner,
        watch.save_activations,
        first=trainer.loop.progress.iteration + 1,
        last=trainer.loop.train_iters,
        iteration=watch.save_activations_step,
    )
