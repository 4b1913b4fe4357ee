"""Conversion of given flags to checked settings: defaults filled in, relations checked.

Everything here runs before the first process group, so that a wrong flag costs no start-up.
"""

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from megatron_mimo.checkpoint.config import (
    FirstWeightsConfig,
    LoadConfig,
    ReaderConfig,
    SaveConfig,
)
from megatron_mimo.checkpoint.start import check_start
from megatron_mimo.config.architecture import (
    check_sequence,
    check_shards,
    frozen_parts,
    language_execution,
    model_architecture,
)
from megatron_mimo.config.check import check
from megatron_mimo.config.custom import import_custom
from megatron_mimo.config.folder import with_folder
from megatron_mimo.config.layout import grids, with_layout
from megatron_mimo.config.learning_rate import (
    count_iterations,
    fill_length,
    fill_schedule,
    in_samples,
)
from megatron_mimo.config.loop_config import EvaluationConfig, LengthConfig, StopConfig
from megatron_mimo.config.lora import adapters, check_base
from megatron_mimo.config.model_file import Folder, read_folder
from megatron_mimo.config.sections import (
    GridSection,
    ModelSection,
    RuntimeSection,
    TrainConfig,
)
from megatron_mimo.config.sharding import check_sharding
from megatron_mimo.config.watch_config import WatchConfig, watch_config
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Inputs, ItemInput, check_inputs
from megatron_mimo.data.samples.mock import check_mock_items
from megatron_mimo.data.source import SourceConfig
from megatron_mimo.media.images import ImageConfig
from megatron_mimo.media.images.config import GridRule
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.model.config import Frozen, ModelConfig, ReduceConfig
from megatron_mimo.model.hf import HfFolder
from megatron_mimo.model.omni.config import OmniConfig, is_hybrid
from megatron_mimo.modules.families import language_adapter, source_adapter
from megatron_mimo.modules.language import ExecutionConfig
from megatron_mimo.modules.lora.config import Lora
from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
from megatron_mimo.topology import Layout

if TYPE_CHECKING:
    import torch

_IMAGES = ImageConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Checked settings of a run.

    The fields follow from flags of several parts; the properties are flags of single parts.

    Attributes:
        config: All flags, with defaults filled in.
        layout: The grids of all modules.
        architecture: Architecture of every module.
        execution: Recomputation, grouping and fusing in the language model.
        freeze: Names of the parts of modules that do not train.
        lora: Adapters that train in place of weights; None for none.
        folder: Model of the folder of --load-hf; None without one.
        data: Settings of the data.
        adam: Settings of the optimizer, with the scale of the loss.
        schedule: Schedule of the learning rate, in samples.
        train_iters: Number of iterations to train.
        readers: Separate folders of the positions of the readers.
        watch: Settings of logging and tracing.
    """

    config: TrainConfig
    layout: Layout
    architecture: ModelConfig
    execution: ExecutionConfig
    freeze: Frozen
    lora: Lora | None
    folder: Folder | None
    data: DataConfig
    adam: AdamConfig
    schedule: ScheduleConfig
    train_iters: int
    readers: ReaderConfig
    watch: WatchConfig

    @property
    def grids(self) -> GridSection:
        """Flags of the modules' grids, and of their cooperation."""
        return self.config.grids

    @property
    def model(self) -> ModelSection:
        """Precision, tokenizer and initial weights."""
        return self.config.model

    @property
    def params_dtype(self) -> "torch.dtype":
        """Dtype of the weights that a step computes with."""
        import torch

        dtype: torch.dtype = getattr(torch, self.model.dtype)
        return dtype

    @property
    def global_batch_size(self) -> int:
        """Number of samples per iteration."""
        return self.data.global_batch_size

    @property
    def reduce(self) -> ReduceConfig:
        """Flags of the exchange of gradients and weights between data-parallel ranks."""
        return self.config.training.reduce

    @property
    def length(self) -> LengthConfig:
        """Length of training, in the unit that was given."""
        return self.config.training.length

    @property
    def stop(self) -> StopConfig:
        """Conditions that stop the run before its end."""
        return self.config.training.stop

    @property
    def evaluation(self) -> EvaluationConfig:
        """Times and length of evaluations."""
        return self.config.training.evaluation

    @property
    def save(self) -> SaveConfig | None:
        """Flags of saving; None where nothing is saved."""
        save = self.config.checkpoints.save
        return None if save.root is None else save

    @property
    def load(self) -> LoadConfig | None:
        """Checkpoint that the run continues from; None for none."""
        load = self.config.checkpoints.load
        return None if load.root is None else load

    @property
    def first_weights(self) -> FirstWeightsConfig:
        """Sources of initial weights for a run that continues from no checkpoint."""
        return self.config.checkpoints.first_weights

    @property
    def runtime(self) -> RuntimeSection:
        """Flags of devices and of waiting between ranks."""
        return self.config.runtime


