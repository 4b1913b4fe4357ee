"""From flags as given to what they mean together: defaults filled in, relations checked.

Everything here runs before the first process group, so that a wrong flag costs no start-up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from megatron_mimo.checkpoint.config import LoadConfig, ReaderSaveConfig, SaveConfig
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.mock import check_image_rows
from megatron_mimo.images import ImageConfig
from megatron_mimo.language.config import ExecutionConfig, HybridConfig
from megatron_mimo.model.config import FreezeConfig, ModelConfig, ReduceConfig
from megatron_mimo.omni.config import OmniConfig
from megatron_mimo.optim.config import AdamConfig, LossScaleConfig, ScheduleConfig
from megatron_mimo.topology import Layout, ModuleGridSpec, SequenceSharding
from megatron_mimo.training.check import check
from megatron_mimo.training.config import (
    CheckpointSection,
    DataSection,
    GridSection,
    ModelSection,
    TrainConfig,
)
from megatron_mimo.training.learning_rate import (
    build_schedule,
    count_iterations,
    fill_schedule,
)
from megatron_mimo.training.model_file import read_architecture, read_folder
from megatron_mimo.training.watch_config import WatchConfig, watch_config

_IMAGES = ImageConfig()
_DATA = DataConfig()
# Grid -> axis -> fields of the architecture that its ranks share out.
_DEALT: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "encoder": {
        "pp": ("vision.num_layers",),
        "tp": (
            "vision.num_attention_heads",
            "vision.ffn_hidden_size",
            "projector.ffn_hidden_size",
        ),
    },
    "llm": {
        "tp": ("language.num_attention_heads", "language.num_query_groups"),
    },
}
_DEALT_GPT: Mapping[str, tuple[str, ...]] = {
    "pp": ("language.num_layers",),
    "tp": ("language.ffn_hidden_size",),
}
# Letter of the pattern -> axis -> fields.
_DEALT_HYBRID: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "M": {"tp": ("language.mamba_num_heads", "language.mamba_num_groups")},
    "-": {"tp": ("language.ffn_hidden_size",)},
    "E": {
        "tp": ("language.moe_shared_expert_intermediate_size",),
        "ep": ("language.num_moe_experts",),
        "expt_tp": ("language.moe_ffn_hidden_size",),
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A checked run: the flags without gaps, and the settings of each part.

    Attributes:
        config: Every flag, defaults filled in.
        layout: Both grids.
        architecture: Of every module.
        execution: What of the language model is recomputed, grouped and fused.
        reduce: When data-parallel ranks of the language model exchange gradients and weights.
        freeze: What does not train.
        data: Where samples come from.
        adam: Optimizer.
        schedule: Learning rate.
        global_batch_size: Samples per iteration.
        train_iters: Iterations to train.
        save: What is saved; None for nothing.
        load: What the run begins with; None for fresh weights.
        save_readers: Where the positions of the readers are saved by themselves; None for nowhere.
        load_readers: Where the data goes on; None to go by `load`.
        folder: What the folder of --load-hf says; None without one.
        watch: What the run records of itself.
    """

    config: TrainConfig
    layout: Layout
    architecture: ModelConfig
    execution: ExecutionConfig
    reduce: ReduceConfig
    freeze: FreezeConfig
    data: DataConfig
    adam: AdamConfig
    schedule: ScheduleConfig
    global_batch_size: int
    train_iters: int
    save: SaveConfig | None
    load: LoadConfig | None
    save_readers: ReaderSaveConfig | None
    load_readers: Path | None
    folder: OmniConfig | None
    watch: WatchConfig


