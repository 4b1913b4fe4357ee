"""The training command line: which flags there are, and how files and flags meet."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from megatron_mimo.config.arguments import known_flags
from megatron_mimo.config.flags import CommandLine, parse, to_yaml
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.settings import InsteadOf, OnlyWith, declared, values

# Adding a flag is a promise to users: it belongs here, into the changelog, and does what it says.
FLAGS = """
    grid encoder-offset encoder-tp encoder-cp encoder-pp encoder-dp encoder-ep encoder-expt-tp
    llm-offset llm-tp llm-cp llm-pp llm-dp llm-ep llm-expt-tp llm-only sequence-parallel
    encoder-run-ahead encoder-dispatch encoder-dispatch-group-size encoder-balance-window
    check-bridge
    custom-import model-provider model-config override separate-video training-stage freeze-vit
    freeze-video freeze-audio freeze-lm
    freeze-projection freeze tokenizer-model tokenizer-prompt-format image-token image-tag-type
    seq-length
    dynamic-resolution dynamic-resolution-min-patches
    dynamic-resolution-max-patches dynamic-resolution-rule
    img-h img-w use-tiling max-num-tiles use-thumbnail video-fps video-num-frames
    video-max-frames video-target-num-patches patch-dim
    class-token-len pixel-shuffle moe-router-force-load-balancing moe-grouped-gemm
    recompute-granularity recompute-modules bf16 fp16 fp32 loss-scale
    initial-loss-scale min-loss-scale loss-scale-window hysteresis
    lora-rank lora-alpha lora-dropout lora-rslora lora-targets load-lora init
    dataset-provider data-path media-root num-workers loader-processes shuffle-buffer-size
    packing-buffer-size max-samples-per-sequence max-bad-sample-fraction validate-data-alignment
    trust-dataset-code sample-trace-dir mock-dataset-size image-seq-length text-only-fraction
    dataloader-save dataloader-load
    micro-batch-size global-batch-size train-iters train-samples seed exit-interval
    exit-duration-in-mins exit-signal-handler max-nonfinite-steps
    lr min-lr weight-decay adam-beta1 adam-beta2 adam-eps clip-grad log-num-zeros-in-grad
    correct-encoder-grad-for-partial-participation
    lr-decay-style lr-warmup-iters lr-warmup-samples lr-decay-iters lr-decay-samples
    lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style
    sharding overlap-grad-reduce overlap-param-gather ddp-num-buckets ddp-bucket-size
    ddp-pad-buckets-for-high-nccl-busbw eval-interval eval-iters
    save save-interval no-save-optim no-save-rng async-save keep-last
    load finetune no-load-optim no-load-scheduler no-load-rng
    load-hf load-hf-without load-nemotron-checkpoint load-vision-from load-base
    trust-checkpoint dist-ckpt-optim-fully-reshardable
    log-interval tensorboard-dir save-activations save-activations-step
    timeline-profile timeline-dir timeline-ranks profile profile-step-start profile-step-end
    profile-ranks peak-tflops
    wandb-project wandb-exp-name wandb-entity wandb-save-dir
    mlflow-experiment mlflow-run-name mlflow-tracking-uri
    device distributed-timeout-minutes allow-missing-kernels
""".split()

# Every type of field, and each value other than its default.
MANY = """
    --llm-offset 0 --llm-only --sequence-parallel --override a.b=1 --override c.d=e=f
    --no-dynamic-resolution --img-h 16 --use-tiling --max-num-tiles 4 --use-thumbnail
    --class-token-len 3 --no-pixel-shuffle --bf16 --init topology-invariant
    --image-token <img> --text-only-fraction 0.25 --lr 3e-05 --adam-eps 1e-10
    --tensorboard-dir runs/a --train-samples 640 --lr-decay-style WSD --lr-wsd-decay-samples 64
    --lr-wsd-decay-style minus_sqrt --save runs/a --save-interval 5 --async-save
