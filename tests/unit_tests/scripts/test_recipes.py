"""The scripts' own values: pinned, accepted by the real resolver, and as README.md lists them."""

import re
from pathlib import Path

import pytest

from megatron_mimo.config.arguments import known_flags, read_argv
from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.settings import OnlyWith, declared, values
from tests.unit_tests.scripts.recipes import BATCH, HF, LOCAL, SCRIPTS, Recipe, read_recipe, table

# Layout, batch and length as published for runs of this kind: nodes, encoder DP, LLM DP, EP, expert
# DP, lanes per encoder rank, global batch, microbatches.
PUBLISHED = {
    "parity_3n": (3, 8, 8, 16, 1, 1, 32, 4),
    "parity_9n": (9, 8, 32, 16, 4, 4, 192, 6),
    "scaling_17n": (17, 8, 64, 8, 16, 8, 384, 6),
    "production_33n": (33, 8, 128, 8, 32, 16, 768, 6),
    "production_68n": (68, 32, 256, 8, 64, 8, 768, 3),
    "production_100n": (100, 32, 384, 8, 96, 12, 768, 2),
}
# Samples: to train on, of warm-up, of the decay, of its tail; packing buffer; log interval.
SCHEDULES = {
    "parity_3n": (50 * 32, 0, 121_046_313, 1, 4, 1),
    "parity_9n": (36_621_094, 1_024_000, 35_597_094, 5_493_164, 128, 100),
    "scaling_17n": (50 * 384, 0, 121_046_313, 1, 4, 1),
    "production_33n": (122_070_313, 1_024_000, 121_046_313, 18_310_547, 128, 1),
    "production_68n": (122_070_313, 1_024_000, 121_046_313, 18_310_547, 128, 1),
    "production_100n": (122_070_313, 1_024_000, 121_046_313, 18_310_547, 128, 1),
}
# Flags with a default that scripts need not name, and why.
UNPINNED = {
    "encoder-dispatch": "which replica runs an item, which changes no curve",
    "encoder-balance-window": "which replica runs an item, which changes no curve",
    "eval-iters": "--eval-interval 0",
    "max-nonfinite-steps": "ends runs that are lost, and changes no curve",
    "save": "the launcher's",
    "sharding": "how weights are held, which changes no curve",
}
OF_FOLDER = ("tokenizer-model", "dynamic-resolution", "max-num-tiles")
"""What the folder of `--load-hf` decides, or what has no effect beside its processor."""
# Sections that change what a run shows, not what it trains.
SHOWS = ("watching", "runtime")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[Recipe]:
    folder = tmp_path_factory.mktemp("recipes")
    return [read_recipe(path, folder) for path in [*BATCH, *HF, *LOCAL]]


@pytest.fixture(params=[path.name for path in [*BATCH, *HF, *LOCAL]])
def recipe(request: pytest.FixtureRequest, recipes: list[Recipe]) -> Recipe:
    return next(recipe for recipe in recipes if recipe.path.name == request.param)


@pytest.fixture(params=[path.name for path in BATCH])
def batch(request: pytest.FixtureRequest, recipes: list[Recipe]) -> Recipe:
    return next(recipe for recipe in recipes if recipe.path.name == request.param)


def test_these_scripts_are_there() -> None:
    assert {path.stem for path in BATCH} == set(PUBLISHED)


def test_flags_resolve_at_the_real_number_of_ranks(recipe: Recipe) -> None:
    resolved = recipe.resolve()
    assert resolved.layout.world_size == recipe.ranks


def test_layouts_are_the_published_ones(batch: Recipe) -> None:
    resolved = batch.resolve()
    layout = resolved.layout
    assert (layout.modules["encoder"].tp, layout.target.tp, layout.target.expt_tp) == (1, 2, 1)
    assert PUBLISHED[batch.path.stem] == (
        batch.nodes,
        layout.modules["encoder"].dp,
        layout.target.dp,
        layout.target.ep,
        layout.target.expt_dp,
        len(layout.served("encoder", 0)),
        resolved.global_batch_size,
        resolved.data.num_microbatches(layout.num_lanes),
    )