def resolve(config: TrainConfig, world_size: int) -> Resolved:
    """Fill defaults in, check every flag and every relation, and hand each part its settings.

    Args:
        config: Flags as given.
        world_size: Number of started ranks.

    Raises:
        ValueError: What is wrong with which flags, and what to do.
    """
    check(config)
    layout = grids(config, world_size)
    folder = read_folder(config.model.model_provider, config.checkpoints.load_hf)
    architecture = _architecture(config.model, folder)
    check_shards(layout, architecture)
    filled = _fill_defaults(config, world_size, folder)
    _check_sequence(layout, architecture, filled)
    training = filled.training
    freeze = _freeze(filled.model, llm_only=layout.encoder is None)
    data = _data(filled, architecture, freeze)
    check_image_rows(data)
    data.num_microbatches(layout.num_lanes)
    global_batch_size = data.global_batch_size
    train_iters = count_iterations(training, global_batch_size)
    return Resolved(
        config=filled,
        layout=layout,
        architecture=architecture,
        execution=_execution(filled.model, architecture),
        reduce=ReduceConfig(
            overlap_grads=training.overlap_grad_reduce,
            overlap_params=training.overlap_param_gather,
            num_buckets=training.ddp_num_buckets,
            bucket_size=training.ddp_bucket_size,
            pad_buckets=training.ddp_pad_buckets_for_high_nccl_busbw,
        ),
        freeze=freeze,
        data=data,
        adam=AdamConfig(
            lr=training.lr,
            min_lr=training.min_lr,
            weight_decay=training.weight_decay,
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
            eps=training.adam_eps,
            clip_grad=training.clip_grad,
            log_num_zeros=training.log_num_zeros_in_grad,
            loss_scale=_loss_scale(filled.model),
        ),
        schedule=build_schedule(config.training, global_batch_size),
        global_batch_size=global_batch_size,
        train_iters=train_iters,
        save=_save(filled.checkpoints),
        load=_load(filled.checkpoints),
        save_readers=_save_readers(filled.data, filled.checkpoints),
        load_readers=_path(filled.data.dataloader_load),
        folder=folder,
        watch=watch_config(filled.watching, layout, train_iters),
    )


def _fill_defaults(config: TrainConfig, world_size: int, folder: OmniConfig | None) -> TrainConfig:
    """The config with every default that follows from other flags."""
    grid, model, data, training = config.grids, config.model, config.data, config.training
    encoder_offset, llm_offset = _offsets(grid, world_size)
    vision = _architecture(model, folder).vision
    return replace(
        config,
        grids=replace(
            grid,
            encoder_offset=None if grid.llm_only else encoder_offset,
            llm_offset=llm_offset,
            sequence_parallel=_or(grid.sequence_parallel, default=grid.llm_tp > 1),
        ),
        model=replace(
            _fill_resolution(model, folder),
            patch_dim=vision.patch_dim,
            class_token_len=vision.class_token_len,
            pixel_shuffle=vision.pixel_shuffle,
            fp32=not (model.bf16 or model.fp16),
        ),
        data=_fill_source(data),
        training=replace(
            fill_schedule(training),
            global_batch_size=_or(
                training.global_batch_size, default=training.micro_batch_size * grid.llm_dp
            ),
        ),
    )


def grids(config: TrainConfig, world_size: int) -> Layout:
    """Where the modules live.

    Args:
        config: Flags as given.
        world_size: Number of started ranks.

    Raises:
        ValueError: A grid is impossible, or the grids do not cover the ranks; names both.
    """
    grid = config.grids
    encoder_offset, llm_offset = _offsets(grid, world_size)
    encoder = _grid_spec("encoder", encoder_offset, grid)
    llm = _grid_spec("llm", llm_offset, grid)
    if grid.llm_only:
        if grid.encoder_offset is not None or encoder != ModuleGridSpec(name="encoder"):
            raise ValueError("--llm-only trains no encoder: leave the --encoder-… flags out")
        return Layout(encoder=None, llm=llm, world_size=world_size)
    return Layout(encoder=encoder, llm=llm, world_size=world_size)


