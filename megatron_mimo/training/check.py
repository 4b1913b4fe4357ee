"""What can be said of flags by themselves: ranges, and flags that would do nothing together."""

import os

from megatron_mimo.training.config import (
    CheckpointSection,
    DataSection,
    GridSection,
    ModelSection,
    RuntimeSection,
    TrainConfig,
    TrainingSection,
    WatchingSection,
)


def check(config: TrainConfig) -> None:
    """Refuse values out of range, and flags that contradict each other.

    What a part checks in its own settings is left to it.

    Args:
        config: Flags as given.

    Raises:
        ValueError: Names the flags.
    """
    _check_numbers(config.grids, config.training, config.watching, config.runtime)
    _check_watching(config.watching)
    _check_schedule(config.training)
    _check_loss_scale(config.model)
    _check_images(config.model)
    _check_prompt(config.model)
    _check_data_source(config.data)
    _check_sequence_parallel(config.grids)
    _check_checkpoints(config.checkpoints, config.data.dataloader_save)
    _check_first_weights(config.checkpoints, llm_only=config.grids.llm_only)
    _check_reduction(config.training)


def _check_loss_scale(model: ModelSection) -> None:
    """Flags of a loss scale without float16 would do nothing."""
    defaults = ModelSection()
    scales = {
        "--loss-scale": ("loss_scale", model.loss_scale),
        "--initial-loss-scale": ("initial_loss_scale", model.initial_loss_scale),
        "--min-loss-scale": ("min_loss_scale", model.min_loss_scale),
        "--loss-scale-window": ("loss_scale_window", model.loss_scale_window),
        "--hysteresis": ("hysteresis", model.hysteresis),
    }
    for flag, (name, value) in scales.items():
        if value != getattr(defaults, name) and not model.fp16:
            raise ValueError(f"{flag} {value} without --fp16: add it, or leave {flag} out")
        if value is not None and not value > 0:
            raise ValueError(f"{flag} is {value}: expected more than 0")
    if model.min_loss_scale > model.initial_loss_scale:
        raise ValueError(
            f"--min-loss-scale {model.min_loss_scale} is above --initial-loss-scale "
            f"{model.initial_loss_scale}: expected at most the first scale"
        )


def _check_images(model: ModelSection) -> None:
    """Flags of the other way to size images would do nothing."""
    sides = {"--img-h": model.img_h, "--img-w": model.img_w}
    bounds = {
        "--dynamic-resolution-min-patches": model.dynamic_resolution_min_patches,
        "--dynamic-resolution-max-patches": model.dynamic_resolution_max_patches,
    }
    if model.dynamic_resolution:
        given = [flag for flag, value in sides.items() if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} size images only without dynamic resolution: add "
                f"--no-dynamic-resolution, or leave them out"
            )
        return
    missing = [flag for flag, value in sides.items() if value is None]
    if missing:
        raise ValueError(f"--no-dynamic-resolution needs {' and '.join(missing)}, in pixels")
    given = [flag for flag, value in bounds.items() if value is not None]
    if given:
        raise ValueError(
            f"{' and '.join(given)} bound images only with dynamic resolution: leave out either "
            f"them or --no-dynamic-resolution"
        )


def _check_prompt(model: ModelSection) -> None:
    """Formats that the built-in tokenizer cannot write."""
    chosen = model.tokenizer_prompt_format
    if chosen in ("chat", "nemotron6-moe") and model.tokenizer_model is None:
        raise ValueError(
            f"--tokenizer-prompt-format {chosen} needs --tokenizer-model: the built-in byte "
            f"tokenizer has neither a chat template nor tokens for turns; add it, or choose plain"
        )


def _check_data_source(data: DataSection) -> None:
    """Flags of the other provider would do nothing."""
    for provider, flags in (
        (
            "mock",
            {
                "--mock-dataset-size": data.mock_dataset_size is not None,
                "--text-only-fraction": data.text_only_fraction != 0,
                "--image-seq-length": data.image_seq_length is not None,
            },
        ),
        (
            "energon",
            {
                "--data-path": data.data_path is not None,
                "--num-workers": data.num_workers != 0,
                "--loader-processes": data.loader_processes is not None,
                "--shuffle-buffer-size": data.shuffle_buffer_size is not None,
                "--packing-buffer-size": data.packing_buffer_size is not None,
                "--max-samples-per-sequence": data.max_samples_per_sequence is not None,
                "--max-bad-sample-fraction": (
                    data.max_bad_sample_fraction != DataSection().max_bad_sample_fraction
                ),
            },
        ),
    ):
        given = [flag for flag, is_given in flags.items() if is_given]
        if given and data.dataset_provider != provider:
            raise ValueError(
                f"{' and '.join(given)} belongs to --dataset-provider {provider}, not to "
                f"{data.dataset_provider}: leave it out, or change the provider"
            )


