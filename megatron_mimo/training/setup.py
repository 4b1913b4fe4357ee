"""From checked flags to everything that a rank trains with."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megatron_mimo.checkpoint.checkpointer import Checkpointer, Loaded, TrainedParts, load
from megatron_mimo.checkpoint.foreign import load_nemotron, load_vision
from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.checkpoint.readers import ReaderSaver, load_readers
from megatron_mimo.data import (
    DataConfig,
    DataRole,
    SampleTrace,
    StepLoader,
    Tokenizer,
    build_eval_loader,
    build_tokenizer,
    build_train_loader,
    check_prompt_format,
)
from megatron_mimo.data.loader import StreamLoader
from megatron_mimo.data.share import SharedLoader, build_reading_group
from megatron_mimo.model.flops import model_flops
from megatron_mimo.model.mimo import BuildConfig
from megatron_mimo.runtime import RuntimeContext
from megatron_mimo.runtime.peak import peak_tflops
from megatron_mimo.training.config import CheckpointSection, ModelSection
from megatron_mimo.training.engine import build_engine, data_role
from megatron_mimo.training.foreign import load_folder
from megatron_mimo.training.loop import Checkpoints, LoopConfig
from megatron_mimo.training.model_file import table_size
from megatron_mimo.training.observe import Observer, Speed
from megatron_mimo.training.resolve import Resolved
from megatron_mimo.training.step import Engine
from megatron_mimo.training.usage import UsageMeter


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Everything that this rank trains with.

    Attributes:
        engine: Runs steps.
        loader: Training samples.
        data: How samples are read.
        role: What this rank needs of them.
        tokenizer: Of the texts.
        loop: How long to train, and when to look.
        checkpoints: Saves; None saves nothing.
        observer: Watches steps; None where nothing is recorded.
    """

    engine: Engine
    loader: SharedLoader
    data: DataConfig
    role: DataRole
    tokenizer: Tokenizer
    loop: LoopConfig
    checkpoints: Checkpoints | None = None
    observer: Observer | None = None

    def eval_loader(self) -> StepLoader:
        """The val split from its start."""
        return build_eval_loader(self.data, self.role, self.tokenizer)


def build_trainer(resolved: Resolved, context: RuntimeContext) -> Trainer:
    """Build the model and the loaders of this rank. Collective over the world.

    Raises:
        ValueError: The tokenizer or the dataset is missing or unfit, sizes do not divide, or the
            checkpoint is damaged or of another model.
    """
    model, data = resolved.config.model, resolved.data
    tokenizer = build_tokenizer(model.tokenizer_model, model.image_token)
    check_prompt_format(data, tokenizer)
    roles = [data_role(resolved.layout, rank) for rank in range(resolved.layout.world_size)]
    role = roles[context.rank]
    readers = build_reading_group(roles, context.rank)
    trace = None
    if data.sample_trace_dir is not None and readers.reads:
        role_name = resolved.layout.describe_rank(context.rank)
        trace = SampleTrace(data.sample_trace_dir, context.rank, role_name)
    # Data first: a wrong path should not cost the time to build a model.
    source = build_train_loader(data, role, tokenizer) if readers.reads else None
    loader = SharedLoader(source, readers, trace=trace)
    engine = build_engine(
        resolved.layout,
        resolved.architecture,
        resolved.freeze,
        BuildConfig(
            params_dtype=_dtype(model),
            seed=resolved.config.training.seed,
            init=model.init,
            vocab_size=table_size(tokenizer, resolved.folder),
            seq_length=model.seq_length,
            sequence_parallel=bool(resolved.config.grids.sequence_parallel),
            execution=resolved.execution,
            reduce=resolved.reduce,
        ),
        resolved.adam,
        resolved.schedule,
        run_ahead=resolved.config.grids.encoder_run_ahead,
        check_bridge=resolved.config.grids.check_bridge,
        image_token_id=tokenizer.image_token_id,
        validate_data=resolved.config.data.validate_data_alignment,
        correct_participation=(
            resolved.config.training.correct_encoder_grad_for_partial_participation
        ),
        device=context.device,
        timeout=timedelta(minutes=resolved.config.runtime.distributed_timeout_minutes),
    )
    parts = TrainedParts(engine.topology, engine.model, engine.optimizer, engine.scheduler)
    checkpoints = _build_checkpoints(resolved, parts)
    loaded = None if resolved.load is None else load(parts, resolved.load)
    if loaded is None:
        _load_first_weights(parts, resolved.config.checkpoints)
    _restore_readers(loader, resolved, parts, loaded)
    training, watching = resolved.config.training, resolved.config.watching
    progress = Progress(0, 0) if loaded is None else loaded.progress
    loop = LoopConfig(
        train_iters=_last_iteration(resolved, progress),
        global_batch_size=resolved.global_batch_size,
        exit_interval=training.exit_interval,
        log_interval=watching.log_interval,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        progress=progress,
    )
    return Trainer(
        engine=engine,
        loader=loader,
        data=data,
        role=role,
        tokenizer=tokenizer,
        loop=loop,
        checkpoints=checkpoints,
        observer=build_observer(resolved, context, engine, source, tokenizer),
    )


