"""What flags mean together, and which combinations are refused."""

import re
from pathlib import Path

import pytest

from megatron_mimo.config.flags import CommandLine, parse, to_yaml
from megatron_mimo.config.resolve import Resolved, resolve
from megatron_mimo.modules.hybrid import HybridConfig
from megatron_mimo.settings import values
from tests.hf.published import save_published

EXAMPLES = Path(__file__).parents[3] / "examples" / "mimo" / "configs"


def run(world_size: int, flags: str = "") -> Resolved:
    return resolve(parse(flags.split(), CommandLine, prog="train").train, world_size)


@pytest.mark.parametrize(
    ("world_size", "flags", "encoder", "llm"),
    [
        (1, "", range(1), range(1)),
        (2, "", range(1), range(1, 2)),
        (4, "--encoder-dp 2 --llm-tp 2", range(2), range(2, 4)),
        (3, "--llm-dp 2", range(1), range(1, 3)),
        (4, "--encoder-offset 2 --encoder-dp 2 --llm-offset 0 --llm-dp 2", range(2, 4), range(2)),
        (2, "--encoder-dp 2 --llm-tp 2 --llm-offset 0", range(2), range(2)),
        (2, "--llm-only --llm-dp 2", None, range(2)),
        (6, "--encoder-pp 2 --llm-cp 2 --llm-pp 2", range(2), range(2, 6)),
        # Two key-value heads, each on two ranks.
        (5, "--llm-tp 4", range(1), range(1, 5)),
    ],
)
def test_grids(world_size: int, flags: str, encoder: range | None, llm: range) -> None:
    layout = run(world_size, flags).layout
    assert (layout.modules["encoder"].ranks if layout.sources else None) == encoder
    assert layout.target.ranks == llm


def test_fills_what_follows_from_other_flags() -> None:
    config = run(4, "--encoder-dp 2 --llm-tp 2 --micro-batch-size 3 --train-iters 7").config
    assert (config.grids.encoder_offset, config.grids.llm_offset) == (0, 2)
    assert config.grids.sequence_parallel is True
    assert config.model.patch_dim == 8
    assert config.model.pixel_shuffle is True
    assert config.model.fp32 is True
    assert config.training.global_batch_size == 3
    assert config.training.schedule.decay_iters == 7
    assert run(3, "--llm-dp 2 --micro-batch-size 3").global_batch_size == 6
    assert run(1).config.grids.sequence_parallel is False


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--no-dynamic-resolution --img-h 32 --img-w 16",
        "--no-dynamic-resolution --img-h 32 --img-w 16 --use-tiling --max-num-tiles 4",
        "--llm-only --text-only-fraction 1",
        "--bf16 --patch-dim 16 --override vision.num_layers=1",
        "--dataset-provider energon --data-path d --num-workers 2",
        "--training-stage stage1 --lr-decay-style constant",
        "--train-samples 45 --global-batch-size 4 --lr-warmup-samples 5",
        "--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-decay-samples 77",
    ],
)
def test_resolved_flags_resolve_to_themselves(flags: str, tmp_path: Path) -> None:
    resolved = run(1, flags)
    assert resolve(resolved.config, 1) == resolved
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(resolved.config), encoding="utf-8")
    assert run(1, f"--config {path}") == resolved


def test_forced_balance_reaches_the_router() -> None:
    tiny = "--model-provider nemotron-moe-vlm-tiny"
    for flags, forced in ((tiny, False), (f"{tiny} --moe-router-force-load-balancing", True)):
        language = run(1, flags).architecture.part("language")
        assert isinstance(language, HybridConfig)
        assert language.moe_router_force_load_balancing is forced


def test_class_tokens_and_tiles_reach_model_and_data() -> None:
    flags = "--no-dynamic-resolution --img-h 32 --img-w 16 --use-tiling --max-num-tiles 4"
    resolved = run(1, f"{flags} --use-thumbnail --class-token-len 8")
    vision = resolved.architecture.part("vision")
    assert vision.class_token_len == resolved.data.inputs["encoder"].config.class_token_len == 8
    image = resolved.data.inputs["encoder"].config
    assert (image.use_tiling, image.max_num_tiles, image.use_thumbnail) == (True, 4, True)
    assert run(1, "--class-token-len 0").architecture.part("vision").num_registers == 0