def _grid_spec(name: str, offset: int, grid: GridSection) -> ModuleGridSpec:
    """One module's sizes: the fields of the section that begin with its name."""
    axes = ("tp", "cp", "dp", "pp", "ep", "expt_tp")
    sizes = {axis: getattr(grid, f"{name}_{axis}") for axis in axes}
    return ModuleGridSpec(name=name, offset=offset, **sizes)


def _offsets(grid: GridSection, world_size: int) -> tuple[int, int]:
    """First ranks of both grids: as given, else one behind the other; one rank holds both."""
    encoder = _or(grid.encoder_offset, default=0)
    size = grid.encoder_tp * grid.encoder_cp * grid.encoder_pp * grid.encoder_dp
    behind = 0 if grid.llm_only or world_size == 1 else encoder + size
    return encoder, _or(grid.llm_offset, default=behind)


def _architecture(model: ModelSection, folder: OmniConfig | None) -> ModelConfig:
    config = read_architecture(model.model_provider, model.model_config, model.override, folder)
    vision, language = config.vision, config.language
    if model.moe_router_force_load_balancing:
        if not _has_experts(config):
            raise ValueError(
                f"--moe-router-force-load-balancing with --model-provider {model.model_provider}, "
                f"which has no experts: leave it out"
            )
        assert isinstance(language, HybridConfig)
        language = replace(language, moe_router_force_load_balancing=True)
    tokens = _or(model.class_token_len, default=vision.class_token_len)
    if tokens < 0:
        raise ValueError(f"--class-token-len is {tokens}: expected at least 0")
    return replace(
        config,
        language=language,
        vision=replace(
            vision,
            patch_dim=_or(model.patch_dim, default=vision.patch_dim),
            class_token_len=tokens,
            num_registers=min(tokens, vision.num_registers),
            pixel_shuffle=_or(model.pixel_shuffle, default=vision.pixel_shuffle),
        ),
    )


def _execution(model: ModelSection, architecture: ModelConfig) -> ExecutionConfig:
    """What is recomputed, grouped and fused.

    Raises:
        ValueError: A part that the model does not have, or parts without "selective".
    """
    granularity, parts = model.recompute_granularity, model.recompute_modules
    if parts and granularity != "selective":
        raise ValueError(
            f"--recompute-modules {parts[0]} without --recompute-granularity selective: add it"
        )
    experts = ("moe", "shared_experts", "moe_act") if _has_experts(architecture) else ()
    if model.moe_grouped_gemm is not None and not experts:
        raise ValueError(
            f"--moe-grouped-gemm with --model-provider {model.model_provider}, which has no "
            f"experts: leave it out"
        )
    known = ("core_attn", "layernorm", "mlp", *experts)
    for part in parts:
        if part not in known:
            raise ValueError(f"--recompute-modules {part}: expected {', '.join(known)}")
    return ExecutionConfig(
        recompute_granularity=granularity,
        recompute_modules=parts or ("core_attn",),
        moe_grouped_gemm=model.moe_grouped_gemm,
    )


def _loss_scale(model: ModelSection) -> LossScaleConfig | None:
    if not model.fp16:
        return None
    return LossScaleConfig(
        constant=model.loss_scale,
        initial=model.initial_loss_scale,
        least=model.min_loss_scale,
        window=model.loss_scale_window,
        hysteresis=model.hysteresis,
    )


def _save(checkpoints: CheckpointSection) -> SaveConfig | None:
    if checkpoints.save is None:
        return None
    return SaveConfig(
        root=Path(checkpoints.save),
        interval=checkpoints.save_interval,
        optimizer=not checkpoints.no_save_optim,
        rng=not checkpoints.no_save_rng,
        in_background=checkpoints.async_save,
        keep_last=checkpoints.keep_last,
    )


def _load(checkpoints: CheckpointSection) -> LoadConfig | None:
    if checkpoints.load is None:
        return None
    return LoadConfig(
        root=Path(checkpoints.load),
        finetune=checkpoints.finetune,
        optimizer=not checkpoints.no_load_optim,
        scheduler=not checkpoints.no_load_scheduler,
        rng=not checkpoints.no_load_rng,
    )


