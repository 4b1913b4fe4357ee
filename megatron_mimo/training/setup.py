"""Construction of everything that a rank trains with, from checked flags."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_mimo.bridge.plan import BridgePlanner
from megatron_mimo.checkpoint.base import load_base
from megatron_mimo.checkpoint.checkpointer import Checkpointer, Loaded, load
from megatron_mimo.checkpoint.config import FirstWeightsConfig
from megatron_mimo.checkpoint.foreign import load_nemotron, load_vision
from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.checkpoint.readers import ReaderSaver, load_readers
from megatron_mimo.checkpoint.start import own_positions
from megatron_mimo.config.model_file import table_size
from megatron_mimo.config.resolve import Resolved
from megatron_mimo.data import (
    DataConfig,
    DataRole,
    SampleTrace,
    StepLoader,
    Tokenizer,
    build_eval_loader,
    build_train_loader,
    data_role,
    tokenizer_for,
)
from megatron_mimo.data.loader.balanced import BalanceConfig, build_dispatcher
from megatron_mimo.data.loader.share import SharedLoader, build_reading_group
from megatron_mimo.data.loader.stream_loader import StreamLoader
from megatron_mimo.model.flops import item_costs, model_flops
from megatron_mimo.model.mimo import BuildConfig, sequence_sharding
from megatron_mimo.model.omni.lora import require_plain_scales
from megatron_mimo.optim.train_state import TrainState
from megatron_mimo.runtime import RuntimeContext
from megatron_mimo.runtime.peak import peak_tflops
from megatron_mimo.settings import values
from megatron_mimo.training.foreign import load_adapters, load_folder
from megatron_mimo.training.loop import Checkpoints, LoopConfig
from megatron_mimo.training.runner import StepConfig, StepRunner, build_runner
from megatron_mimo.watch.observe import Observer, Speed
from megatron_mimo.watch.usage import UsageMeter
from megatron_mimo.weights.folder import WeightFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Everything that this rank trains with.

    Attributes:
        runner: Model, optimizer and executor of this rank.
        loader: Loader of the training samples.
        data: Settings of the samples.
        role: Part of the data that this rank needs.
        tokenizer: Tokenizer of the texts.
        loop: Length of training, and times of logging and evaluation.
        checkpoints: Checkpointer; None saves nothing.
        observer: Observer of the steps; None records nothing.
    """

    runner: StepRunner
    loader: SharedLoader
    data: DataConfig
    role: DataRole
    tokenizer: Tokenizer
    loop: LoopConfig
    checkpoints: Checkpoints | None = None
    observer: Observer | None = None

    def eval_loader(self) -> StepLoader:
        """A loader of the val split from its start."""
        return build_eval_loader(self.data, self.role, self.tokenizer)