def test_positions_are_cropped_only_while_the_encoder_trains() -> None:
    crop = "--override vision.position_crop=true"
    assert run(1, crop).data.inputs["encoder"].config.position_crop
    assert not run(1, f"{crop} --freeze-vit").data.inputs["encoder"].config.position_crop
    assert not run(1, f"{crop} --training-stage stage2").data.inputs["encoder"].config.position_crop
    assert not run(1).data.inputs["encoder"].config.position_crop


def test_model_and_data_agree_on_patches() -> None:
    for flags, patch_dim in (
        ("", 8),
        ("--patch-dim 4", 4),
        ("--override vision.patch_dim=16", 16),
        ("--override vision.patch_dim=16 --patch-dim 4", 4),
    ):
        resolved = run(1, f"{flags} --no-pixel-shuffle")
        vision = resolved.architecture.part("vision")
        assert vision.patch_dim == resolved.data.inputs["encoder"].config.patch_dim == patch_dim
        assert not vision.pixel_shuffle
        assert not resolved.data.inputs["encoder"].config.pixel_shuffle
        assert resolved.data.inputs["encoder"].config.position_grid == vision.position_grid
        assert resolved.data.inputs["encoder"].config.class_token_len == vision.class_token_len == 2


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        ("", set()),
        ("--training-stage stage2", {"vision"}),
        ("--training-stage stage1", {"vision", "language"}),
        ("--freeze-vit --freeze-projection", {"vision", "projector"}),
        ("--training-stage stage2 --freeze-lm", {"vision", "language"}),
    ],
)
def test_stages_and_switches_freeze(flags: str, frozen: set[str]) -> None:
    assert run(1, flags).freeze == frozen


def test_any_part_is_frozen_by_name() -> None:
    assert run(1, "--freeze projector --freeze vision --freeze-vit").freeze == {
        "projector",
        "vision",
    }
    with pytest.raises(ValueError, match="--freeze projecter: unknown 'projecter'; did you mean"):
        run(1, "--freeze projecter")
    with pytest.raises(ValueError, match="--freeze-audio: this model takes no audio; leave the"):
        run(1, "--freeze-audio")
    with pytest.raises(ValueError, match="nothing is left to train with --freeze-lm, --freeze v"):
        run(1, "--freeze-lm --freeze vision --freeze projector")


def test_only_mock_items_have_to_fit() -> None:
    short = "--model-provider omni-tiny --seq-length 64"
    with pytest.raises(ValueError, match="a mock clip .* --seq-length leaves 32: raise it"):
        run(1, short)
    assert run(1, f"{short} --dataset-provider energon --data-path d").data.seq_length == 64


def test_videos_are_taken_apart_once() -> None:
    omni = "--model-provider omni-tiny --seq-length 1024 --separate-video"
    assert list(run(4, omni).layout.modules) == ["encoder", "video", "audio", "llm"]
    with pytest.raises(ValueError, match="encoder, llm 0 take both images and videos: .* leave --"):
        run(2, "--separate-video")


def test_schedule_counts_samples() -> None:
    schedule = run(
        1,
        "--global-batch-size 6 --train-iters 50 --lr-warmup-iters 5 --lr-decay-iters 40 "
        "--lr-decay-style cosine",
    ).schedule
    assert (schedule.style, schedule.warmup_samples, schedule.decay_samples) == ("cosine", 30, 240)