""".split()


def read(*argv: str) -> TrainConfig:
    return parse(argv, CommandLine, prog="train").train


def in_file(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_are_these() -> None:
    assert list(known_flags(TrainConfig)) == FLAGS


def test_every_flag_is_documented() -> None:
    for flag in declared(TrainConfig):
        documented = inspect.getdoc(flag.owner) or ""
        inherited = [inspect.getdoc(base) or "" for base in flag.owner.__mro__[1:]]
        assert any(f"\n    {flag.path[-1]}: " in text for text in [documented, *inherited]), flag


def test_no_two_sections_share_a_flag() -> None:
    names = [flag.name for flag in declared(TrainConfig)]
    assert len(set(names)) == len(names) == len(FLAGS)


def test_marks_name_flags_that_are_there() -> None:
    for flag in declared(TrainConfig):
        for mark in flag.marked(OnlyWith):
            assert {typed.removeprefix("--").split()[0] for typed in mark.flags} < set(FLAGS), flag
        for choice in flag.marked(InsteadOf):
            assert choice.names < set(FLAGS), flag


def test_help_is_grouped_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], CommandLine, prog="train")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    sections = [shown.index(f" {s.name} options ") for s in dataclasses.fields(TrainConfig)]
    assert sections == sorted(sections)
    for flag in [*FLAGS, "config", "print-config"]:
        assert f"--{flag}" in shown


def test_reads_every_type() -> None:
    config = read(*MANY)
    assert config.grids.llm_offset == 0
    assert config.grids.llm_only is True
    assert config.grids.sequence_parallel is True
    assert config.model.override == ("a.b=1", "c.d=e=f")
    assert config.model.dynamic_resolution is False
    assert config.model.pixel_shuffle is False
    assert config.model.image_token == "<img>"
    assert config.model.bf16 is True
    assert config.training.adam.lr == 3e-5
    assert config.training.length.train_samples == 640
    assert config.training.schedule.wsd_decay_style == "minus_sqrt"
    assert config.watching.tensorboard_dir == "runs/a"


def test_yaml_reads_back_to_the_same(tmp_path: Path) -> None:
    config = read(*MANY)
    assert config != TrainConfig()
    assert read("--config", in_file(tmp_path, to_yaml(config))) == config


def test_yaml_has_a_comment_for_each_section_and_every_flag() -> None:
    text = to_yaml(TrainConfig())
    assert list(yaml.safe_load(text)) == FLAGS
    assert "# grids\n" in text and "# runtime\n" in text


def test_a_file_sets_what_the_command_line_leaves(tmp_path: Path) -> None:
    path = in_file(tmp_path, "lr: 1e-4\nmin_lr: 1e-5\nclip-grad: 2\noverride: [a.b=1, a.c=2]\n")
    config = read("--lr", "0.5", "--config", path, "--override", "a.d=3")
    assert config.training.adam.lr == 0.5
    assert config.training.adam.min_lr == 1e-5
    assert config.training.adam.clip_grad == 2.0
    assert config.model.override == ("a.b=1", "a.c=2", "a.d=3")


def test_later_files_win(tmp_path: Path) -> None:
    first = in_file(tmp_path, "lr: 1\nseed: 1\n", "first.yaml")
    second = in_file(tmp_path, "seed: 2\n", "second.yaml")
    config = read("--config", first, "--config", second)
    assert (config.training.adam.lr, config.training.seed) == (1.0, 2)


def test_the_command_line_replaces_the_files_precision(tmp_path: Path) -> None:
    path = in_file(tmp_path, "bf16: true\n")
    assert read("--config", path).model.bf16
    config = read("--config", path, "--fp32")
    assert config.model.fp32
    assert not config.model.bf16


@pytest.mark.parametrize("stem", ["train", "lr-warmup", "lr-decay", "lr-wsd-decay"])
def test_a_later_unit_replaces_an_earlier_one(tmp_path: Path, stem: str) -> None:
    first = in_file(tmp_path, f"{stem}-iters: 5\n", "first.yaml")
    second = in_file(tmp_path, f"{stem}-samples: 40\n", "second.yaml")
    for argv, length in (
        (["--config", first, f"--{stem}-samples", "50"], (None, 50)),
        (["--config", first, "--config", second], (None, 40)),
        (["--config", second, "--config", first], (5, None)),
        (["--config", first, "--config", second, f"--{stem}-iters", "6"], (6, None)),
    ):
        found = values(read(*argv))
        assert (found[f"{stem}-iters"], found[f"{stem}-samples"]) == length
    with pytest.raises(ValueError, match=f"^--{stem}-iters 5 and --{stem}-samples 40: expected"):
        read(f"--{stem}-iters", "5", f"--{stem}-samples", "40")
    path = in_file(tmp_path, f"{stem}-iters: 5\n{stem}-samples: 40\n")
    with pytest.raises(ValueError, match=f"key '{stem}-iters' and .*key '{stem}-samples': exp"):
        read("--config", path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "lr: null\n"])
def test_empty_files_and_null_change_nothing(tmp_path: Path, text: str) -> None:
    assert read("--config", in_file(tmp_path, text)) == TrainConfig()


def test_both_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--bf16 and --fp32: expected one of them$"):
        read("--bf16", "--fp32")
    path = in_file(tmp_path, "bf16: true\nfp32: true\n")
    with pytest.raises(ValueError, match=r"key 'bf16' and .*key 'fp32': expected one of them$"):
        read("--config", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train-iter: 3", "{path}: key 'train-iter' is unknown: the nearest is 'train-iters'"),
        ("lr: fast", "{path}: key 'lr': expected a number, not 'fast'"),
        ("seed: 1.5", "{path}: key 'seed': expected a whole number, not '1.5'"),
        ("seed: yes", "{path}: key 'seed': expected a whole number, not True"),
        ("seed: [1, 2]", "{path}: key 'seed': expected a whole number, not [1, 2]"),
        ("bf16: 1", "{path}: key 'bf16': expected true or false, not 1"),
        ("init: random", "{path}: key 'init': expected one of megatron, topology-invariant, not"),
        ("image-token: no", "{path}: key 'image-token': expected text, in quotes, not False"),
        ("data-path: 2024", "{path}: key 'data-path': expected text, in quotes, not 2024"),
        ("- lr", "--config {path}: expected keys and values, as in `train-iters: 100`"),
        ("lr: 1\nlr: 2", "--config {path} is not YAML: key 'lr' is given twice, again in line 2"),
        (
            "min-lr: 1\nmin_lr: 2",
            "--config {path} is not YAML: key 'min_lr' is given twice, again in line 2",
        ),
        ("lr: [", "--config {path} is not YAML: "),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = in_file(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read("--config", path)
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--config no\.yaml cannot be read: .*No such file"):
        read("--config", "no.yaml")


def test_a_file_sets_grids_by_module(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("grids:\n  audio: {tp: 2, offset: 3}\n  llm: {dp: 4}\n", encoding="utf-8")
    train = parse(["--config", str(path), "--grid", "audio.tp=1"], CommandLine, prog="p").train
    assert train.grids.grid == ("audio.tp=2", "audio.offset=3", "llm.dp=4", "audio.tp=1")


@pytest.mark.parametrize("text", ["grids: 2", "grids: {audio: 2}", "grids: [audio]"])
def test_grids_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"key 'grids': expected sizes by module, as in `grids: "):
        parse(["--config", str(path)], CommandLine, prog="p")