def build_trainer(resolved: Resolved, context: RuntimeContext) -> Trainer:
    """Build the model and the loaders of this rank. Collective over the world.

    Raises:
        ValueError: The tokenizer or the dataset is missing or unusable, sizes do not divide, or the
            checkpoint is damaged or of another model.
    """
    model, data = resolved.model, resolved.data
    tokenizer = tokenizer_for(data, model.tokenizer_model)
    roles = [data_role(resolved.layout, rank) for rank in range(resolved.layout.world_size)]
    role = roles[context.rank]
    readers = build_reading_group(roles, context.rank)
    trace = None
    if data.sample_trace_dir is not None and readers.reads:
        role_name = resolved.layout.describe_rank(context.rank)
        trace = SampleTrace(data.sample_trace_dir, context.rank, role_name)
    dispatcher = build_dispatcher(
        resolved.layout, roles, context.rank, data.inputs, balance_config(resolved, tokenizer)
    )
    # Data first: a wrong path should not cost the time to build a model.
    source = build_train_loader(data, role, tokenizer, dispatcher) if readers.reads else None
    loader = SharedLoader(source, readers, inputs=data.inputs, trace=trace)
    runner = build_runner(
        resolved.layout,
        resolved.architecture,
        resolved.freeze,
        build_config(resolved, table_size(tokenizer, resolved.folder)),
        resolved.adam,
        resolved.schedule,
        step_config(resolved, tokenizer),
        device=context.device,
        timeout=timedelta(minutes=resolved.runtime.distributed_timeout_minutes),
    )
    loader.prepare_ahead(runner.inputs.prepare)
    checkpoints = _build_checkpoints(resolved, runner)
    trust = resolved.config.checkpoints.trust_checkpoint
    if resolved.lora is not None:
        # A checkpoint has the adapters alone.
        _load_first_weights(runner, resolved.first_weights, trust=trust)
    loaded = None if resolved.load is None else load(runner, resolved.load, trust=trust)
    if loaded is None and resolved.lora is None:
        _load_first_weights(runner, resolved.first_weights, trust=trust)
    if loaded is None and (path := resolved.model.lora.load) is not None:
        _load_adapters(runner, resolved, path)
    _restore_readers(loader, resolved, runner, loaded)
    progress = Progress(0, 0) if loaded is None else loaded.progress
    loop = LoopConfig(
        train_iters=_last_iteration(resolved, progress),
        global_batch_size=resolved.global_batch_size,
        log_interval=resolved.watch.log_interval,
        stop=resolved.stop,
        evaluation=resolved.evaluation,
        progress=progress,
    )
    return Trainer(
        runner=runner,
        loader=loader,
        data=data,
        role=role,
        tokenizer=tokenizer,
        loop=loop,
        checkpoints=checkpoints,
        observer=build_observer(resolved, context, runner, source, tokenizer),
    )


def balance_config(resolved: Resolved, tokenizer: Tokenizer) -> BalanceConfig:
    """How items are shared out where a source has several replicas."""
    layout, vocab_size = resolved.layout, table_size(tokenizer, resolved.folder)
    sharding = sequence_sharding(layout, build_config(resolved, vocab_size))
    planners = {name: BridgePlanner(layout, name, sharding) for name in layout.domains}
    return BalanceConfig(
        costs=item_costs(
            resolved.architecture,
            resolved.freeze,
            vocab_size=vocab_size,
            seq_length=resolved.model.seq_length,
            lora=resolved.lora,
        ),
        window=resolved.grids.encoder_balance_window,
        count_rows={
            name: planner.network_rows
            for name, planner in planners.items()
            if planner.needs_network_rows
        },
        validate=resolved.data.validate_alignment,
        describe=layout.describe_rank,
    )


def build_config(resolved: Resolved, vocab_size: int) -> BuildConfig:
    """Settings of the model that are no part of its architecture.

    Args:
        resolved: Checked settings of the run.
        vocab_size: Number of rows of the embedding table, V.
    """
    return BuildConfig(
        params_dtype=resolved.params_dtype,
        seed=resolved.data.seed,
        init=resolved.model.init,
        vocab_size=vocab_size,
        seq_length=resolved.model.seq_length,
        sequence_parallel=bool(resolved.grids.sequence_parallel),
        packed=resolved.data.packing_buffer_size is not None,
        execution=resolved.execution,
        reduce=resolved.reduce,
        lora=resolved.lora,
    )


def step_config(resolved: Resolved, tokenizer: Tokenizer) -> StepConfig:
    """Settings of steps."""
    return StepConfig(
        placeholder_ids=tokenizer.placeholder_ids,
        run_ahead=resolved.grids.encoder_run_ahead,
        check_bridge=resolved.grids.check_bridge,
        validate_data=resolved.data.validate_alignment,
        correct_participation=resolved.adam.correct_participation,
    )


def _build_checkpoints(resolved: Resolved, state: TrainState) -> Checkpoints | None:
    """The checkpointer; None where nothing is saved. Collective over the world."""
    readers = None if resolved.readers.save is None else resolved.readers
    if resolved.save is None:
        return None if readers is None else ReaderSaver(readers, state.topology.control)
    flags = {name.replace("-", "_"): value for name, value in values(resolved.config).items()}
    return Checkpointer(state, resolved.save, flags, readers)