def test_settings_reach_their_parts() -> None:
    resolved = run(
        1,
        "--lr 0.5 --min-lr 0.25 --weight-decay 0.125 --adam-beta1 0.5 --adam-beta2 0.75 "
        "--adam-eps 0.0625 --clip-grad 2 --log-num-zeros-in-grad --seed 9 --seq-length 32 "
        "--image-token <i> --mock-dataset-size 11 --text-only-fraction 0.5 --sample-trace-dir t "
        "--dynamic-resolution-min-patches 8 --dynamic-resolution-max-patches 0 "
        "--tokenizer-prompt-format plain --image-tag-type internvl",
    )
    adam, data = resolved.adam, resolved.data
    assert (adam.lr, adam.min_lr, adam.weight_decay) == (0.5, 0.25, 0.125)
    assert (adam.beta1, adam.beta2, adam.eps, adam.clip_grad) == (0.5, 0.75, 0.0625, 2.0)
    assert adam.log_num_zeros
    images = data.inputs["encoder"]
    assert (data.seed, data.seq_length, images.placeholder) == (9, 32, "<i>")
    assert (data.mock_dataset_size, data.text_only_fraction) == (11, 0.5)
    assert data.sample_trace_dir == "t"
    assert (data.prompt_format, images.tag_type) == ("plain", "internvl")
    assert data.inputs["encoder"].config.grid_rule == "nearest"
    assert (
        data.inputs["encoder"].config.min_patches,
        data.inputs["encoder"].config.max_patches,
    ) == (8, 0)


def test_hybrid_models_see_images_as_transformers_does() -> None:
    for flags, rule in (
        ("", "nearest"),
        ("--dynamic-resolution-rule nemotron-omni", "nemotron-omni"),
        ("--model-provider nemotron-moe-vlm-tiny", "nemotron-omni"),
        ("--model-provider nemotron-moe-vlm-tiny --dynamic-resolution-rule nearest", "nearest"),
    ):
        resolved = run(1, flags)
        assert resolved.data.inputs["encoder"].config.grid_rule == rule
        assert resolved.model.dynamic_resolution_rule == rule


def test_positions_of_the_data_follow_the_interval() -> None:
    flags = "--dataloader-save a --save-interval 3 --keep-last 2"
    for more in ("", " --save b"):
        readers = run(1, flags + more).readers
        assert (readers.save, readers.interval, readers.keep_last) == ("a", 3, 2)
    assert run(1, flags).save is None


def test_energon_settings_reach_the_data() -> None:
    resolved = run(1, "--dataset-provider energon --data-path d --max-bad-sample-fraction 0.25")
    assert resolved.data.max_bad_sample_fraction == 0.25
    assert resolved.data.packing_buffer_size is None
    packed = run(1, "--dataset-provider energon --data-path d --packing-buffer-size 128")
    assert packed.data.packing_buffer_size == 128


