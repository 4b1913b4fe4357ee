"""Everything that a training run is told: one field per flag.

A field's name is its flag and its YAML key, its type the check, its documentation the help text.
Relations between fields are checked in `resolve.resolve`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import DisallowNone, FlagCreatePairsOff, UseAppendAction, arg

# The names in `presets.PROVIDERS`, which would load torch.
Preset = Literal["mock", "nemotron-moe-vlm-tiny", "nemotron-moe-vlm-20l", "nemotron-moe-vlm-54l"]
# A switch that is off unless named; without a --no- twin.
Switch = FlagCreatePairsOff[bool]
# These may be left out; their documentation says what then holds.
Choice = Annotated[DisallowNone[bool | None], arg(help_behavior_hint="")]
Number = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
Minutes = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
Folder = Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")]
File = Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSection:
    """Ranks of each module. The grids are disjoint and cover every rank, or span the same ranks.

    Attributes:
        encoder_offset: First rank of the encoder grid; left out: 0.
        encoder_tp: Tensor-parallel size of the encoder, ranks.
        encoder_cp: Context-parallel size of the encoder, ranks.
        encoder_pp: Pipeline stages of the encoder.
        encoder_dp: Data-parallel replicas of the encoder.
        encoder_ep: Expert-parallel size of the encoder, ranks.
        encoder_expt_tp: Tensor-parallel size inside an expert of the encoder, ranks.
        llm_offset: First rank of the language-model grid; left out: behind the encoder grid, or 0
            in a run of one rank.
        llm_tp: Tensor-parallel size of the language model, ranks.
        llm_cp: Context-parallel size of the language model, ranks.
        llm_pp: Pipeline stages of the language model.
        llm_dp: Data-parallel replicas of the language model; each is a lane.
        llm_ep: Expert-parallel size of the language model, ranks.
        llm_expt_tp: Tensor-parallel size inside an expert of the language model, ranks.
        llm_only: Train the language model alone; image tokens are tokens like others.
        sequence_parallel: Shard the language model's activations along the sequence between
            tensor-parallel regions; left out: on when --llm-tp is above 1.
        encoder_run_ahead: Microbatches that the encoder may be ahead of the language model, so that
            it works while the language model does.
        check_bridge: Send sample keys and checksums with all rows and gradients, and stop where
            both ends disagree; slow, for finding faults.
    """

    encoder_offset: Number = None
    encoder_tp: int = 1
    encoder_cp: int = 1
    encoder_pp: int = 1
    encoder_dp: int = 1
    encoder_ep: int = 1
    encoder_expt_tp: int = 1
    llm_offset: Number = None
    llm_tp: int = 1
    llm_cp: int = 1
    llm_pp: int = 1
    llm_dp: int = 1
    llm_ep: int = 1
    llm_expt_tp: int = 1
    llm_only: Switch = False
    sequence_parallel: Choice = None
    encoder_run_ahead: int = 1
    check_bridge: Switch = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """What is trained, how images become patches, and in which precision.

    Attributes:
        model_provider: Preset that fixes the architecture; hf reads it from --load-hf.
        model_config: YAML file of an architecture: sections vision, projector and language, whose
            fields replace the preset's.
        override: Change one field of the preset, as in language.num_layers=4.
        training_stage: stage1 trains the projector only, stage2 all but the vision encoder, stage3
            everything.
        freeze_vit: Freeze the vision encoder, whatever the stage.
        freeze_lm: Freeze the language model, whatever the stage.
        freeze_projection: Freeze the projector, whatever the stage.
        tokenizer_model: Folder of a Hugging Face tokenizer; left out: the built-in byte tokenizer.
        tokenizer_prompt_format: How a conversation is written out: "plain" gives each prompt a
            line and each answer an end of sequence, "chat" uses the tokenizer's own template,
            "nemotron6-moe" sets each turn between <|im_start|> and <|im_end|>; left out: chat where
            the tokenizer has a template, else plain.
        image_token: Placeholder of an image in texts, and the token at which its rows go.
        image_tag_type: "internvl" writes <img> and </img> around each image; left out: nothing.
        seq_length: Tokens of a sequence.
        dynamic_resolution: Keep images near their native size and aspect ratio; off, every image is
            resized to --img-h x --img-w.
        dynamic_resolution_min_patches: An image with fewer patches is enlarged; left out: 4, or
            what the folder of --load-hf says.
        dynamic_resolution_max_patches: An image with more patches is shrunk, 0 is uncapped; left
            out: 256, or what the folder of --load-hf says.
        img_h: Height of an image, or a tile, without dynamic resolution; pixels.
        img_w: Width of an image, or a tile, without dynamic resolution; pixels.
        use_tiling: Cut an image into tiles of --img-h x --img-w, in the layout nearest to its
            shape; without dynamic resolution.
        max_num_tiles: Tiles of an image, at most.
        use_thumbnail: Add the whole image as one more tile, where there are several.
        patch_dim: Side of a square patch, pixels; left out: the preset's.
        class_token_len: Class tokens in front of an image's patches; left out: the preset's.
        pixel_shuffle: Merge each 2 x 2 square of patches into one row; left out: as in the preset.
        moe_router_force_load_balancing: Send tokens to experts at random, evenly; for benchmarks
            from random weights.
        moe_grouped_gemm: Compute all experts of a rank in one grouped product; left out: where
            Transformer Engine is present.
        recompute_granularity: Recompute activations of the language model in backward: of whole
            layers, or of the parts that --recompute-modules names; left out: keep them all.
        recompute_modules: Part of a layer that is recomputed with --recompute-granularity
            selective; left out: core_attn.
        bf16: Parameters, activations and rows in bfloat16.
        fp16: Parameters, activations and rows in float16, with scaled losses.
        fp32: Parameters, activations and rows in float32, as without --bf16 and --fp16.
        loss_scale: Fixed scale of the loss in float16; left out: it adapts.
        initial_loss_scale: First scale of the loss in float16.
        min_loss_scale: Least scale of the loss in float16.
        loss_scale_window: Updates in a row after which the scale doubles.
        hysteresis: Updates with gradients that are not finite after which the scale halves.
        init: Initial weights: "megatron" draws from each rank's random stream,
            "topology-invariant" draws each parameter from (seed, name), whatever the layout.
    """

    model_provider: Literal[Preset, "hf"] = "mock"
    model_config: File = None
    override: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SECTION.FIELD=VALUE")] = ()
    training_stage: Literal["stage1", "stage2", "stage3"] = "stage3"
    freeze_vit: Switch = False
    freeze_lm: Switch = False
    freeze_projection: Switch = False
    tokenizer_model: Folder = None
    tokenizer_prompt_format: Annotated[
        DisallowNone[Literal["plain", "chat", "nemotron6-moe"] | None], arg(help_behavior_hint="")
    ] = None
    image_token: str = "<image>"
    image_tag_type: Annotated[
        DisallowNone[Literal["internvl"] | None], arg(help_behavior_hint="")
    ] = None
    seq_length: int = 64
    dynamic_resolution: bool = True
    dynamic_resolution_min_patches: Number = None
    dynamic_resolution_max_patches: Number = None
    img_h: Number = None
    img_w: Number = None
    use_tiling: Switch = False
    max_num_tiles: int = 1
    use_thumbnail: Switch = False
    patch_dim: Number = None
    class_token_len: Number = None
    pixel_shuffle: Choice = None
    moe_router_force_load_balancing: Switch = False
    moe_grouped_gemm: Choice = None
    recompute_granularity: Annotated[
        DisallowNone[Literal["full", "selective"] | None], arg(help_behavior_hint="")
    ] = None
    recompute_modules: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PART")] = ()
    bf16: Switch = False
    fp16: Switch = False
    fp32: Switch = False
    loss_scale: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2
    init: Literal["megatron", "topology-invariant"] = "megatron"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """Where samples come from.

    Attributes:
        dataset_provider: "mock" makes samples up, "energon" reads a dataset from --data-path.
        data_path: Energon dataset folder, JSON Lines file, or metadataset YAML.
        num_workers: Energon: workers per lane, which share its samples; 0 is one, which reads in
            the training process.
        loader_processes: Energon: processes per rank that do the work of its lanes' workers; any
            number gives the same samples; left out: as many as the rank has cores, less one.
        shuffle_buffer_size: Energon: samples among which the next training sample is drawn; left
            out: 1000.
        packing_buffer_size: Energon: put several samples into each sequence, chosen from so many;
            left out: each has a sequence of its own.
        max_samples_per_sequence: Energon: training samples read from a shard in a row before
            jumping elsewhere; left out: 100.
        dataloader_save: Write where the data stands there too, with each checkpoint; without
            --save, every --save-interval iterations and at the end.
        dataloader_load: Folder that --dataloader-save, or --save, has written: the data goes on
            where it says, whatever --load says. The newest, or that of the iteration that --load
            goes on from if it is there; a folder within, as in DIR/iter_0000100, chooses.
        max_bad_sample_fraction: Part of a lane's samples that may be broken, too long or without an
            answer, 0 to 1; more stop the run.
        validate_data_alignment: Check each step that both grids read the same samples.
        sample_trace_dir: Write the sample keys of every step there, one file per rank.
        mock_dataset_size: Distinct mock samples, then they repeat; left out: 1000000.
        image_seq_length: Rows, and so image tokens, of every mock image; left out: any number.
        text_only_fraction: Part of the mock samples that has no image, 0 to 1.
    """

    dataset_provider: Literal["mock", "energon"] = "mock"
    data_path: File = None
    num_workers: int = 0
    loader_processes: Number = None
    shuffle_buffer_size: Number = None
    packing_buffer_size: Number = None
    max_samples_per_sequence: Number = None
    dataloader_save: Folder = None
    dataloader_load: Folder = None
    max_bad_sample_fraction: float = 0.05
    validate_data_alignment: bool = True
    sample_trace_dir: Folder = None
    mock_dataset_size: Number = None
    image_seq_length: Number = None
    text_only_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """How long and how fast to train, and when to evaluate.

    Attributes:
        micro_batch_size: Samples per lane and forward.
        global_batch_size: Samples per iteration over all lanes; left out: --micro-batch-size times
            --llm-dp.
        train_iters: Iterations to train; left out, and without --train-samples: 100.
        train_samples: Samples to train on, instead of --train-iters; what does not fill a last
            global batch is left.
        seed: Of initial weights, mock samples and shuffling.
        exit_interval: Stop after the next iteration that this divides; left out: train to the end.
        exit_duration_in_mins: Save and stop after the iteration in which so many minutes are over.
        exit_signal_handler: Save and stop after the iteration in which a rank gets SIGTERM or
            SIGUSR1; a second signal ends it at once.
        lr: Peak learning rate.
        min_lr: Floor of the learning rate; a constant schedule has none.
        lr_decay_style: Course of the learning rate after the warm-up. WSD stays at the peak until
            its tail; inverse-square-root falls from where the warm-up ends.
        lr_warmup_iters: Iterations of linear warm-up from 0; left out: none.
        lr_warmup_samples: The same in samples.
        lr_decay_iters: Iterations, warm-up included, after which the learning rate stays at the
            floor; left out: as long as training. A constant schedule has no floor.
        lr_decay_samples: The same in samples.
        lr_wsd_decay_iters: Iterations of WSD's tail, the last ones of the decay.
        lr_wsd_decay_samples: The same in samples.
        lr_wsd_decay_style: Course of WSD's tail; left out: exponential.
        weight_decay: Decoupled weight decay of matrices; vectors have none.
        adam_beta1: Decay of Adam's first moment.
        adam_beta2: Decay of Adam's second moment.
        adam_eps: Added to the root of Adam's second moment.
        clip_grad: Largest global gradient norm; 0 turns clipping off.
        correct_encoder_grad_for_partial_participation: Scale the encoder's gradients by its
            data-parallel ranks over those with an image in the global batch. Without, they are
            exact already: sums over tokens, divided once.
        overlap_grad_reduce: Reduce gradients of the language model while its backward still runs.
        overlap_param_gather: Gather its updated weights while its next forward already runs.
        ddp_num_buckets: Buckets that its gradients are reduced in, with --overlap-grad-reduce.
        ddp_bucket_size: Least size of such a bucket, in weights; left out: 40 million, or a million
            for each data-parallel rank.
        ddp_pad_buckets_for_high_nccl_busbw: Pad those buckets to sizes at which NCCL is fastest.
        log_num_zeros_in_grad: Count the zeros in the gradients, and log them.
        eval_interval: Iterations between evaluations on the val split, and one at the end; 0
            evaluates never.
        eval_iters: Global batches per evaluation.
    """

    micro_batch_size: int = 1
    global_batch_size: Number = None
    train_iters: Number = None
    train_samples: Number = None
    seed: int = 1234
    exit_interval: Number = None
    exit_duration_in_mins: Minutes = None
    exit_signal_handler: bool = True
    lr: float = 1e-4
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    lr_warmup_iters: Number = None
    lr_warmup_samples: Number = None
    lr_decay_iters: Number = None
    lr_decay_samples: Number = None
    lr_wsd_decay_iters: Number = None
    lr_wsd_decay_samples: Number = None
    lr_wsd_decay_style: Annotated[
        DisallowNone[Literal["linear", "cosine", "exponential", "minus_sqrt"] | None],
        arg(help_behavior_hint=""),
    ] = None
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    correct_encoder_grad_for_partial_participation: Switch = False
    overlap_grad_reduce: Switch = False
    overlap_param_gather: Switch = False
    ddp_num_buckets: Number = None
    ddp_bucket_size: Number = None
    ddp_pad_buckets_for_high_nccl_busbw: Switch = False
    log_num_zeros_in_grad: Switch = False
    eval_interval: int = 0
    eval_iters: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """What is saved, and what a run begins with.

    Attributes:
        save: Folder of the checkpoints to write; one is written at the end in any case. Without
            --tensorboard-dir, metrics.jsonl goes there too.
        save_interval: Iterations between checkpoints, or what --dataloader-save writes; left out:
            only at the end.
        load: Folder of checkpoints to go on from, the newest first; one without any starts anew.
        load_hf: Folder of a nemotron_h_omni model to begin with; what --load finds wins.
        load_nemotron_checkpoint: Megatron checkpoint of a Nemotron vision-language model whose
            weights to begin with, its root or one iteration's folder; what --load finds wins.
        load_vision_from: Megatron checkpoint whose vision encoder to begin with, its root or one
            iteration's folder; what --load finds wins.
        finetune: Load the weights alone and begin at iteration 0.
        no_save_optim: Leave the optimizer's state out.
        no_load_optim: Begin with a fresh optimizer.
        no_load_scheduler: Begin the schedule anew.
        no_save_rng: Leave the states of random generators out.
        no_load_rng: Seed the random generators anew.
        dist_ckpt_optim_fully_reshardable: Save the optimizer's state so that any layout can load
            it; it always is.
        async_save: Train on while a checkpoint is written.
        keep_last: Checkpoints to keep, the newest, and as many of --dataloader-save; left out: all.
    """

    save: Folder = None
    save_interval: Number = None
    load: Folder = None
    load_hf: Folder = None
    load_nemotron_checkpoint: Folder = None
    load_vision_from: Folder = None
    finetune: Switch = False
    no_save_optim: Switch = False
    no_load_optim: Switch = False
    no_load_scheduler: Switch = False
    no_save_rng: Switch = False
    no_load_rng: Switch = False
    dist_ckpt_optim_fully_reshardable: Switch = False
    async_save: Switch = False
    keep_last: Number = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchingSection:
    """What a run shows of itself.

    Attributes:
        log_interval: Iterations per log line.
        tensorboard_dir: Folder for TensorBoard's event files and metrics.jsonl.
        save_activations: Save the projector's output, the combined embeddings and the logits of one
            iteration there, for `megatron-mimo parity --tensors`.
        save_activations_step: That iteration; left out: the first of the run.
        timeline_profile: Write what ranks do in some iterations as Chrome traces, which Perfetto
            opens.
        timeline_dir: Folder of the traces; left out: timeline in --tensorboard-dir.
        timeline_ranks: Ranks that --timeline-profile traces: dp-replica (lane 0 and the encoder
            ranks that serve it), all, or a list such as 0,4-7.
        profile: Write a trace of torch's profiler in the same iterations, beside those.
        profile_step_start: First iteration to trace.
        profile_step_end: Iteration after the last one to trace.
        profile_ranks: Ranks that --profile traces, as for --timeline-ranks.
        peak_tflops: What a GPU can do at most, dense TFLOP/s, for the utilisation (MFU); left out:
            by the name of the GPU, for 16-bit training.
    """

    log_interval: int = 10
    tensorboard_dir: Folder = None
    save_activations: Folder = None
    save_activations_step: Number = None
    timeline_profile: Switch = False
    timeline_dir: Folder = None
    timeline_ranks: Annotated[str, arg(metavar="{dp-replica,all,LIST}")] = "dp-replica"
    profile: Switch = False
    profile_step_start: int = 10
    profile_step_end: int = 12
    profile_ranks: Annotated[str, arg(metavar="{dp-replica,all,LIST}")] = "0"
    peak_tflops: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSection:
    """Where a run runs.

    Attributes:
        device: What ranks compute on; auto takes cuda where there is one.
        distributed_timeout_minutes: Longest wait of a collective operation, minutes.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    distributed_timeout_minutes: float = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Every flag of a training run, by section of the help text.

    Attributes:
        grids: Ranks of each module.
        model: What is trained.
        data: Where samples come from.
        training: How long and how fast.
        checkpoints: What is saved, and what the run begins with.
        watching: What the run shows of itself.
        runtime: Where it runs.
    """

    grids: GridSection = field(default_factory=GridSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    checkpoints: CheckpointSection = field(default_factory=CheckpointSection)
    watching: WatchingSection = field(default_factory=WatchingSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