def _build_checkpoints(resolved: Resolved, parts: TrainedParts) -> Checkpoints | None:
    """What saves; None where nothing is saved. Collective over the world."""
    readers = resolved.save_readers
    if resolved.save is None:
        return None if readers is None else ReaderSaver(readers, parts.topology.control)
    flags = {
        name: value
        for section in asdict(resolved.config).values()
        for name, value in section.items()
    }
    return Checkpointer(parts, resolved.save, flags, readers)


def _restore_readers(
    loader: SharedLoader, resolved: Resolved, parts: TrainedParts, loaded: Loaded | None
) -> None:
    """Go on with the data where --dataloader-load says, else where the checkpoint does.

    Raises:
        ValueError: What is there is damaged, or does not fit this run's readers.
    """
    path = resolved.load_readers
    if path is not None:
        # With --finetune the model begins anew.
        iteration = None if loaded is None or loaded.loader is None else loaded.progress.iteration
        lanes = load_readers(path, iteration, parts.topology.control)
        if lanes is not None:
            try:
                loader.restore(lanes)
            except ValueError as error:
                raise ValueError(f"--dataloader-load {path}: {error}") from error
            return
    if loaded is not None and loaded.loader is not None:
        loader.restore(loaded.loader["lanes"])


def build_observer(
    resolved: Resolved,
    context: RuntimeContext,
    engine: Engine,
    source: StreamLoader | None,
    tokenizer: Tokenizer,
) -> Observer | None:
    """What watches this rank; None where the run records nothing. Collective over the world.

    Args:
        resolved: The run.
        context: This rank.
        engine: Its parts.
        source: What it reads, whose skipped samples count; None for none.
        tokenizer: Of the texts.
    """
    watch, model = resolved.watch, engine.model
    if not watch.measures and watch.traces is None:
        return None
    vocab_size, seq_length = (
        table_size(tokenizer, resolved.folder),
        resolved.config.model.seq_length,
    )
    peak = watch.peak_tflops
    return Observer(
        watch,
        engine.topology,
        context.device,
        UsageMeter(
            topology=engine.topology,
            vision=resolved.architecture.vision,
            row_bytes=model.row_width * model.row_dtype.itemsize,
            returns=model.encoder_trains,
        ),
        Speed(
            flops=lambda work: model_flops(
                resolved.architecture,
                resolved.freeze,
                work,
                vocab_size=vocab_size,
                seq_length=seq_length,
            ),
            tokens_per_step=resolved.global_batch_size * seq_length,
            peak_tflops=(
                peak_tflops(context.device, _dtype(resolved.config.model)) if peak is None else peak
            ),
        ),
        _skipped(engine, source),
    )


def _skipped(engine: Engine, source: StreamLoader | None) -> Callable[[], int]:
    """Counts the samples left out of a lane, on the one rank that answers for it."""
    llm = engine.topology.llm
    if source is None or llm is None or (llm.place.tp, llm.place.cp, llm.place.pp) != (0, 0, 0):
        return lambda: 0
    return lambda: source.skips.skipped_of(llm.place.dp)


def _load_first_weights(parts: TrainedParts, checkpoints: CheckpointSection) -> None:
    """Begin with weights that another program or run has written, where a flag names them."""
    if checkpoints.load_hf is not None:
        load_folder(parts, checkpoints.load_hf)
    if checkpoints.load_nemotron_checkpoint is not None:
        load_nemotron(parts, Path(checkpoints.load_nemotron_checkpoint))
    if checkpoints.load_vision_from is not None:
        load_vision(parts, Path(checkpoints.load_vision_from))


def _dtype(model: ModelSection) -> torch.dtype:
    if model.bf16:
        return torch.bfloat16
    return torch.float16 if model.fp16 else torch.float32


def _last_iteration(resolved: Resolved, progress: Progress) -> int:
    """Where training ends; samples count on when the global batch has changed on the way."""
    samples = resolved.config.training.train_samples
    if samples is None:
        return resolved.train_iters
    left = max(0, samples - progress.consumed_samples)
    return progress.iteration + left // resolved.global_batch_size