def _save_readers(data: DataSection, checkpoints: CheckpointSection) -> ReaderSaveConfig | None:
    if data.dataloader_save is None:
        return None
    return ReaderSaveConfig(
        root=Path(data.dataloader_save),
        interval=checkpoints.save_interval,
        keep_last=checkpoints.keep_last,
    )


def _freeze(model: ModelSection, *, llm_only: bool) -> FreezeConfig:
    stage = model.training_stage
    freeze = FreezeConfig(
        vision=model.freeze_vit or stage in ("stage1", "stage2"),
        language=model.freeze_lm or stage == "stage1",
        projector=model.freeze_projection,
    )
    if freeze.language and (llm_only or not freeze.encoder_trains):
        frozen = {
            f"--training-stage {stage}": stage != "stage3",
            "--freeze-vit": model.freeze_vit,
            "--freeze-lm": model.freeze_lm,
            "--freeze-projection": model.freeze_projection,
            "--llm-only": llm_only,
        }
        given = [flag for flag, is_given in frozen.items() if is_given]
        raise ValueError(f"nothing is left to train with {', '.join(given)}: leave one out")
    return freeze


def _data(config: TrainConfig, architecture: ModelConfig, freeze: FreezeConfig) -> DataConfig:
    """The data's settings, from a filled config."""
    vision = architecture.vision
    model, data, training = config.model, config.data, config.training
    return DataConfig(
        provider=data.dataset_provider,
        path=data.data_path,
        seed=training.seed,
        seq_length=model.seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=_given(training.global_batch_size),
        num_workers=data.num_workers,
        loader_processes=data.loader_processes,
        shuffle_buffer_size=_or(data.shuffle_buffer_size, default=_DATA.shuffle_buffer_size),
        packing_buffer_size=data.packing_buffer_size,
        max_samples_per_sequence=_or(
            data.max_samples_per_sequence, default=_DATA.max_samples_per_sequence
        ),
        image=vision.image_config(
            dynamic_resolution=model.dynamic_resolution,
            grid_rule="nemotron-omni" if model.model_provider == "hf" else _IMAGES.grid_rule,
            min_patches=_or(model.dynamic_resolution_min_patches, default=_IMAGES.min_patches),
            max_patches=_or(model.dynamic_resolution_max_patches, default=_IMAGES.max_patches),
            img_h=_or(model.img_h, default=_IMAGES.img_h),
            img_w=_or(model.img_w, default=_IMAGES.img_w),
            use_tiling=model.use_tiling,
            max_num_tiles=model.max_num_tiles,
            use_thumbnail=model.use_thumbnail,
            position_crop=vision.position_crop and not freeze.vision,
        ),
        text_only_fraction=data.text_only_fraction,
        mock_image_rows=data.image_seq_length,
        mock_dataset_size=_or(data.mock_dataset_size, default=_DATA.mock_dataset_size),
        image_token=model.image_token,
        prompt_format=model.tokenizer_prompt_format,
        image_tag_type=model.image_tag_type,
        max_bad_sample_fraction=data.max_bad_sample_fraction,
        sample_trace_dir=data.sample_trace_dir,
    )


def _fill_resolution(model: ModelSection, folder: OmniConfig | None) -> ModelSection:
    if not model.dynamic_resolution:
        return model
    least, most = _IMAGES.min_patches, _IMAGES.max_patches
    if folder is not None:
        least, most = folder.min_patches, folder.max_patches
    return replace(
        model,
        dynamic_resolution_min_patches=_or(model.dynamic_resolution_min_patches, default=least),
        dynamic_resolution_max_patches=_or(model.dynamic_resolution_max_patches, default=most),
    )