def check_paths(resolved: Resolved) -> None:
    """Refuse checkpoints, positions and weights that are named and not there. Reads the disk.

    Raises:
        ValueError: A flag names something that is not there; the message names both.
    """
    checkpoints = resolved.config.checkpoints
    check_start(checkpoints.save, checkpoints.load, checkpoints.first_weights, resolved.readers)


def resolve(config: TrainConfig, world_size: int, *, trains: bool = True) -> Resolved:
    """Check every flag and every relation, fill in defaults, and return the settings of each part.

    Args:
        config: Flags as given.
        world_size: Number of started ranks.
        trains: Whether samples are read; otherwise mock samples need not fit a sequence.

    Raises:
        ValueError: A flag is wrong; the message names it and says what to do.
    """
    check(config)
    import_custom(config.model.custom_import)
    first = config.checkpoints.first_weights
    folder = read_folder(config.model.model_provider, first.load_hf, first.without)
    config = with_folder(config, folder)
    architecture = model_architecture(config.model, folder)
    layout = grids(config.grids, tuple(architecture.modules), world_size)
    check_shards(layout, architecture)
    filled = _fill_defaults(config, layout, folder, architecture)
    check_sequence(layout, architecture, filled)
    freeze = frozen_parts(filled.model, architecture, layout.modules)
    lora = adapters(filled.model.lora, architecture, freeze, layout.modules)
    check_sharding(filled.training.reduce, layout, architecture, freeze, lora)
    check_base(lora, filled.checkpoints.first_weights, filled.model.init)
    data = _data(filled, architecture, freeze, folder)
    if trains and data.provider == "mock":
        check_mock_items(data)
    data.num_microbatches(layout.num_lanes)
    training, save = filled.training, filled.checkpoints.save
    train_iters = count_iterations(training.length, data.global_batch_size)
    scaling = filled.model.scaling if filled.model.fp16 else None
    return Resolved(
        config=filled,
        layout=layout,
        architecture=architecture,
        execution=language_execution(filled.model, architecture),
        freeze=freeze,
        lora=lora,
        folder=folder,
        data=data,
        adam=replace(training.adam, loss_scale=scaling),
        schedule=in_samples(config.training.schedule, training.length, data.global_batch_size),
        train_iters=train_iters,
        readers=replace(filled.data.readers, interval=save.interval, keep_last=save.keep_last),
        watch=watch_config(filled.watching, layout, train_iters),
    )


def _fill_defaults(
    config: TrainConfig, layout: Layout, folder: Folder | None, architecture: ModelConfig
) -> TrainConfig:
    """The config with every default that follows from other flags."""
    grid, model, training = config.grids, config.model, config.training
    vision = architecture.parts.get("vision")
    length = fill_length(training.length)
    return replace(
        config,
        grids=replace(
            with_layout(grid, layout),
            sequence_parallel=_or(
                grid.sequence_parallel,
                default=layout.target.tp > 1
                and language_adapter(architecture.target).sequence_parallel,
            ),
        ),
        model=replace(
            _fill_resolution(model, folder, architecture),
            patch_dim=getattr(vision, "patch_dim", None),
            class_token_len=getattr(vision, "class_token_len", None),
            pixel_shuffle=getattr(vision, "pixel_shuffle", None),
            fp32=not (model.bf16 or model.fp16),
        ),
        training=replace(
            training,
            global_batch_size=_or(
                training.global_batch_size, default=training.micro_batch_size * layout.num_lanes
            ),
            length=length,
            schedule=fill_schedule(training.schedule, length),
        ),
    )


