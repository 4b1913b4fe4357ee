"""An audio encoder that trains on clips: any grid follows one rank, with statistics of its own too.

Half of the samples have no clip, and microbatches are small, so that ranks are without clips while
others have some.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from megatron_mimo.topology import Layout, ModuleGridSpec, balanced
from tests.harness.slices import slow_but
from tests.integration.curves import assert_parity
from tests.integration.state import assemble, assert_same_state, parts_of

STEPS, GLOBAL_BATCH_SIZE, SEQ_LENGTH = 4, 12, 96


def grids(audio: dict[str, int], llm: dict[str, int]) -> Layout:
    """Grids of both modules; those of one rank share it."""
    specs = [ModuleGridSpec(name="audio", **audio), ModuleGridSpec(name="llm", **llm)]
    return Layout.of(*specs, world_size=max(spec.ranks.stop for spec in specs))


ONE_RANK = grids({}, {})
LAYOUTS = {
    "dp 2, two stages of the language model": grids({"dp": 2}, {"offset": 2, "pp": 2}),
    "tp 2": grids({"tp": 2}, {"offset": 2}),
    "pp 2 dp 2": grids({"pp": 2, "dp": 2}, {"offset": 4}),
    "dp 3 for two lanes": grids({"dp": 3}, {"offset": 3, "dp": 2}),
    "dp 2, items shared out": balanced(grids({"dp": 2}, {"offset": 2, "dp": 2})),
    "colocated, tp 2": grids({"tp": 2}, {"dp": 2}),
}
# Statistics are those of a microbatch, so that layouts with more lanes have others.
OF_ONE_LANE = {
    "dp 2": grids({"dp": 2}, {"offset": 2}),
    "dp 2, items shared out": balanced(grids({"dp": 2}, {"offset": 2})),
    "tp 2 pp 2": grids({"tp": 2, "pp": 2}, {"offset": 4}),
    "dp 2, colocated": grids({"dp": 2}, {"tp": 2}),
    "pp 2 dp 2": grids({"pp": 2, "dp": 2}, {"offset": 4}),
}


def train(chosen: Layout, statistics: str, frozen: frozenset[str] = frozenset()) -> Any:
    """Loss and norms of each step, and this rank's weights, moments and buffers."""
    from megatron_mimo.config.presets import PROVIDERS, register_provider
    from megatron_mimo.data import ByteTokenizer, DataConfig, build_train_loader
    from megatron_mimo.media.audio.input import AudioInput
    from megatron_mimo.model.config import ModelConfig
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.runner import StepConfig, build_runner
    from megatron_mimo.training.step import train_step
    from tests.integration.engines import shared_loader, small_parts

    if "hears" not in PROVIDERS:
        modules = dict(PROVIDERS["omni-tiny"]().modules)
        del modules["encoder"]
        register_provider("hears", lambda: ModelConfig(modules=modules))
    overrides = ["language.hidden_size=64", f"audio.batch_norm={statistics}"]
    if statistics == "batch":
        # In front of a norm over rows a bias has no gradient but rounding, of which Adam makes a
        # walk without direction.
        overrides.append("audio.convolution_bias=false")
    architecture, still, build = small_parts(
        provider="hears", seq_length=SEQ_LENGTH, freeze=frozen, overrides=overrides
    )
    tokenizer = ByteTokenizer(("audio",))
    runner = build_runner(
        chosen,
        architecture,
        still,
        build,
        AdamConfig(lr=1e-3, min_lr=1e-4, weight_decay=0.1, eps=1e-8, clip_grad=1.0),
        ScheduleConfig(style="cosine", warmup_samples=16, decay_samples=10 * GLOBAL_BATCH_SIZE),
        StepConfig(placeholder_ids=tokenizer.placeholder_ids),
        device=Device("cpu"),
    )
    config = DataConfig(
        seed=7,
        seq_length=SEQ_LENGTH,
        micro_batch_size=3,
        global_batch_size=GLOBAL_BATCH_SIZE,
        text_only_fraction=0.5,
        inputs={
            "audio": AudioInput(
                config=architecture.part("audio").audio_config(),
            )
        },
    )
    loader = shared_loader(
        chosen,
        config,
        runner,
        lambda role, dispatcher: build_train_loader(config, role, tokenizer, dispatcher),
    )
    points = []
    for iteration in range(STEPS):
        metrics = train_step(runner, loader, iteration + 1, GLOBAL_BATCH_SIZE)
        target = runner.topology.target
        if target is not None and target.is_last_stage:
            update = metrics.update
            points.append([float(metrics.loss), update.grad_norm, *update.module_norms.values()])
    loader.close()
    return points, parts_of(runner)


@pytest.fixture(scope="module")
def one_rank(run_ranks: Callable[..., list]) -> Callable[..., Any]:
    """What one rank learns; each run is made once."""

    @cache
    def reference(statistics: str, frozen: frozenset[str] = frozenset()) -> Any:
        ((points, parts),) = run_ranks(1, train, ONE_RANK, statistics, frozen)
        return points, assemble([parts])

    return reference


def assert_same(found: list[Any], wanted: Any, only: str = "") -> None:
    """Curves, and tensors whose names end so, are those of one rank."""
    points, state = wanted
    curves = [mine for mine, _ in found if mine]
    assert curves
    for mine in curves:
        assert_parity(points, mine)
        for point, expected in zip(mine, points, strict=True):
            assert point[2:] == pytest.approx(expected[2:], rel=1e-4)
    states = (assemble(parts for _, parts in found), state)
    compared, expected = (
        {key: values for key, values in each.items() if key.endswith(only)} for each in states
    )
    assert compared
    assert_same_state(compared, expected)


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "dp 2, two stages of the language model"))
def test_every_layout_follows_one_rank(
    name: str, run_ranks: Callable[..., list], one_rank: Callable[..., Any]
) -> None:
    layout = LAYOUTS[name]
    assert_same(run_ranks(layout.world_size, train, layout, "running"), one_rank("running"))


@pytest.mark.parametrize("name", slow_but(OF_ONE_LANE, "dp 2"))
def test_statistics_of_a_microbatch_are_those_of_one_rank(
    name: str, run_ranks: Callable[..., list], one_rank: Callable[..., Any]
) -> None:
    layout, wanted = OF_ONE_LANE[name], one_rank("batch")
    assert wanted[0][0] != one_rank("running")[0][0]
    # A norm over rows takes away most of what weights in front of it do, so that their gradients
    # are differences of almost equal sums; the statistics themselves depend on all weights below.
    found = run_ranks(layout.world_size, train, layout, "batch")
    assert_same(found, wanted, "running_mean")
    assert_same(found, wanted, "running_var")
    assert_same(found, wanted, "num_batches_tracked")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["audio", "audio_projector", "audio audio_projector"])
def test_frozen_parts(
    frozen: str, run_ranks: Callable[..., list], one_rank: Callable[..., Any]
) -> None:
    layout, still = OF_ONE_LANE["pp 2 dp 2"], frozenset(frozen.split())
    found = run_ranks(layout.world_size, train, layout, "batch", still)
    assert_same(found, one_rank("batch", still), "running_var")
    # A frozen encoder's statistics stay.
    tracked = assemble(parts for _, parts in found)
    moved = {float(v) for key, v in tracked.items() if key.endswith("num_batches_tracked")}
    assert (moved == {0.0}) == ("audio" in still)