def _restore_readers(
    loader: SharedLoader, resolved: Resolved, state: TrainState, loaded: Loaded | None
) -> None:
    """Continue reading where --dataloader-load says, else where the checkpoint does.

    Raises:
        ValueError: The stored position is damaged, or does not fit this run's readers.
    """
    path = resolved.readers.load
    if path is not None:
        # With --finetune training starts from the beginning.
        iteration = None if loaded is None or loaded.loader is None else loaded.progress.iteration
        checkpoints = resolved.config.checkpoints
        lanes = load_readers(
            Path(path),
            iteration,
            state.topology.control,
            own=own_positions(resolved.readers, checkpoints.save),
            trust=checkpoints.trust_checkpoint,
        )
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
    runner: StepRunner,
    source: StreamLoader | None,
    tokenizer: Tokenizer,
) -> Observer | None:
    """The observer of this rank; None where the run records nothing. Collective over the world.

    Args:
        resolved: Checked settings of the run.
        context: Rank and device of this process.
        runner: Model, optimizer and executor of this rank.
        source: Loader whose skipped samples are counted; None on a rank that does not read.
        tokenizer: Tokenizer of the texts.
    """
    watch, model = resolved.watch, runner.model
    if not watch.measures and watch.traces is None:
        return None
    vocab_size, seq_length = (
        table_size(tokenizer, resolved.folder),
        resolved.model.seq_length,
    )
    peak = watch.peak_tflops
    return Observer(
        watch,
        runner.topology,
        context.device,
        UsageMeter(
            topology=runner.topology,
            architecture=resolved.architecture,
            row_bytes=model.row_width * model.row_dtype.itemsize,
            returning=model.flow.returning,
        ),
        Speed(
            flops=lambda work: model_flops(
                resolved.architecture,
                resolved.freeze,
                work,
                vocab_size=vocab_size,
                seq_length=seq_length,
                lora=resolved.lora,
            ),
            tokens_per_step=resolved.global_batch_size * seq_length,
            peak_tflops=(
                peak_tflops(context.device, resolved.params_dtype) if peak is None else peak
            ),
        ),
        _skipped(runner, source),
    )


def _skipped(runner: StepRunner, source: StreamLoader | None) -> Callable[[], int]:
    """Function that counts the skipped samples of a lane, on the one rank that reports it."""
    target = runner.topology.target
    if source is None or target is None or not target.answers_for_replica:
        return lambda: 0
    return lambda: source.skips.skipped_of(target.place.dp)


def _load_adapters(state: TrainState, resolved: Resolved, path: str) -> None:
    """Load the adapters of --load-lora, beside the weights that the run begins with."""
    if resolved.first_weights.load_hf is not None:
        assert resolved.lora is not None
        with WeightFolder(resolved.first_weights.load_hf) as folder:
            require_plain_scales(folder, resolved.architecture, resolved.lora)
    load_adapters(state, resolved.architecture, path)


def _load_first_weights(state: TrainState, first: FirstWeightsConfig, *, trust: bool) -> None:
    """Load initial weights that another program or run has written, where a flag names them."""
    if first.load_hf is not None and first.load_base is None:
        load_folder(state, first.load_hf, first.without)
    if first.load_base is not None:
        replicas, control = state.model.replicas, state.topology.control
        load_base(replicas, Path(first.load_base), control, trust=trust)
        # The optimizer has copies of the initial weights.
        state.optimizer.refresh_main_params()
    if first.load_nemotron_checkpoint is not None:
        load_nemotron(state, Path(first.load_nemotron_checkpoint), trust=trust)
    if first.load_vision_from is not None:
        load_vision(state, Path(first.load_vision_from), trust=trust)


def _last_iteration(resolved: Resolved, progress: Progress) -> int:
    """Number of the last iteration; samples keep counting when the global batch has changed."""
    samples = resolved.length.train_samples
    if samples is None:
        return resolved.train_iters
    left = max(0, samples - progress.consumed_samples)
    return progress.iteration + left // resolved.global_batch_size
