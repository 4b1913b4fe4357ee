"""Every flag does something: each has a row, and a flag without one fails.

A row names a place in what the parts of a run are given, and flags that change what stands there.
Most places are in `Resolved`; those that begin with "run." are what `main` hands to the parts,
which here only note it. How the parts use it, their own tests say.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import Resolved, resolve
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.settings import values
from tests.unit_tests.config.test_flags import FLAGS

SMALL_HYBRID = Path(__file__).parents[3] / "examples/mimo/models/small-hybrid.yaml"
HYBRID = "--model-provider nemotron-moe-vlm-tiny"
ENERGON = "--dataset-provider energon --data-path d"
IMAGE, VIDEO = "data.inputs.encoder.config", "data.inputs.video.config"
OMNI = "--model-provider omni-tiny --seq-length 1024"
DRAWN = "--init topology-invariant"
FIXED = "--no-dynamic-resolution --img-h 16 --img-w 16"
TRACE = "--timeline-profile --timeline-dir d"
WANDB, MLFLOW = "--wandb-project p --save d", "--mlflow-experiment e"


@dataclass(frozen=True, slots=True)
class Row:
    """What shows that a flag is not ignored.

    Attributes:
        typed: The flag with a value other than its default, as typed.
        place: Where it changes something; "" where it is refused.
        base: Flags beside it; without it they may be refused.
        world_size: Ranks.
        message: Of the error that names it, where it is refused.
    """

    typed: str
    place: str = ""
    base: str = ""
    world_size: int = 1
    message: str = ""

    @property
    def flag(self) -> str:
        name = self.typed.split()[0].removeprefix("--")
        return name if name in FLAGS else name.removeprefix("no-")


# A flag whose promise holds without it, so that scripts which give it go on to work.
KEPT = {"dist-ckpt-optim-fully-reshardable"}
ROWS = (
    # grids
    Row("--grid encoder.dp=2", "layout.modules.encoder.dp", "", 3),
    Row("--encoder-offset 1", "layout.modules.encoder.offset", "--llm-offset 0", 2),
    Row("--encoder-tp 2", "layout.modules.encoder.tp", "", 3),
    Row("--encoder-cp 2", "layout.modules.encoder.cp", "", 3),
    Row("--encoder-pp 2", "layout.modules.encoder.pp", "", 3),
    Row("--encoder-dp 2", "layout.modules.encoder.dp", "", 3),
    Row("--encoder-ep 2", base="--encoder-dp 2", world_size=3, message="--encoder-ep 2: expert"),
    Row(
        *("--encoder-expt-tp 2", "", "--encoder-tp 2", 3),
        message="--encoder-expt-tp 2: expert tensor parallelism is not supported",
    ),
    Row("--llm-offset 0", "layout.target.offset", "--encoder-dp 2 --llm-dp 2", 2),
    Row("--llm-tp 2", "layout.target.tp", "", 3),
    Row("--llm-cp 2", "layout.target.cp", "", 3),
    Row("--llm-pp 2", "layout.target.pp", "", 3),
    Row("--llm-dp 2", "layout.target.dp", "", 3),
    Row("--llm-ep 2", "layout.target.ep", f"{HYBRID} --llm-dp 2", 3),
    Row("--llm-expt-tp 2", "layout.target.expt_tp", f"{HYBRID} --llm-tp 2 --llm-dp 2", 5),
    Row("--llm-only", "layout.edges"),
    Row("--no-sequence-parallel", "run.runner.build.sequence_parallel", "--llm-tp 2", 3),
    Row("--encoder-run-ahead 3", "run.runner.config.run_ahead"),
    Row("--encoder-dispatch lane", "layout.domains", "--encoder-dp 2", 3),
    Row("--encoder-dispatch-group-size 1", "layout.domains", "--encoder-dp 2 --llm-dp 2", 4),
    Row("--encoder-balance-window 2", "run.balance.window", "--encoder-dp 2", 3),
    Row("--check-bridge", "run.runner.config.check_bridge"),
    # model
    Row("--custom-import absent", message="--custom-import absent"),
    Row("--model-provider nemotron-moe-vlm-20l", "architecture.parts.language"),
    Row(f"--model-config {SMALL_HYBRID}", "architecture.parts.language.pattern", HYBRID),
    Row("--override vision.num_layers=1", "architecture.parts.vision.num_layers"),
    Row("--separate-video", "architecture.modules.encoder.video", OMNI),
    Row("--training-stage stage2", "freeze"),
    Row("--freeze-vit", "freeze"),
    Row("--freeze-video", "freeze", OMNI),
    Row("--freeze-audio", "freeze", OMNI),
    Row("--freeze-lm", "freeze"),
    Row("--freeze-projection", "freeze"),
    Row("--freeze projector", "freeze"),
    Row("--tokenizer-model d", "run.tokenizer.folder"),
    Row("--tokenizer-prompt-format plain", "data.prompt_format"),
    Row("--image-token <i>", "data.inputs.encoder.placeholder"),
    Row("--image-tag-type internvl", "data.inputs.encoder.tag_type"),
    Row("--seq-length 32", "data.seq_length"),
    Row("--no-dynamic-resolution", f"{IMAGE}.dynamic_resolution", "--img-h 16 --img-w 16"),
    Row("--dynamic-resolution-min-patches 8", f"{IMAGE}.min_patches"),
    Row("--dynamic-resolution-max-patches 0", f"{IMAGE}.max_patches"),
    Row("--dynamic-resolution-rule nearest", f"{IMAGE}.grid_rule", HYBRID),
    Row("--img-h 48", f"{IMAGE}.img_h", FIXED),
    Row("--img-w 48", f"{IMAGE}.img_w", FIXED),
    Row("--use-tiling", f"{IMAGE}.use_tiling", FIXED),
    Row("--max-num-tiles 4", f"{IMAGE}.max_num_tiles", f"{FIXED} --use-tiling"),
    Row("--use-thumbnail", f"{IMAGE}.use_thumbnail", f"{FIXED} --use-tiling --max-num-tiles 4"),
    Row("--video-fps 2", f"{VIDEO}.fps", OMNI),
    Row("--video-num-frames 4", f"{VIDEO}.num_frames", OMNI),
    Row("--video-max-frames 8", f"{VIDEO}.max_frames", OMNI),
    Row("--video-target-num-patches 16", f"{VIDEO}.target_patches", OMNI),
    Row("--patch-dim 4", "architecture.parts.vision.patch_dim"),
    Row("--class-token-len 4", "architecture.parts.vision.class_token_len"),
    Row("--no-pixel-shuffle", "architecture.parts.vision.pixel_shuffle"),
    Row(
        "--moe-router-force-load-balancing",
        "architecture.parts.language.moe_router_force_load_balancing",
        HYBRID,
    ),
    Row("--no-moe-grouped-gemm", "execution.moe_grouped_gemm", HYBRID),
    Row("--recompute-granularity full", "execution.recompute_granularity"),
    Row(
        "--recompute-modules layernorm",
        "execution.recompute_modules",
        "--recompute-granularity selective",
    ),
    Row("--bf16", "run.runner.build.params_dtype"),
    Row("--fp16", "run.runner.build.params_dtype"),
    Row("--fp32", base="--bf16", message="--bf16 and --fp32: expected one of them"),
    Row("--loss-scale 8", "adam.loss_scale.constant", "--fp16"),
    Row("--initial-loss-scale 8", "adam.loss_scale.initial", "--fp16"),
    Row("--min-loss-scale 2", "adam.loss_scale.least", "--fp16"),
    Row("--loss-scale-window 8", "adam.loss_scale.window", "--fp16"),
    Row("--hysteresis 8", "adam.loss_scale.hysteresis", "--fp16"),
    Row("--lora-rank 4", "run.runner.build.lora", DRAWN),
    Row("--lora-alpha 2", "lora.alpha", f"{DRAWN} --lora-rank 4"),
    Row("--lora-dropout 0.5", "lora.dropout", f"{DRAWN} --lora-rank 4"),
    Row("--lora-rslora", "lora.rslora", f"{DRAWN} --lora-rank 4"),
    Row("--lora-targets vision", "lora.targets", f"{DRAWN} --lora-rank 4"),
    Row("--load-lora d", "run.adapters.folder", f"{DRAWN} --lora-rank 4"),
    Row("--init topology-invariant", "run.runner.build.init"),
    # data
    Row("--dataset-provider energon", "data.provider", "--data-path d"),
    Row("--data-path e", "data.path", ENERGON),
    Row("--media-root m", "data.media_root", ENERGON),
    Row("--num-workers 2", "data.num_workers", ENERGON),
    Row("--loader-processes 2", "data.loader_processes", ENERGON),
    Row("--shuffle-buffer-size 8", "data.shuffle_buffer_size", ENERGON),
    Row("--packing-buffer-size 8", "data.packing_buffer_size", ENERGON),
    Row("--max-samples-per-sequence 8", "data.max_samples_per_sequence", ENERGON),
    Row("--max-bad-sample-fraction 0.5", "data.max_bad_sample_fraction", ENERGON),
    Row("--no-validate-data-alignment", "run.runner.config.validate_data"),
    Row("--trust-dataset-code", "data.trust_dataset_code", ENERGON),
    Row("--sample-trace-dir d", "run.trace.directory"),
    Row("--mock-dataset-size 8", "data.mock_dataset_size"),
    Row("--image-seq-length 4", "data.inputs.encoder.mock_rows"),
    Row("--text-only-fraction 0.5", "data.text_only_fraction"),
    Row("--dataloader-save d", "readers.save"),
    Row("--dataloader-load d", "readers.load"),
    # training
    Row("--micro-batch-size 2", "data.micro_batch_size"),
    Row("--global-batch-size 2", "run.loop.global_batch_size"),
    Row("--train-iters 5", "run.loop.train_iters"),
    Row("--train-samples 5", "run.loop.train_iters"),
    Row("--seed 5", "run.runner.build.seed"),
    Row("--exit-interval 5", "run.loop.stop.exit_interval"),
    Row("--exit-duration-in-mins 5", "run.leaving.minutes"),
    Row("--no-exit-signal-handler", "run.leaving.signals"),
    Row("--max-nonfinite-steps 3", "run.loop.stop.max_nonfinite_steps"),
    Row("--lr 0.5", "adam.lr"),
    Row("--min-lr 1e-6", "adam.min_lr"),
    Row("--weight-decay 0.5", "adam.weight_decay"),
    Row("--adam-beta1 0.5", "adam.beta1"),
    Row("--adam-beta2 0.5", "adam.beta2"),
    Row("--adam-eps 0.5", "adam.eps"),
    Row("--clip-grad 0.5", "adam.clip_grad"),
    Row("--log-num-zeros-in-grad", "adam.log_num_zeros"),
    Row(
        "--correct-encoder-grad-for-partial-participation",
        "run.runner.config.correct_participation",
    ),
    Row("--lr-decay-style cosine", "schedule.style"),
    Row("--lr-warmup-iters 5", "schedule.warmup_samples"),
    Row("--lr-warmup-samples 5", "schedule.warmup_samples"),
    Row("--lr-decay-iters 5", "schedule.decay_samples"),
    Row("--lr-decay-samples 5", "schedule.decay_samples"),
    Row(
        "--lr-wsd-decay-iters 5",
        "schedule.wsd_decay_samples",
        "--lr-decay-style WSD --lr-wsd-decay-iters 6",
    ),
    Row(
        "--lr-wsd-decay-samples 5",
        "schedule.wsd_decay_samples",
        "--lr-decay-style WSD --lr-wsd-decay-samples 6",
    ),
    Row(
        "--lr-wsd-decay-style linear",
        "schedule.wsd_decay_style",
        "--lr-decay-style WSD --lr-wsd-decay-iters 5",
    ),
    Row("--sharding fsdp2", message="--sharding fsdp2: only language models that run"),
    Row("--overlap-grad-reduce", "reduce.overlap_grads"),
    Row("--overlap-param-gather", "reduce.overlap_params", "--overlap-grad-reduce"),
    Row("--ddp-num-buckets 2", "reduce.num_buckets", "--overlap-grad-reduce"),
    Row("--ddp-bucket-size 2", "reduce.bucket_size", "--overlap-grad-reduce"),
    Row("--ddp-pad-buckets-for-high-nccl-busbw", "reduce.pad_buckets", "--overlap-grad-reduce"),
    Row("--eval-interval 5", "run.loop.evaluation.eval_interval"),
    Row("--eval-iters 5", "run.loop.evaluation.eval_iters"),
    # checkpoints
    Row("--save d", "save.root"),
    Row("--save-interval 5", "save.interval", "--save d"),
    Row("--no-save-optim", "save.without_optimizer", "--save d"),
    Row("--no-save-rng", "save.without_rng", "--save d"),
    Row("--async-save", "save.in_background", "--save d"),
    Row("--keep-last 5", "save.keep_last", "--save d"),
    Row("--load d", "load.root"),
    Row("--finetune", "load.finetune", "--load d"),
    Row("--no-load-optim", "load.without_optimizer", "--load d"),
    Row("--no-load-scheduler", "load.without_scheduler", "--load d"),
    Row("--no-load-rng", "load.without_rng", "--load d"),
    Row("--load-hf absent", base="--model-provider hf", message="absent"),
    Row("--load-hf-without audio", base="--load-hf absent --model-provider hf", message="absent"),
    Row("--load-nemotron-checkpoint d", "run.first_weights"),
    Row("--load-vision-from d", "run.first_weights"),
    Row("--load-base d", "run.first_weights", f"{DRAWN} --lora-rank 4"),
    Row("--trust-checkpoint", "run.first_weights", "--load-vision-from d"),
    # watching
    Row("--log-interval 5", "run.loop.log_interval"),
    Row("--tensorboard-dir d", "watch.measures"),
    Row("--save-activations d", "run.recording.folder"),
    Row("--save-activations-step 5", "run.recording.iteration", "--save-activations d"),
    Row("--timeline-profile", "watch.traces.timeline_ranks", "--profile --timeline-dir d"),
    Row("--timeline-dir e", "watch.traces.folder", TRACE),
    Row("--timeline-ranks all", "watch.traces.timeline_ranks", f"{TRACE} --llm-dp 2", 3),
    Row("--profile", "watch.traces.profile_ranks", TRACE),
    Row("--profile-step-start 5", "watch.traces.first", TRACE),
    Row("--profile-step-end 50", "watch.traces.end", TRACE),
    Row("--profile-ranks all", "watch.traces.profile_ranks", f"{TRACE} --profile --llm-dp 2", 3),
    Row("--peak-tflops 5", "watch.peak_tflops", "--tensorboard-dir d"),
    Row("--wandb-project p", "watch.services.wandb_project", "--save d"),
    Row("--wandb-exp-name n", "watch.services.wandb_exp_name", WANDB),
    Row("--wandb-entity e", "watch.services.wandb_entity", WANDB),
    Row("--wandb-save-dir e", "watch.services.wandb_save_dir", WANDB),
    Row("--mlflow-experiment e", "watch.measures"),
    Row("--mlflow-run-name n", "watch.services.mlflow_run_name", MLFLOW),
    Row("--mlflow-tracking-uri u", "watch.services.mlflow_tracking_uri", MLFLOW),
    # runtime
    Row("--device cuda", "run.initialize.device"),
    Row("--distributed-timeout-minutes 5", "run.initialize.timeout_minutes"),
    Row("--allow-missing-kernels", "run.initialize.allow_missing_kernels"),
)


@functools.cache
def read(text: str) -> TrainConfig:
    return parse(text.split(), CommandLine, prog="train").train


def changed_flags(one: TrainConfig, other: TrainConfig) -> set[str]:
    before, after = values(one), values(other)
    return {name for name in before if before[name] != after[name]}


def at(found: Any, place: str) -> str:
    """What stands at a place; nothing is there behind None."""
    for name in place.split("."):
        if found is None:
            break
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return repr(found)


@functools.cache
def resolved(text: str, world_size: int) -> Resolved:
    return resolve(read(text), world_size)


def resolved_at(text: str, row: Row) -> str:
    return at(resolved(text, row.world_size), row.place)


def test_every_flag_has_a_row() -> None:
    assert [row.flag for row in ROWS if row.flag not in KEPT] == [
        flag for flag in FLAGS if flag not in KEPT
    ]


def test_a_row_sets_its_flag_alone() -> None:
    for row in ROWS:
        if row.message:
            continue
        changes = changed_flags(read(row.base), read(f"{row.base} {row.typed}"))
        assert changes == {row.flag}, row
        assert not row.place.startswith("config"), f"{row}: flags as given prove nothing"


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if not row.message and not row.place.startswith("run.")],
    ids=lambda row: row.flag,
)
def test_settings_change(row: Row) -> None:
    try:
        before = resolved_at(row.base, row)
    except ValueError as error:
        before = str(error)
    assert resolved_at(f"{row.base} {row.typed}", row) != before


@pytest.mark.parametrize("row", [row for row in ROWS if row.message], ids=lambda row: row.flag)
def test_errors_name_what_is_refused(row: Row) -> None:
    with pytest.raises(ValueError) as error:
        resolved_at(f"{row.base} {row.typed}", row)
    assert row.message in str(error.value)


@pytest.mark.parametrize("flag", sorted(KEPT))
def test_what_is_kept_for_scripts_changes_nothing(flag: str) -> None:
    with_it, without = resolve(read(f"--save d --{flag}"), 1), resolve(read("--save d"), 1)
    assert dataclasses.replace(with_it, config=without.config) == without


# -- what main hands to the parts ------------------------------------------------------------------


class _Noting:
    """Runs `main` with parts that note what they are given, and do nothing."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"first_weights": []}

    def run(self, text: str) -> dict[str, Any]:
        from unittest import mock

        from megatron_mimo.training import loop, main, setup
        from megatron_mimo.watch import activations

        with (
            mock.patch.object(main, "guard_rank", self._guard_rank),
            mock.patch.object(main, "initialize", self._initialize),
            mock.patch.object(main, "shutdown", lambda: None),
            # Paths of the rows are not there.
            mock.patch.object(main, "check_paths", lambda _: None),
            mock.patch.object(main, "LeaveRequest", self._leave_request),
            mock.patch.object(main, "gc"),
            mock.patch.object(setup, "build_runner", self._build_runner),
            mock.patch.object(setup, "build_dispatcher", self._build_dispatcher),
            mock.patch.object(setup, "tokenizer_for", self._tokenizer_for),
            mock.patch.object(setup, "SampleTrace", self._sample_trace),
            mock.patch.object(setup, "load_nemotron", self._load("nemotron")),
            mock.patch.object(setup, "load_vision", self._load("vision")),
            mock.patch.object(setup, "load_base", self._load_base),
            mock.patch.object(setup, "load_adapters", self._load_adapters),
            mock.patch.object(activations, "ActivationTap", self._recording),
            mock.patch.object(loop, "train", self._train),
        ):
            assert main.main(text.split()) == 0
        return self.found

    def _guard_rank(self, role: str, *, join_s: float | None) -> Any:
        from contextlib import nullcontext
        from types import SimpleNamespace

        return nullcontext(SimpleNamespace(training_starts=lambda: None))

    def _initialize(
        self, device: str, *, timeout_minutes: float, allow_missing_kernels: bool
    ) -> Any:
        import torch.distributed as dist

        from megatron_mimo.runtime import Device
        from megatron_mimo.runtime.setup import RuntimeContext

        self.found["initialize"] = {
            "device": device,
            "timeout_minutes": timeout_minutes,
            "allow_missing_kernels": allow_missing_kernels,
        }
        rank, size = dist.get_rank(), dist.get_world_size()
        return RuntimeContext(rank=rank, local_rank=rank, world_size=size, device=Device("cpu"))

    def _leave_request(self, minutes: float | None) -> Any:
        from types import SimpleNamespace

        self.found["leaving"] = {"minutes": minutes, "signals": False}
        return SimpleNamespace(watch_signals=lambda: self.found["leaving"].update(signals=True))

    def _build_runner(
        self, layout: Any, architecture: Any, freeze: Any, build: Any, *rest: Any, **_: Any
    ) -> Any:
        from unittest.mock import MagicMock

        *_, config = rest
        self.found["runner"] = {"build": build, "config": config}
        return MagicMock()

    def _build_dispatcher(self, *arguments: Any) -> None:
        self.found["balance"] = arguments[-1]

    def _tokenizer_for(self, config: Any, folder: str | None) -> Any:
        from megatron_mimo.data import ByteTokenizer

        self.found["tokenizer"] = {"folder": folder}
        return ByteTokenizer()

    def _sample_trace(self, directory: str, *_: Any) -> None:
        self.found["trace"] = {"directory": directory}

    def _load(self, what: str) -> Callable[..., None]:
        def load(_state: Any, path: Path, *, trust: bool) -> None:
            self.found["first_weights"].append((what, str(path), trust))

        return load

    def _load_base(self, _replicas: Any, path: Path, _control: Any, *, trust: bool) -> None:
        self.found["first_weights"].append(("base", str(path), trust))

    def _load_adapters(self, _state: Any, _architecture: Any, path: str) -> None:
        self.found["adapters"] = {"folder": path}

    def _recording(self, source: Any, state: Any, folder: str, **more: Any) -> Any:
        self.found["recording"] = {"folder": folder, **more}
        return source

    def _train(self, runner: Any, loader: Any, eval_loader: Any, config: Any, *_: Any) -> Any:
        from megatron_mimo.training.loop import TrainResult

        self.found["loop"] = config
        return TrainResult(iteration=0, consumed_samples=0, lm_loss=None, train_seconds=0.0)


def noted(asked: list[tuple[str, str]]) -> list[str]:
    """What stands at each place with these flags."""
    runs = {text: _Noting().run(text) for text in dict.fromkeys(text for text, _ in asked)}
    found = []
    for text, place in asked:
        name, _, within = place.removeprefix("run.").partition(".")
        here = runs[text].get(name)
        found.append(at(here, within) if within else repr(here))
    return found


RUNS = [row for row in ROWS if row.place.startswith("run.")]


@pytest.mark.parametrize("world_size", sorted({row.world_size for row in RUNS}))
def test_parts_are_told(world_size: int, run_ranks: Callable[..., list]) -> None:
    rows = [row for row in RUNS if row.world_size == world_size]
    asked = [(text, row.place) for row in rows for text in (row.base, f"{row.base} {row.typed}")]
    for found in run_ranks(world_size, noted, asked, timeout=120):
        pairs = zip(rows, found[::2], found[1::2], strict=True)
        ignored = [row.flag for row, without, with_it in pairs if without == with_it]
        assert not ignored