def _data(
    config: TrainConfig, architecture: ModelConfig, freeze: Frozen, folder: Folder | None
) -> DataConfig:
    """Settings of the data, from a filled config."""
    model, training = config.model, config.training
    return DataConfig(
        **{field.name: getattr(config.data, field.name) for field in fields(SourceConfig)},
        seed=training.seed,
        seq_length=model.seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=_given(training.global_batch_size),
        inputs=_inputs(config, architecture, freeze, folder),
        prompt_format=model.tokenizer_prompt_format,
    )


def _inputs(
    config: TrainConfig, architecture: ModelConfig, frozen: Frozen, folder: Folder | None
) -> Inputs:
    """Kinds of items of each source, from a filled config."""
    model = config.model
    settings = {
        "dynamic_resolution": model.dynamic_resolution,
        "grid_rule": _or(model.dynamic_resolution_rule, default=_IMAGES.grid_rule),
        "min_patches": _or(model.dynamic_resolution_min_patches, default=_IMAGES.min_patches),
        "max_patches": _or(model.dynamic_resolution_max_patches, default=_IMAGES.max_patches),
        "img_h": _or(model.img_h, default=_IMAGES.img_h),
        "img_w": _or(model.img_w, default=_IMAGES.img_w),
        "use_tiling": model.use_tiling,
        "max_num_tiles": model.max_num_tiles,
        "use_thumbnail": model.use_thumbnail,
        "placeholder": model.image_token,
        "tag_type": model.image_tag_type,
        "mock_rows": config.data.mock_image_rows,
        "videos": _videos(model, folder),
        "audio": folder.audio if isinstance(folder, OmniConfig) else None,
    }
    words = Counter(source_adapter(each).takes(each) for each in architecture.sources.values())
    inputs: dict[str, ItemInput] = {}
    for name, source in architecture.sources.items():
        adapter, left_out = source_adapter(source), architecture.frozen_in(name, frozen)
        # Several modules of one kind need a token each, and a field each in stored samples.
        several = words[adapter.takes(source)] > 1
        own = {"placeholder": f"<{name}>", "noun": name, "several": True} if several else {}
        of_module: dict[str, Any] = settings | own
        inputs[name] = adapter.item_input(source, name=name, frozen=left_out, **of_module)
        inputs |= adapter.guest_inputs(source, name=name, frozen=left_out, **of_module)
    check_inputs(inputs)
    return inputs


def _videos(model: ModelSection, folder: Folder | None) -> VideoConfig:
    """How a video becomes frames, from the folder and the flags over it."""
    found = folder.videos if isinstance(folder, OmniConfig) else None
    given = {
        "fps": model.video_fps,
        "num_frames": model.video_num_frames,
        "max_frames": model.video_max_frames,
        "target_patches": model.video_target_num_patches,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if model.video_fps and model.video_num_frames:
        raise ValueError(
            f"--video-fps {model.video_fps} with --video-num-frames {model.video_num_frames}: each "
            f"decides how many frames are sampled; give one of them"
        )
    # Either rule replaces that of the folder.
    if model.video_fps:
        changes["num_frames"] = 0
    if model.video_num_frames:
        changes["fps"] = 0.0
    return replace(found or VideoConfig(), **changes)


def _fill_resolution(
    model: ModelSection, folder: Folder | None, architecture: ModelConfig
) -> ModelSection:
    if not model.dynamic_resolution or isinstance(folder, HfFolder):
        return model  # The processor of such a folder has its own sizes.
    # Images of a model that transformers has are seen as its processor there sees them.
    rule: GridRule = "nemotron-omni" if is_hybrid(architecture) else _IMAGES.grid_rule
    least, most = _IMAGES.min_patches, _IMAGES.max_patches
    if isinstance(folder, OmniConfig):
        least, most = folder.min_patches, folder.max_patches
    return replace(
        model,
        dynamic_resolution_min_patches=_or(model.dynamic_resolution_min_patches, default=least),
        dynamic_resolution_max_patches=_or(model.dynamic_resolution_max_patches, default=most),
        dynamic_resolution_rule=_or(model.dynamic_resolution_rule, default=rule),
    )


def _or[T](value: T | None, *, default: T) -> T:
    return default if value is None else value


def _given[T](value: T | None) -> T:
    assert value is not None
    return value