@pytest.mark.parametrize(
    ("world_size", "flags", "message"),
    [
        (
            1,
            "--tokenizer-prompt-format nemotron6-moe",
            r"--tokenizer-prompt-format nemotron6-moe needs --tokenizer-model: .* choose plain",
        ),
        (
            1,
            "--max-bad-sample-fraction 0.5",
            r"^--max-bad-sample-fraction 0.5 without --dataset-provider energon \(now mock\): add "
            r"it, or leave --max-bad-sample-fraction out$",
        ),
        (
            1,
            "--dataset-provider energon --data-path d --max-bad-sample-fraction 2",
            "--max-bad-sample-fraction is 2: expected 0 to 1",
        ),
        (3, "", r"encoder grid \[0, 1\) and llm grid \[1, 2\) leave ranks \[2, 3\) unused: "),
        (1, "--llm-dp 2", r"only 1 were started: start 2 ranks, or lower --llm-dp \(now 2"),
        (1, "--llm-tp 0", r"^--llm-tp is 0: expected 1 to 1,000,000$"),
        (2, "--llm-only --llm-dp 2 --encoder-dp 2", r"^--llm-only trains no encoder"),
        (1, "--sequence-parallel", r"^--sequence-parallel shards along --llm-tp, which is 1"),
        (4, "--model-provider omni-tiny --seq-length 1024 --grid audio.cp=2",
         r"^--grid audio.cp 2: context parallelism is not supported for this model"),
        (3, "--llm-ep 2 --llm-dp 2", r"^--llm-ep 2: expert parallelism is not supported"),
        (4, "--llm-pp 3", r"^--llm-pp 3 does not divide the model's language.num_layers, which is"),
        (4, "--encoder-pp 3", r"^--encoder-pp 3 .* or --override vision.num_layers$"),
        (4, "--llm-tp 3", r"^--llm-tp 3 does not divide the model's language.num_attention_heads,"),
        (4, "--llm-tp 3 --override language.num_attention_heads=6"
         " --override language.hidden_size=192",
         r"^--llm-tp 3 does not divide the model's language.num_query_groups, which is 2: "),
        (4, "--encoder-tp 3", r"^--encoder-tp 3 does not divide the model's vision.num_attention_"),
        (3, "--encoder-tp 2 --override projector.ffn_hidden_size=33",
         r"^--encoder-tp 2 .* projector.ffn_hidden_size, which is 33: "),
        (9, "--llm-cp 2 --llm-tp 4 --seq-length 20",
         r"^--seq-length 20 over --llm-cp 2 does not divide by --llm-tp 4: "),
        (3, "--llm-cp 2 --seq-length 62", r"^--seq-length 62 does not divide by 2 x --llm-cp 2"),
        (3, "--llm-tp 2 --seq-length 63", r"^--seq-length 63 does not divide by --llm-tp 2: "),
        (
            3,
            "--encoder-dp 2 --encoder-dispatch lane --encoder-dispatch-group-size 2",
            r"^--encoder-dispatch-group-size 2 with --encoder-dispatch lane, which moves no items",
        ),
        (
            5,
            "--encoder-dp 4 --encoder-dispatch-group-size 2",
            r"^--encoder-dispatch-group-size 2: encoder dp ranks 0 to 3 serve lane 0 together",
        ),
        (1, "--encoder-run-ahead -1", r"^--encoder-run-ahead is -1: expected 0 to 10,000,000$"),
        (1, "--override language.layers=4", r"unknown 'layers'; did you mean 'num_layers'\?"),
        (1, "--training-stage stage1 --freeze-projection",
         r"^nothing is left to train with --training-stage stage1, --freeze-projection"),
        (1, "--llm-only --freeze-lm", r"nothing is left to train with --freeze-lm, --llm-only"),
        (1, "--moe-router-force-load-balancing", r"^--moe-router-force-load-balancing with --mod"),
        (2, "--llm-ep 2 --llm-dp 2 --llm-only", r"^--llm-ep 2: expert parallelism is not supp"),
        (6, "--model-provider nemotron-moe-vlm-tiny --llm-dp 5 --llm-ep 5",
         r"^--llm-ep 5 does not divide the model's language.num_moe_experts, which is 8"),
        (3, "--model-provider nemotron-moe-vlm-tiny --llm-tp 2 --no-sequence-parallel",
         r"^--no-sequence-parallel with --llm-tp 2: experts need sequence parallelism"),
        (5, "--model-provider nemotron-moe-vlm-tiny --llm-pp 4",
         r"^--llm-pp 4 does not divide the 6 layers of pattern 'M\*EM\*E'"),
        (4, "--model-provider nemotron-moe-vlm-tiny --llm-cp 3 --seq-length 96",
         r"^--llm-cp 3 with --llm-tp 1: .* the 8 heads .* do not divide by 3: .* mamba_num_heads$"),
        (13, "--model-provider nemotron-moe-vlm-tiny --llm-cp 6 --llm-tp 2 --seq-length 96"
         " --override language.mamba_num_heads=48 --override language.mamba_num_groups=8",
         r"^--llm-cp 6 with --llm-tp 2: .* the 4 groups .* a divisor of it; .*num_groups$"),
        (1, "--use-tiling", r"^--use-tiling with --dynamic-resolution: .* --no-dynamic-resolution"),
        (1, "--no-dynamic-resolution --img-h 16 --img-w 16 --max-num-tiles 2",
         r"^--max-num-tiles needs --use-tiling"),
        (1, "--class-token-len -1", r"^--class-token-len is -1: expected 0 to 1,024"),
        (1, "--override vision.row_order=spiral", r"^--override vision.row_order=spiral: expected"),
        (1, "--img-h 16", r"^--img-h size images only without dynamic resolution"),
        (1, "--no-dynamic-resolution --img-h 16", r"^--no-dynamic-resolution needs --img-w"),
        (1, "--no-dynamic-resolution --img-h 16 --img-w 9", r"^--img-w is 9: expected a multiple"),
        (1, "--no-dynamic-resolution --img-h 16 --img-w 16 --dynamic-resolution-max-patches 9",
         r"^--dynamic-resolution-max-patches bound images only with dynamic resolution"),
        (1, "--data-path d", r"^--data-path d without --dataset-provider energon \(now mock\): "),
        (1, "--num-workers 2", r"^--num-workers 2 without --dataset-provider energon"),
        (1, "--dataset-provider energon", r"^--dataset-provider energon needs --data-path"),
        (1, "--packing-buffer-size 8", r"^--packing-buffer-size 8 without --dataset-provider en"),
        (1, "--dataset-provider energon --data-path d --packing-buffer-size 0",
         r"^--packing-buffer-size is 0: expected 1 to 1,000,000$"),
        (1, "--dataset-provider energon --data-path d --packing-buffer-size 8 --micro-batch-size 2",
         r"^--micro-batch-size 2 with --packing-buffer-size 8: a packed sequence is a batch by"),
        (4, "--dataset-provider energon --data-path d --packing-buffer-size 8 --llm-cp 3",
         r"^--seq-length 64 does not divide by --llm-cp 3: context parallelism gives each rank as"),
        (1, "--dataset-provider energon --data-path d --text-only-fraction 1",
         r"^--text-only-fraction 1.0 without --dataset-provider mock \(now energon\): add it"),
        (1, "--micro-batch-size 3 --global-batch-size 4",
         r"^--global-batch-size 4 is not a multiple of --micro-batch-size 3 x --llm-dp 1"),
        (1, "--train-iters 0", r"^--train-iters is 0: expected 1 to 1,000,000,000$"),
        (1, "--log-interval 0", r"^--log-interval is 0: expected 1 to 1,000,000,000$"),
        (1, "--eval-iters 0", r"^--eval-iters is 0: expected 1 to 1,000,000,000$"),
        (1, "--lr nan", r"^--lr is nan: expected 0 to 10$"),
        (1, "--lr -1", r"^--lr is -1: expected 0 to 10$"),
        (1, "--min-lr 1", r"^--min-lr 1.0 is above --lr 0.0001"),
        (1, "--adam-beta2 1", r"^--adam-beta2 is 1: expected 0 or more, and below 1$"),
        (1, "--adam-eps 0", r"^--adam-eps is 0: expected 1e-30 to 1$"),
        (1, "--distributed-timeout-minutes 0", r"^--distributed-timeout-minutes is 0: expected"),
        (1, "--lr-warmup-iters 100", r"^--lr-warmup-iters 100 is not below --train-iters 100"),
        (1, "--lr-warmup-iters 9 --lr-decay-iters 9", r"is not below --lr-decay-iters 9"),
        (1, "--save runs/a --dataloader-save ./runs/a",
         r"^--dataloader-save ./runs/a is the folder of --save, whose .*: name another folder"),
        (1, "--save-interval 2 --keep-last 2",
         r"^--save-interval 2 and --keep-last 2 without --save or --dataloader-save: add one of "
         r"these, or leave --save-interval and --keep-last out$"),
        (1, "--async-save --dataloader-save a",
         r"^--async-save without --save: add it, or leave --async-save out$"),
        (1, "--load-nemotron-checkpoint a --load-vision-from b",
         r"^--load-nemotron-checkpoint a and --load-vision-from b: expected at most one of them$"),
        (1, "--load-hf a --load-vision-from b --model-provider hf",
         r"^--load-hf a and --load-vision-from b: expected at most one"),
        (1, "--load-vision-from b --llm-only",
         r"^--load-vision-from b with --llm-only, which has no vision encoder"),
    ],
)  # fmt: skip
def test_refuses(world_size: int, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(world_size, flags)
    assert "\n" not in str(error.value)


# File -> ranks, and what is given with it.
EXAMPLE_RUNS = {
    "mock.yaml": (2, ""),
    "digits.yaml": (4, ""),
    "text-only.yaml": (2, ""),
    "colocated.yaml": (2, ""),
    "nemotron-tiny.yaml": (4, ""),
    "stage1.yaml": (4, f"--config {EXAMPLES / 'nemotron-tiny.yaml'}"),
    "stage2.yaml": (4, f"--config {EXAMPLES / 'nemotron-tiny.yaml'}"),
    "nemotron-20l.yaml": (8, ""),
    "nemotron-54l.yaml": (264, "--data-path /data --tokenizer-model /tokenizer"),
}
# File -> ranks, and the published model whose folder is given with it.
EXAMPLES_OF_FOLDERS = {
    "gemma4-31b-tp4pp2.yaml": (8, "gemma4-31b"),
    "gemma4-31b-tp4pp4.yaml": (32, "gemma4-31b"),
    "qwen3-vl-8b.yaml": (8, "qwen3-vl-8b"),
    "qwen3-vl-30b-a3b.yaml": (16, "qwen3-vl-30b-a3b"),
    "mistral3-24b.yaml": (8, "mistral3-24b"),
}


def example(name: str) -> Resolved:
    world_size, more = EXAMPLE_RUNS[name]
    return run(world_size, f"{more} --config {EXAMPLES / name}")


@pytest.mark.parametrize("name", EXAMPLE_RUNS)
def test_examples_resolve(name: str) -> None:
    check_ranks(name, example(name), EXAMPLE_RUNS[name][0])


def check_ranks(name: str, resolved: Resolved, ranks: int) -> None:
    """An example has so many ranks, by its row in README.md too."""
    assert resolved.layout.world_size == ranks
    row = rf"^\| \[{re.escape(name)}\]\(configs/{re.escape(name)}\) \| {ranks} \| "
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(row, readme, re.MULTILINE)) == 1, "its row in README.md"