def test_schedules_are_the_published_ones(batch: Recipe) -> None:
    resolved = batch.resolve()
    schedule = resolved.schedule
    assert SCHEDULES[batch.path.stem] == (
        resolved.length.train_samples,
        schedule.warmup_samples,
        schedule.decay_samples,
        schedule.wsd_decay_samples,
        resolved.data.packing_buffer_size,
        resolved.watch.log_interval,
    )
    assert (schedule.style, schedule.wsd_decay_style) == ("WSD", "minus_sqrt")
    assert (resolved.adam.lr, resolved.adam.min_lr) == (1.2e-3, 1.2e-5)
    assert (resolved.adam.weight_decay, resolved.data.seed) == (0.1, 1234)


def test_model_images_and_data_are_the_published_ones(batch: Recipe) -> None:
    resolved = batch.resolve()
    model, data = resolved.model, resolved.data
    assert model.model_provider == "nemotron-moe-vlm-54l"
    assert (model.training_stage, model.bf16, model.seq_length) == ("stage2", True, 8192)
    assert (model.class_token_len, model.image_tag_type) == (10, "internvl")
    assert (model.dynamic_resolution, model.max_num_tiles, model.use_thumbnail) == (True, 1, False)
    assert (data.num_workers, data.shuffle_buffer_size) == (2, 100)
    assert data.max_samples_per_sequence == 100
    reduce = resolved.reduce
    assert (reduce.overlap_grads, reduce.num_buckets, reduce.pad_buckets) == (True, 8, True)
    is_short = batch.path.stem in ("parity_3n", "scaling_17n")
    assert reduce.overlap_params == is_short
    assert batch.nccl_proto == ("simple" if batch.path.stem == "parity_3n" else "LL128")
    assert resolved.save is not None and resolved.save.interval == 1000


def test_every_value_is_pinned(recipe: Recipe) -> None:
    """A default that changes must not change a recipe."""
    named = {setting.name for setting in read_argv(recipe.flags, known_flags(TrainConfig))}
    named |= {name.removeprefix("no-") for name in named}
    found = values(recipe.resolve().config)
    for flag in declared(TrainConfig):
        does_nothing = not all(mark.is_met(found) for mark in flag.marked(OnlyWith))
        of_folder = recipe.path in HF and flag.name in OF_FOLDER
        if flag.path[0] in SHOWS or does_nothing or of_folder:
            continue
        value = found[flag.name]
        is_off = value is None or value is False or value == ()
        assert is_off or flag.name in named or flag.name in UNPINNED, f"--{flag.name} {value}"