def _check_reduction(training: TrainingSection) -> None:
    """Flags about overlapping without it, and two sizes of buckets."""
    sizes = {
        "--ddp-num-buckets": training.ddp_num_buckets,
        "--ddp-bucket-size": training.ddp_bucket_size,
    }
    given = [flag for flag, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected one of them")
    for flag in given:
        if sizes[flag] < 1:  # type: ignore[operator]
            raise ValueError(f"{flag} is {sizes[flag]}: expected at least 1")
    for flag, is_given in (
        ("--overlap-param-gather", training.overlap_param_gather),
        (
            "--ddp-pad-buckets-for-high-nccl-busbw",
            training.ddp_pad_buckets_for_high_nccl_busbw,
        ),
        *((flag, True) for flag in given),
    ):
        if is_given and not training.overlap_grad_reduce:
            raise ValueError(f"{flag} without --overlap-grad-reduce: add it")


def _check_checkpoints(checkpoints: CheckpointSection, readers: str | None) -> None:
    """Flags of saving without --save, and of loading without --load, would do nothing."""
    for flag, least in (
        ("--save-interval", checkpoints.save_interval),
        ("--keep-last", checkpoints.keep_last),
    ):
        if least is not None and least < 1:
            raise ValueError(f"{flag} is {least}: expected at least 1")
    if readers is not None and checkpoints.save is not None:
        if os.path.abspath(readers) == os.path.abspath(checkpoints.save):
            raise ValueError(
                f"--dataloader-save {readers} is the folder of --save, whose checkpoints say where "
                f"the data stands anyway: name another folder, or leave it out"
            )
    for needed, path, flags in (
        (
            "--save or --dataloader-save",
            checkpoints.save or readers,
            {
                "--save-interval": checkpoints.save_interval is not None,
                "--keep-last": checkpoints.keep_last is not None,
            },
        ),
        (
            "--save",
            checkpoints.save,
            {
                "--no-save-optim": checkpoints.no_save_optim,
                "--no-save-rng": checkpoints.no_save_rng,
                "--async-save": checkpoints.async_save,
            },
        ),
        (
            "--load",
            checkpoints.load,
            {
                "--finetune": checkpoints.finetune,
                "--no-load-optim": checkpoints.no_load_optim,
                "--no-load-scheduler": checkpoints.no_load_scheduler,
                "--no-load-rng": checkpoints.no_load_rng,
            },
        ),
    ):
        given = [flag for flag, is_given in flags.items() if is_given]
        if given and path is None:
            raise ValueError(f"{' and '.join(given)} without {needed}: add it")


def _check_first_weights(checkpoints: CheckpointSection, *, llm_only: bool) -> None:
    """A run begins with the weights of one place, and with a vision encoder if it has one."""
    given = [
        f"{flag} {path}"
        for flag, path in (
            ("--load-hf", checkpoints.load_hf),
            ("--load-nemotron-checkpoint", checkpoints.load_nemotron_checkpoint),
            ("--load-vision-from", checkpoints.load_vision_from),
        )
        if path is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected at most one of them")
    if llm_only and checkpoints.load_vision_from is not None:
        raise ValueError(f"{given[0]} with --llm-only, which has no vision encoder: leave one out")


def _check_sequence_parallel(grid: GridSection) -> None:
    if grid.sequence_parallel and grid.llm_tp == 1:
        raise ValueError(
            "--sequence-parallel shards along --llm-tp, which is 1: raise --llm-tp, or leave it out"
        )


def _check_numbers(
    grids: GridSection,
    training: TrainingSection,
    watching: WatchingSection,
    runtime: RuntimeSection,
) -> None:
    least: dict[str, tuple[float | None, float]] = {
        "--encoder-run-ahead": (grids.encoder_run_ahead, 0),
        "--train-iters": (training.train_iters, 1),
        "--train-samples": (training.train_samples, 1),
        "--exit-interval": (training.exit_interval, 1),
        "--exit-duration-in-mins": (training.exit_duration_in_mins, 0),
        "--lr": (training.lr, 0),
        "--min-lr": (training.min_lr, 0),
        "--lr-warmup-iters": (training.lr_warmup_iters, 0),
        "--lr-warmup-samples": (training.lr_warmup_samples, 0),
        "--lr-decay-iters": (training.lr_decay_iters, 1),
        "--lr-decay-samples": (training.lr_decay_samples, 1),
        "--lr-wsd-decay-iters": (training.lr_wsd_decay_iters, 1),
        "--lr-wsd-decay-samples": (training.lr_wsd_decay_samples, 1),
        "--weight-decay": (training.weight_decay, 0),
        "--clip-grad": (training.clip_grad, 0),
        "--eval-interval": (training.eval_interval, 0),
        "--eval-iters": (training.eval_iters, 1),
        "--log-interval": (watching.log_interval, 1),
        "--save-activations-step": (watching.save_activations_step, 1),
        "--profile-step-start": (watching.profile_step_start, 1),
    }
    for flag, (value, lowest) in least.items():
        # Not below: nan is refused too.
        if value is not None and not value >= lowest:
            raise ValueError(f"{flag} is {value}: expected at least {lowest}")
    for flag, beta in (
        ("--adam-beta1", training.adam_beta1),
        ("--adam-beta2", training.adam_beta2),
    ):
        if not 0 <= beta < 1:
            raise ValueError(f"{flag} is {beta}: expected 0 or more, and below 1")
    for flag, value in (
        ("--adam-eps", training.adam_eps),
        ("--peak-tflops", 1.0 if watching.peak_tflops is None else watching.peak_tflops),
        ("--distributed-timeout-minutes", runtime.distributed_timeout_minutes),
    ):
        if not value > 0:
            raise ValueError(f"{flag} is {value}: expected more than 0")


def _check_watching(watching: WatchingSection) -> None:
    """Steps without an end, and flags of what is off."""
    if watching.save_activations_step is not None and watching.save_activations is None:
        raise ValueError(
            f"--save-activations-step {watching.save_activations_step} without --save-activations: "
            f"add the folder, or leave it out"
        )
    if watching.profile_step_end <= watching.profile_step_start:
        raise ValueError(
            f"--profile-step-end {watching.profile_step_end} is the iteration after the last one "
            f"to trace: expected more than --profile-step-start {watching.profile_step_start}"
        )
    defaults = WatchingSection()
    for switch, is_on, names in (
        ("--timeline-profile", watching.timeline_profile, ("timeline_ranks",)),
        ("--profile", watching.profile, ("profile_ranks",)),
        (
            "--timeline-profile or --profile",
            watching.timeline_profile or watching.profile,
            ("timeline_dir", "profile_step_start", "profile_step_end"),
        ),
        ("--tensorboard-dir", watching.tensorboard_dir is not None, ("peak_tflops",)),
    ):
        for name in names:
            value = getattr(watching, name)
            if value != getattr(defaults, name) and not is_on:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {value} without {switch}: add it, or leave {flag} out")


def _check_schedule(training: TrainingSection) -> None:
    """What each style needs; lengths are compared where they are known in samples."""
    if training.min_lr > training.lr:
        raise ValueError(
            f"--min-lr {training.min_lr} is above --lr {training.lr}: expected at most the peak"
        )
    style = training.lr_decay_style
    tail = {
        "--lr-wsd-decay-iters": training.lr_wsd_decay_iters,
        "--lr-wsd-decay-samples": training.lr_wsd_decay_samples,
        "--lr-wsd-decay-style": training.lr_wsd_decay_style,
    }
    given = [flag for flag, value in tail.items() if value is not None]
    if given and style != "WSD":
        raise ValueError(
            f"{' and '.join(given)} without --lr-decay-style WSD (now {style}), which alone has a "
            f"tail: add it, or leave the tail out"
        )
    lengths = (training.lr_wsd_decay_iters, training.lr_wsd_decay_samples)
    if style == "WSD" and lengths == (None, None):
        raise ValueError(
            "--lr-decay-style WSD without the length of its tail: add --lr-wsd-decay-iters or "
            "--lr-wsd-decay-samples"
        )
    if style == "inverse-square-root" and not (
        training.lr_warmup_iters or training.lr_warmup_samples
    ):
        raise ValueError(
            "--lr-decay-style inverse-square-root without a warm-up, from whose end it falls: add "
            "--lr-warmup-iters or --lr-warmup-samples"
        )
