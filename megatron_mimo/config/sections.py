"""Every flag of a training run, by section of the help text.

Each part of the run declares its flags in a separate config; a section combines configs of parts.
Flags that a section declares itself are used by several parts, which get them from
`resolve.resolve`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import DisallowNone, UseAppendAction, arg

from megatron_mimo.checkpoint.config import (
    FirstWeightsConfig,
    LoadConfig,
    ReaderConfig,
    SaveConfig,
)
from megatron_mimo.config.loop_config import EvaluationConfig, LengthConfig, StopConfig
from megatron_mimo.config.watch_config import WatchConfig
from megatron_mimo.data.source import SourceConfig
from megatron_mimo.model.reduce import ReduceConfig
from megatron_mimo.modules.lora.config import LoraConfig
from megatron_mimo.optim.config import AdamConfig, LossScaleConfig, ScheduleConfig
from megatron_mimo.settings import (
    Choice,
    File,
    Folder,
    InsteadOf,
    MoreThan,
    Number,
    OnlyWith,
    Part,
    Switch,
    Within,
)
from megatron_mimo.settings.ranges import (
    MOST_BATCH,
    MOST_CLASS_TOKENS,
    MOST_PATCH,
    MOST_PIXELS,
    MOST_POSITIONS,
    MOST_RANKS,
    MOST_SEED,
    MOST_TILES,
)
from megatron_mimo.topology.spec import OFFSETS, SIZES

# The names in `presets.PROVIDERS`, which would load torch; --custom-import may bring others.
_PRESETS = "mock,nemotron-moe-vlm-tiny,nemotron-moe-vlm-20l,nemotron-moe-vlm-54l,omni-tiny"
Preset = Annotated[str, arg(metavar=f"{{{_PRESETS},…}}")]
CustomImport = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="MODULE")]


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSection:
    """Ranks of each module. Grids may overlap in any way; together they cover every rank.

    Attributes:
        grid: Size of a module's grid along an axis, or its first rank, as in audio.tp=2 and
            audio.offset=4; axes are tp, cp, pp, dp, ep, expt-tp and offset. Grids without an offset
            follow each other, and sizes are 1 unless given. In a file also
            `grids: {audio: {tp: 2}}`.
        encoder_offset: First rank of the encoder grid; left out: 0.
        encoder_tp: Tensor-parallel size of the encoder, ranks; left out: 1.
        encoder_cp: Context-parallel size of the encoder, ranks; left out: 1.
        encoder_pp: Number of pipeline stages of the encoder; left out: 1.
        encoder_dp: Number of data-parallel replicas of the encoder; left out: 1.
        encoder_ep: Expert-parallel size of the encoder, ranks; left out: 1.
        encoder_expt_tp: Tensor-parallel size inside an expert of the encoder, ranks; left out: 1.
        llm_offset: First rank of the language-model grid; left out: the rank after the grid
            before it, or 0 in a run of one rank.
        llm_tp: Tensor-parallel size of the language model, ranks; left out: 1.
        llm_cp: Context-parallel size of the language model, ranks; left out: 1.
        llm_pp: Number of pipeline stages of the language model; left out: 1.
        llm_dp: Number of data-parallel replicas of the language model, each of which is a lane;
            left out: 1.
        llm_ep: Expert-parallel size of the language model, ranks; left out: 1.
        llm_expt_tp: Tensor-parallel size inside an expert of the language model, ranks; left
            out: 1.
        llm_only: Whether to train the language model without the other modules; placeholders are
            then tokens like others.
        sequence_parallel: Whether to shard the language model's activations along the sequence
            between tensor-parallel regions; left out: on when --llm-tp is above 1.
        encoder_run_ahead: Number of microbatches that other modules, such as the encoder, may be
            ahead of the language model, so that they compute while it does.
        encoder_dispatch: Choice of the ranks that run an item of a module that feeds the language
            model, such as an image, where the module has several data-parallel replicas: "balanced"
            gives every replica about as many operations, and moves items to it a step ahead; "lane"
            takes those that serve the item's lane.
        encoder_dispatch_group_size: Number of data-parallel replicas that follow each other and
            share out items among themselves, such as those of a node; left out: all.
        encoder_balance_window: Number of microbatches whose items are shared out together. More
            than 1 balances their sum, which pays where modules are that far ahead of the language
            model.
        check_bridge: Whether to send sample keys and checksums with all rows and gradients, and to
            stop where both ends disagree; slow, for finding faults.
    """

    grid: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="MODULE.AXIS=N")] = ()
    encoder_offset: Annotated[Number, OFFSETS] = None
    encoder_tp: Annotated[Number, SIZES] = None
    encoder_cp: Annotated[Number, SIZES] = None
    encoder_pp: Annotated[Number, SIZES] = None
    encoder_dp: Annotated[Number, SIZES] = None
    encoder_ep: Annotated[Number, SIZES] = None
    encoder_expt_tp: Annotated[Number, SIZES] = None
    llm_offset: Annotated[Number, OFFSETS] = None
    llm_tp: Annotated[Number, SIZES] = None
    llm_cp: Annotated[Number, SIZES] = None
    llm_pp: Annotated[Number, SIZES] = None
    llm_dp: Annotated[Number, SIZES] = None
    llm_ep: Annotated[Number, SIZES] = None
    llm_expt_tp: Annotated[Number, SIZES] = None
    llm_only: Switch = False
    sequence_parallel: Choice = None
    encoder_run_ahead: Annotated[int, Within(0, MOST_BATCH)] = 1
    encoder_dispatch: Literal["lane", "balanced"] = "balanced"
    encoder_dispatch_group_size: Annotated[Number, Within(1, MOST_RANKS)] = None
    encoder_balance_window: Annotated[
        int, Within(1, MOST_BATCH), OnlyWith("--encoder-dispatch balanced")
    ] = 1
    check_bridge: Switch = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Architecture and frozen parts, conversion of images to patches, and precision.

    Attributes:
        custom_import: Python module to import before the model is looked up: it may register
            families of modules, and presets.
        model_provider: Preset that fixes the architecture; hf reads it from --load-hf.
        model_config: YAML file of an architecture: sections vision, projector and language, whose
            fields replace the preset's.
        override: Change of one field of the preset, as in language.num_layers=4.
        separate_video: Whether videos have a vision encoder of their own, the module "video" on a
            grid of its own, beside that of images. Both begin with the same weights.
        training_stage: Parts to train: stage1 trains the projectors only, stage2 all but the
            encoders, stage3 all parts.
        freeze_vit: Whether to freeze the vision encoder, in any stage, with its embedding of
            videos.
        freeze_video: Whether to freeze the embedding of videos, in any stage.
        freeze_audio: Whether to freeze the audio encoder, in any stage.
        freeze_lm: Whether to freeze the language model, in any stage.
        freeze_projection: Whether to freeze the projectors, in any stage.
        freeze: Name of a part of the model to freeze, in any stage, as in --override.
        tokenizer_model: Folder of a Hugging Face tokenizer; left out: the built-in byte tokenizer.
        tokenizer_prompt_format: Format of a conversation: "plain" gives each prompt a line and each
            answer an end of sequence, "chat" uses the tokenizer's own template,
            "nemotron6-moe" sets each turn between <|im_start|> and <|im_end|>; left out: chat where
            the tokenizer has a template, else plain.
        image_token: Placeholder of an image in texts, and the token that its rows replace.
        image_tag_type: Kind of the tags around each image: "internvl" writes <img> and </img>; left
            out: no tags.
        seq_length: Number of tokens of a sequence.
        dynamic_resolution: Whether to keep images near their native size and aspect ratio; off,
            every image is resized to --img-h x --img-w.
        dynamic_resolution_min_patches: Smallest number of patches; an image with fewer is enlarged;
            left out: 4, or the value in the folder of --load-hf.
        dynamic_resolution_max_patches: Largest number of patches; an image with more is shrunk; 0
            is uncapped; left out: 256, or the value in the folder of --load-hf.
        dynamic_resolution_rule: Size and pixels of an image near its native size: "nearest" rounds
            the size to the nearest one, "nemotron-omni" resizes as transformers' processor for
            Nemotron H Omni models; left out: nemotron-omni where the language model is a hybrid,
            else nearest.
        img_h: Height of an image, or a tile, without dynamic resolution; pixels.
        img_w: Width of an image, or a tile, without dynamic resolution; pixels.
        use_tiling: Whether to cut an image into tiles of --img-h x --img-w, in the layout nearest
            to its shape; without dynamic resolution.
        max_num_tiles: Largest number of tiles of an image.
        use_thumbnail: Whether to add the whole image as one more tile, where there are several.
        video_fps: Frames a second that are sampled of a video, evenly; 0 takes every frame; left
            out: the folder's rule, else every frame.
        video_num_frames: Number of frames that are sampled of a video, evenly; left out: the
            folder's rule, else every frame.
        video_max_frames: Largest number of frames of a video, 0 for no bound; left out: the
            folder's, else no bound.
        video_target_num_patches: Number of patches that the grid of a frame is chosen near; left
            out: the folder's, else 1024.
        patch_dim: Side of a square patch, pixels; left out: the preset's.
        class_token_len: Number of class tokens before an image's patches; left out: the preset's.
        pixel_shuffle: Whether to merge each 2 x 2 square of patches into one row; left out: as in
            the preset.
        moe_router_force_load_balancing: Whether to send tokens to experts at random, evenly; for
            benchmarks from random weights.
        moe_grouped_gemm: Whether to compute all experts of a rank in one grouped product; left out:
            where Transformer Engine is present.
        recompute_granularity: Activations of the language model that backward recomputes: those of
            whole layers, or of the parts that --recompute-modules names; left out: none.
        recompute_modules: Part of a layer that is recomputed with --recompute-granularity
            selective; left out: core_attn.
        bf16: Whether parameters, activations and rows are bfloat16.
        fp16: Whether parameters, activations and rows are float16, with scaled losses.
        fp32: Whether parameters, activations and rows are float32, as without --bf16 and --fp16.
        scaling: Scale of the loss in float16.
        lora: Adapters that train in place of weights.
        init: Kind of initial weights: "megatron" draws from each rank's random stream,
            "topology-invariant" draws each parameter from (seed, name), whatever the layout.
    """

    custom_import: CustomImport = ()
    model_provider: Annotated[str, arg(metavar=f"{{{_PRESETS},hf,…}}")] = "mock"
    model_config: File = None
    override: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SECTION.FIELD=VALUE")] = ()
    separate_video: Switch = False
    training_stage: Literal["stage1", "stage2", "stage3"] = "stage3"
    freeze_vit: Switch = False
    freeze_video: Switch = False
    freeze_audio: Switch = False
    freeze_lm: Switch = False
    freeze_projection: Switch = False
    freeze: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PART")] = ()
    tokenizer_model: Folder = None
    tokenizer_prompt_format: Annotated[
        DisallowNone[Literal["plain", "chat", "nemotron6-moe"] | None], arg(help_behavior_hint="")
    ] = None
    image_token: str = "<image>"
    image_tag_type: Annotated[
        DisallowNone[Literal["internvl"] | None], arg(help_behavior_hint="")
    ] = None
    seq_length: Annotated[int, Within(2, MOST_POSITIONS)] = 64
    dynamic_resolution: bool = True
    dynamic_resolution_min_patches: Annotated[Number, Within(1, MOST_POSITIONS)] = None
    dynamic_resolution_max_patches: Annotated[Number, Within(0, MOST_POSITIONS)] = None
    dynamic_resolution_rule: Annotated[
        DisallowNone[Literal["nearest", "nemotron-omni"] | None], arg(help_behavior_hint="")
    ] = None
    img_h: Annotated[Number, Within(1, MOST_PIXELS)] = None
    img_w: Annotated[Number, Within(1, MOST_PIXELS)] = None
    use_tiling: Switch = False
    max_num_tiles: Annotated[int, Within(1, MOST_TILES)] = 1
    use_thumbnail: Switch = False
    video_fps: Annotated[DisallowNone[float | None], Within(0, 1000)] = None
    video_num_frames: Annotated[Number, Within(1, MOST_POSITIONS)] = None
    video_max_frames: Annotated[Number, Within(0, MOST_POSITIONS)] = None
    video_target_num_patches: Annotated[Number, Within(1, MOST_POSITIONS)] = None
    patch_dim: Annotated[Number, Within(1, MOST_PATCH)] = None
    class_token_len: Annotated[Number, Within(0, MOST_CLASS_TOKENS)] = None
    pixel_shuffle: Choice = None
    moe_router_force_load_balancing: Switch = False
    moe_grouped_gemm: Choice = None
    recompute_granularity: Annotated[
        DisallowNone[Literal["full", "selective"] | None], arg(help_behavior_hint="")
    ] = None
    recompute_modules: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PART")] = ()
    bf16: Switch = False
    fp16: Annotated[Switch, InsteadOf("--bf16")] = False
    fp32: Annotated[Switch, InsteadOf("--bf16", "--fp16")] = False
    scaling: Part[LossScaleConfig] = field(default_factory=LossScaleConfig)
    lora: Part[LoraConfig] = field(default_factory=LoraConfig)
    init: Literal["megatron", "topology-invariant"] = "megatron"

    @property
    def dtype(self) -> str:
        """Name of the dtype that a step computes with."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.fp16 else "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection(SourceConfig):
    """Source of the samples.

    Attributes:
        readers: Separate folders of the positions of the readers.
    """

    readers: Part[ReaderConfig] = field(default_factory=ReaderConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """Length and speed of training, and times of evaluations.

    Attributes:
        micro_batch_size: Number of samples per lane and forward.
        global_batch_size: Number of samples per iteration over all lanes; left out:
            --micro-batch-size times --llm-dp.
        length: Length of training.
        seed: Seed of initial weights, mock samples and shuffling.
        stop: Conditions that stop the run before its end.
        adam: Settings of the optimizer.
        schedule: Learning rate over the run.
        reduce: Exchange of gradients and weights between data-parallel ranks.
        evaluation: Times and length of evaluations.
    """

    micro_batch_size: Annotated[int, Within(1, MOST_BATCH)] = 1
    global_batch_size: Annotated[Number, Within(1, MOST_BATCH)] = None
    length: Part[LengthConfig] = field(default_factory=LengthConfig)
    seed: Annotated[int, Within(0, MOST_SEED)] = 1234
    stop: Part[StopConfig] = field(default_factory=StopConfig)
    adam: Part[AdamConfig] = field(default_factory=AdamConfig)
    schedule: Part[ScheduleConfig] = field(default_factory=ScheduleConfig)
    reduce: Part[ReduceConfig] = field(default_factory=ReduceConfig)
    evaluation: Part[EvaluationConfig] = field(default_factory=EvaluationConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """Saving, and the state with which a run begins.

    Attributes:
        save: Settings of saving.
        load: Checkpoint that the run continues from.
        first_weights: Sources of initial weights.
        trust_checkpoint: Whether to run code that files of a checkpoint name, as some of other
            programs do; only for files whose author you trust.
        dist_ckpt_optim_fully_reshardable: Whether to save the optimizer's state so that any layout
            can load it; it always is.
    """

    save: Part[SaveConfig] = field(default_factory=SaveConfig)
    load: Part[LoadConfig] = field(default_factory=LoadConfig)
    first_weights: Part[FirstWeightsConfig] = field(default_factory=FirstWeightsConfig)
    trust_checkpoint: Annotated[
        Switch,
        OnlyWith("--load", "--dataloader-load", "--load-nemotron-checkpoint", "--load-vision-from"),
    ] = False
    dist_ckpt_optim_fully_reshardable: Switch = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSection:
    """Devices, and waiting between ranks.

    Attributes:
        device: Kind of device that ranks compute on; auto takes cuda where there is one.
        distributed_timeout_minutes: Longest time that a collective operation waits, minutes.
        allow_missing_kernels: Run on a GPU without Transformer Engine, mamba-ssm or causal-conv1d:
            with layers of torch, which are slow.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    distributed_timeout_minutes: Annotated[float, MoreThan(0, 100_000)] = 10.0
    allow_missing_kernels: Switch = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Every flag of a training run, by section of the help text.

    Attributes:
        grids: Ranks of each module.
        model: Architecture, images and precision.
        data: Source of the samples.
        training: Length and speed of training.
        checkpoints: Saving, and the state with which the run begins.
        watching: Logging and tracing.
        runtime: Devices, and waiting between ranks.
    """

    grids: GridSection = field(default_factory=GridSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    checkpoints: CheckpointSection = field(default_factory=CheckpointSection)
    watching: WatchConfig = field(default_factory=WatchConfig)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