def test_no_flag_stands_twice(recipe: Recipe) -> None:
    names = [setting.name for setting in read_argv(recipe.flags, known_flags(TrainConfig))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", [*BATCH, *HF], ids=lambda path: path.stem)
def test_jobs_leave_before_their_limit(path: Path, recipes: list[Recipe]) -> None:
    batch = next(recipe for recipe in recipes if recipe.path == path)
    header = batch.header
    hours, minutes, seconds = map(int, header["time"].split(":"))
    limit_s = hours * 3600 + minutes * 60 + seconds
    signal, _, lead_s = header["signal"].partition("@")
    assert signal == "B:USR1" and int(lead_s) >= 600
    assert limit_s == 4 * 3600 and "requeue" in header and header["open-mode"] == "append"
    flags = batch.flags
    assert "--exit-signal-handler" in flags
    own_s = 60 * float(flags[flags.index("--exit-duration-in-mins") + 1])
    # The program's own limit comes first, the signal second.
    assert own_s < limit_s - int(lead_s)


def test_the_homogeneous_twin_of_the_short_parity_run_resolves(recipes: list[Recipe]) -> None:
    """As README.md starts it: both modules on the same 16 ranks."""
    recipe = next(recipe for recipe in recipes if recipe.path.stem == "parity_3n")
    twin = Recipe(recipe.path, recipe.header, "", "", recipe.flags, ranks=16)
    command = "--encoder-dp 16 --llm-offset 0"
    readme = (SCRIPTS / "README.md").read_text()
    assert f'MIMO_EXTRA_FLAGS="{command}" sbatch --nodes=2 scripts/parity_3n.sbatch' in readme
    layout = twin.resolve(*command.split()).layout
    assert "colocated grids" in layout.table() and layout.num_lanes == 8


def test_the_rehearsal_resolves_on_the_production_layout(recipes: list[Recipe]) -> None:
    """As README.md starts it: a small model, and else the script."""
    readme = (SCRIPTS / "README.md").read_text()
    example = re.search(r'MIMO_EXTRA_FLAGS="([^"]*)" MIMO_FIRST_WEIGHTS=random', readme)
    assert example
    recipe = next(recipe for recipe in recipes if recipe.path.stem == "production_33n")
    resolved = recipe.resolve(*example[1].split())
    assert resolved.model.model_provider == "nemotron-moe-vlm-tiny"
    assert resolved.layout == recipe.resolve().layout
    assert resolved.train_iters == 10


def test_the_readme_has_the_table(recipes: list[Recipe]) -> None:
    expected = table(recipes)
    assert expected in (SCRIPTS / "README.md").read_text(), f"the table should read\n{expected}"


def test_the_readme_lists_the_launchers_variables() -> None:
    used = set()
    for path in [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")]:
        used |= set(re.findall(r"\bMIMO_[A-Z_]+", path.read_text()))
    listed = set(re.findall(r"^\| `(MIMO_[A-Z_]+)`", (SCRIPTS / "README.md").read_text(), re.M))
    assert listed == used


def test_common_variables_of_the_recipes() -> None:
    exported = dict(
        re.findall(r"^export ([A-Z0-9_]+)=(\S+)$", Path(SCRIPTS / "launch.sh").read_text(), re.M)
    )
    assert exported == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",
        "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
        "NCCL_P2P_NET_CHUNKSIZE": "2097152",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "0",
    }


@pytest.mark.parametrize(
    ("example", "script"), [("nemotron-20l", "local_8gpu"), ("nemotron-54l", "production_33n")]
)
def test_example_configs_have_the_scripts_values(
    example: str, script: str, recipes: list[Recipe]
) -> None:
    (recipe,) = (found for found in recipes if found.path.stem == script)
    file = SCRIPTS.parent / "examples/mimo/configs" / f"{example}.yaml"
    given = () if recipe.path in LOCAL else ("--data-path", "/data", "--tokenizer-model", "/t")
    line = parse(["--config", str(file), *given], CommandLine, prog="train")
    mine, theirs = resolve(line.train, recipe.ranks), recipe.resolve()
    for part in (
        *("layout", "architecture", "execution", "reduce", "freeze", "data", "adam", "schedule"),
        *("global_batch_size", "train_iters"),
    ):
        assert getattr(mine, part) == getattr(theirs, part), part
    for flag in ("bf16", "init", "tokenizer_prompt_format"):
        assert getattr(mine.config.model, flag) == getattr(theirs.config.model, flag)


@pytest.mark.parametrize(
    ("example", "script"),
    [
        ("gemma4-31b-tp4pp4", "hf_gemma4_31b_4n"),
        ("qwen3-vl-30b-a3b", "hf_qwen3_vl_30b_a3b_2n"),
    ],
)
def test_example_configs_of_folders_have_the_scripts_values(
    example: str, script: str, recipes: list[Recipe]
) -> None:
    (recipe,) = (found for found in recipes if found.path.stem == script)
    theirs = recipe.resolve()
    file = SCRIPTS.parent / "examples/mimo/configs" / f"{example}.yaml"
    folder = theirs.config.checkpoints.first_weights.load_hf
    given = ("--data-path", "/data", "--load-hf", str(folder))
    line = parse(["--config", str(file), *given], CommandLine, prog="train")
    mine = resolve(line.train, recipe.ranks)
    for part in (
        *("layout", "architecture", "execution", "reduce", "freeze", "adam", "schedule"),
        *("global_batch_size", "train_iters"),
    ):
        assert getattr(mine, part) == getattr(theirs, part), part