@pytest.mark.parametrize("name", EXAMPLES_OF_FOLDERS)
def test_examples_of_folders_resolve(name: str, tmp_path: Path) -> None:
    ranks, model = EXAMPLES_OF_FOLDERS[name]
    save_published(model, tmp_path / model)
    given = f"--load-hf {tmp_path / model} --data-path /data"
    check_ranks(name, run(ranks, f"{given} --config {EXAMPLES / name}"), ranks)


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {*EXAMPLE_RUNS, *EXAMPLES_OF_FOLDERS}


def test_stages_train_their_parts() -> None:
    assert "language" in example("stage1.yaml").freeze
    second = example("stage2.yaml")
    assert second.freeze == {"vision"}
    assert second.load is not None and second.load.root == second.readers.load
    assert example("stage1.yaml").save.root == second.load.root  # type: ignore[union-attr]


def test_what_is_recomputed() -> None:
    hybrid = "--model-provider nemotron-moe-vlm-tiny "
    execution = run(
        1,
        hybrid + "--recompute-granularity selective --recompute-modules moe "
        "--recompute-modules core_attn --no-moe-grouped-gemm",
    ).execution
    assert execution.recompute_granularity == "selective"
    assert execution.recompute_modules == ("moe", "core_attn")
    assert execution.moe_grouped_gemm is False
    assert run(1, "--recompute-granularity selective").execution.recompute_modules == ("core_attn",)
    assert run(1).execution.recompute_granularity is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--recompute-modules mlp", "mlp without --recompute-granularity selective"),
        (
            "--recompute-granularity full --recompute-modules mlp",
            "mlp without --recompute-granularity selective",
        ),
        (
            "--recompute-granularity selective --recompute-modules moe",
            "--recompute-modules moe: expected core_attn, layernorm, mlp",
        ),
        ("--moe-grouped-gemm", "--moe-grouped-gemm with --model-provider mock, which has no"),
    ],
)
def test_what_cannot_be_recomputed(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(1, flags)


def test_a_file_of_an_earlier_version_means_what_it_meant() -> None:
    """What --print-config wrote before modules had names."""
    path = Path(__file__).with_name("printed_before_modules.yaml")
    assert run(4, f"--config {path}").layout == run(4, "--encoder-dp 2 --llm-tp 2").layout
    shown = values(run(4, f"--config {path}").config)
    # Two settings showed nothing where they had their default.
    known = values(run(4, "--encoder-dp 2 --llm-tp 2 --lr 0.0003").config)
    assert shown == known