def _fill_source(data: DataSection) -> DataSection:
    if data.dataset_provider == "mock":
        size = _or(data.mock_dataset_size, default=_DATA.mock_dataset_size)
        return replace(data, mock_dataset_size=size)
    buffer = _or(data.shuffle_buffer_size, default=_DATA.shuffle_buffer_size)
    sequence = _or(data.max_samples_per_sequence, default=_DATA.max_samples_per_sequence)
    return replace(data, shuffle_buffer_size=buffer, max_samples_per_sequence=sequence)


def _refuse_unsupported(layout: Layout, architecture: ModelConfig) -> None:
    """Name the parallel sizes that training cannot use.

    Raises:
        ValueError: The encoder has context parallelism, or a grid expert parallelism although its
            model has no experts.
    """
    supported = {("llm", "cp")}
    if _has_experts(architecture):
        supported |= {("llm", "ep"), ("llm", "expt_tp")}
    for grid in layout.grids:
        for axis, what in (
            ("cp", "context parallelism"),
            ("ep", "expert parallelism"),
            ("expt_tp", "expert tensor parallelism"),
        ):
            size = getattr(grid, axis)
            if size > 1 and (grid.name, axis) not in supported:
                raise ValueError(
                    f"{grid.flag(axis)} {size}: {what} is not supported for this model; set it to 1"
                )


def _has_experts(architecture: ModelConfig) -> bool:
    language = architecture.language
    return isinstance(language, HybridConfig) and "E" in language.layers


def check_shards(layout: Layout, architecture: ModelConfig) -> None:
    """Refuse layers and widths that cannot be dealt evenly to the ranks.

    Raises:
        ValueError: Names the flags.
    """
    _refuse_unsupported(layout, architecture)
    for grid in layout.grids:
        for axis, field in _dealt(grid.name, architecture):
            ranks = getattr(grid, axis)
            size = attrgetter(field)(architecture)
            # A key-value head may stand on several ranks.
            shared = field.endswith("num_query_groups") and ranks % size == 0
            if size % ranks and not shared:
                raise ValueError(
                    f"{grid.flag(axis)} {ranks} does not divide the model's {field}, which is "
                    f"{size}: change it, or --override {field}"
                )
    language = architecture.language
    if isinstance(language, HybridConfig):
        language.stages(layout.llm.pp)


def _check_sequence(layout: Layout, architecture: ModelConfig, filled: TrainConfig) -> None:
    """Refuse sequences that cannot be dealt evenly, and experts without sequence parallelism.

    Raises:
        ValueError: Names the flags.
    """
    if filled.data.packing_buffer_size is not None and layout.llm.cp > 1:
        raise ValueError(
            f"--llm-cp {layout.llm.cp} with --packing-buffer-size "
            f"{filled.data.packing_buffer_size}: context parallelism cuts the sequence as a whole, "
            f"and packing asks for each of its samples to be cut evenly; leave one out"
        )
    if _has_experts(architecture) and layout.llm.tp > 1 and not filled.grids.sequence_parallel:
        raise ValueError(
            f"--no-sequence-parallel with --llm-tp {layout.llm.tp}: experts need sequence "
            f"parallelism; leave it out, or set --llm-tp 1"
        )
    SequenceSharding(
        seq_length=filled.model.seq_length,
        cp=layout.llm.cp,
        tp=layout.llm.tp,
        sequence_parallel=bool(filled.grids.sequence_parallel),
    )


def _dealt(grid: str, architecture: ModelConfig) -> Iterator[tuple[str, str]]:
    """Axes of a grid, each with a field of the architecture that its ranks share out."""
    tables = [_DEALT[grid]]
    language = architecture.language
    if grid == "llm" and isinstance(language, HybridConfig):
        tables += [table for letter, table in _DEALT_HYBRID.items() if letter in language.layers]
    elif grid == "llm":
        tables.append(_DEALT_GPT)
    for table in tables:
        for axis, fields in table.items():
            for field in fields:
                yield axis, field


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _or[T](value: T | None, *, default: T) -> T:
    return default if value is None else value


def _given[T](value: T | None) -> T:
    assert value is not None
    return value
