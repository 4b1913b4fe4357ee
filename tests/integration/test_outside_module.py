"""A family of modules from outside of the package trains beside vision, on any grid of its own.

The family is `examples/mimo/readings.py`: its own items, its own token, its own packed input. Each
layout is held against one rank, in loss, norms, and every weight and moment, and resumes exactly.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.harness.slices import slow_but
from tests.integration.curves import assert_parity
from tests.integration.state import Part, assemble, assert_same_state, parts_of

STEPS, BEFORE = 4, 2
GLOBAL_BATCH_SIZE = 12
SEQ_LENGTH = 128


def grids(**sizes: dict[str, int]) -> Layout:
    """Any number of grids by name; the last is fed by all others."""
    specs = [ModuleGridSpec(name=name, **axes) for name, axes in sizes.items()]
    return Layout.of(*specs, world_size=max(spec.ranks.stop for spec in specs))


ONE_RANK = grids(encoder={}, readings={}, llm={})
LAYOUTS = {
    "on a grid of its own": grids(encoder={}, readings={"offset": 1}, llm={"offset": 2}),
    "together with vision": grids(encoder={}, readings={}, llm={"offset": 1}),
    "tp 2": grids(encoder={}, readings={"offset": 1, "tp": 2}, llm={"offset": 3}),
    "dp 2 for three lanes": grids(
        encoder={}, readings={"offset": 1, "dp": 2}, llm={"offset": 3, "dp": 3}
    ),
    "dp 3 for two lanes": grids(
        encoder={}, readings={"offset": 0, "dp": 3}, llm={"offset": 3, "dp": 2}
    ),
    "llm pp 2": grids(encoder={}, readings={"offset": 1}, llm={"offset": 2, "pp": 2}),
    "pp 2 of its own": grids(encoder={}, readings={"offset": 1, "pp": 2}, llm={"offset": 3}),
    "on a part of the language model": grids(
        encoder={}, readings={"offset": 2, "dp": 2}, llm={"offset": 1, "tp": 2, "dp": 2}
    ),
    "between both": grids(encoder={"dp": 2}, readings={"offset": 1, "dp": 2}, llm={"offset": 2}),
    "all on two ranks": grids(encoder={"dp": 2}, readings={"tp": 2}, llm={"tp": 2}),
}
Found = tuple[list[list[float]], list[Part]]


def runner_of(
    chosen: Layout, frozen: frozenset[str], provider: str = "mock-readings"
) -> tuple[Any, Any]:
    """This rank's runner and its samples."""
    import torch.distributed as dist

    from examples.mimo import readings
    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, build_train_loader, data_role
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.runner import StepConfig, build_runner
    from tests.integration.engines import small_parts

    tokenizer = ByteTokenizer(("encoder", "readings"))
    runner = build_runner(
        chosen,
        *small_parts(provider=provider, seq_length=SEQ_LENGTH, freeze=frozen),
        AdamConfig(lr=1e-3, min_lr=1e-4, weight_decay=0.1, eps=1e-8, clip_grad=1.0),
        ScheduleConfig(style="cosine", warmup_samples=16, decay_samples=10 * GLOBAL_BATCH_SIZE),
        StepConfig(placeholder_ids=tokenizer.placeholder_ids),
        device=Device("cpu"),
    )
    config = DataConfig(
        seed=7,
        seq_length=SEQ_LENGTH,
        micro_batch_size=2,
        global_batch_size=GLOBAL_BATCH_SIZE,
        inputs={
            "encoder": ImageInput(config=model_config("mock").part("vision").image_config()),
            "readings": readings.ReadingsInput(mock_share=0.5),
        },
    )
    return runner, build_train_loader(config, data_role(chosen, dist.get_rank()), tokenizer)


def points_of(runner: Any, loader: Any, first: int, number: int) -> list[list[float]]:
    """Loss, norm and each module's norm of each step; nothing without a loss."""
    from megatron_mimo.training.step import train_step

    points = []
    for iteration in range(first + 1, first + number + 1):
        metrics = train_step(runner, loader, iteration, GLOBAL_BATCH_SIZE)
        target = runner.topology.target
        if target is not None and target.is_last_stage:
            norms = metrics.update.module_norms
            points.append([float(metrics.loss), metrics.update.grad_norm, *norms.values()])
    return points


def train(chosen: Layout, frozen: frozenset[str] = frozenset()) -> Found:
    """What this rank finds."""
    runner, loader = runner_of(chosen, frozen)
    return points_of(runner, loader, 0, STEPS), parts_of(runner)


@pytest.fixture(scope="module")
def one_rank(run_ranks: Callable[..., list]) -> Callable[..., Any]:
    """What one rank learns; each run is made once."""

    @cache
    def reference(frozen: frozenset[str] = frozenset()) -> Any:
        ((points, parts),) = run_ranks(1, train, ONE_RANK, frozen)
        return points, assemble([parts])

    return reference


def assert_same(found: list[Found], wanted: Any) -> None:
    points, state = wanted
    curves = [mine for mine, _ in found if mine]
    assert curves
    for mine in curves:
        assert_parity(points, mine)
        for point, expected in zip(mine, points, strict=True):
            assert point[2:] == pytest.approx(expected[2:], rel=1e-4)
    assert_same_state(assemble(parts for _, parts in found), state)


@pytest.mark.parametrize(
    "name",
    slow_but(
        LAYOUTS,
        "on a grid of its own",
        "dp 2 for three lanes",
        "on a part of the language model",
        "all on two ranks",
    ),
)
def test_every_layout_follows_one_rank(
    name: str, run_ranks: Callable[..., list], one_rank: Callable[..., Any]
) -> None:
    layout = LAYOUTS[name]
    assert_same(run_ranks(layout.world_size, train, layout), one_rank())


@pytest.mark.parametrize("frozen", ["filter mapping", "filter", "language", "vision projector"])
def test_frozen_parts(
    frozen: str, run_ranks: Callable[..., list], one_rank: Callable[..., Any]
) -> None:
    layout, still = LAYOUTS["pp 2 of its own"], frozenset(frozen.split())
    wanted = one_rank(still)
    assert_same(run_ranks(layout.world_size, train, layout, still), wanted)
    norms = dict(zip(ONE_RANK.modules, wanted[0][0][2:], strict=True))
    assert (norms["readings"] == 0) == ({"filter", "mapping"} <= still)


def samples_of(chosen: Layout) -> list[tuple[str, ...]]:
    """Modules of each sample of the first steps, in the order of their tokens."""
    _, loader = runner_of(chosen, frozenset())
    found = []
    for _ in range(STEPS):
        for microbatch in loader.next_step().microbatches:
            entries: dict[int, list[str]] = {i: [] for i in range(len(microbatch.keys[0]))}
            for entry in microbatch.manifest:
                entries[entry.sequence].append(entry.module)
            found += [tuple(modules) for modules in entries.values()]
    return found


def test_samples_have_both_modules_one_or_none(run_ranks: Callable[..., list]) -> None:
    """What the layouts were held against each other on."""
    (found,) = run_ranks(1, samples_of, ONE_RANK)
    assert {"readings" in modules for modules in found} == {True, False}
    assert any({"encoder", "readings"} <= set(modules) for modules in found)
    share = sum("readings" in modules for modules in found) / len(found)
    assert 0.3 < share < 0.7


def straight(chosen: Layout, root: str) -> Found:
    """Train without a break, saving on the way."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.training.loop import _lane_states

    runner, loader = runner_of(chosen, frozenset())
    points = points_of(runner, loader, 0, BEFORE)
    checkpoints = Checkpointer(runner, SaveConfig(root=root), {})
    progress = Progress(BEFORE, BEFORE * GLOBAL_BATCH_SIZE)
    checkpoints.save(progress, _lane_states(runner, loader))
    checkpoints.finish()
    points += points_of(runner, loader, BEFORE, STEPS - BEFORE)
    checkpoints.close()
    return points[BEFORE:], parts_of(runner)


def resumed(chosen: Layout, root: str) -> Found:
    """Train on from what was saved."""
    from megatron_mimo.checkpoint.checkpointer import load
    from megatron_mimo.checkpoint.config import LoadConfig

    runner, loader = runner_of(chosen, frozenset())
    loaded = load(runner, LoadConfig(root=root))
    assert loaded is not None and loaded.loader is not None
    loader.restore(loaded.loader["lanes"])
    return points_of(runner, loader, BEFORE, STEPS - BEFORE), parts_of(runner)


@pytest.mark.parametrize("name", ["tp 2", "on a part of the language model"])
def test_resumes_exactly(name: str, run_ranks: Callable[..., list], tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    wanted: list[Found] = run_ranks(layout.world_size, straight, layout, str(tmp_path))
    found: list[Found] = run_ranks(layout.world_size, resumed, layout, str(tmp_path))
    for (points, parts), (same_points, same_parts) in zip(wanted, found, strict=True):
        assert points == same_points
        assert [part.key for part in parts] == [part.key for part in same_parts]
        for part, same in zip(parts, same_parts, strict=True):
            assert (part.values == same.values).all(), part.key


def test_another_layout_goes_on_from_there(
    run_ranks: Callable[..., list], one_rank: Callable[..., Any], tmp_path: Path
) -> None:
    run_ranks(1, straight, ONE_RANK, str(tmp_path))
    layout = LAYOUTS["dp 2 for three lanes"]
    found: list[Found] = run_ranks(layout.world_size, resumed, layout, str(tmp_path))
    points, state = one_rank()
    assert_same(found, (points[BEFORE:], state))


def weights_moved(chosen: Layout) -> dict[str, bool]:
    """Whether two steps change each module, where readings want a learning rate of their own: 0."""
    import torch

    from examples.mimo import readings
    from megatron_mimo.config.presets import register_provider
    from megatron_mimo.model.config import ModelConfig
    from megatron_mimo.modules.families import register

    class StillConfig(readings.ReadingsConfig):
        """The same architecture under another type."""

    class StillAdapter(readings.ReadingsAdapter):
        config_type = StillConfig

        def optimizer(self, config: Any) -> dict[str, Any]:
            return {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}

    def still() -> ModelConfig:
        modules = dict(readings.mock_readings().modules)
        return ModelConfig(modules=modules | {"readings": StillConfig()})

    register(StillAdapter())
    register_provider("still-readings", still)
    runner, loader = runner_of(chosen, frozenset(), "still-readings")
    before = {
        name: [parameter.detach().clone() for parameter in replica.module.parameters()]
        for name, replica in runner.model.modules.items()
    }
    # The warm-up begins at 0, so the first step changes nothing.
    points_of(runner, loader, 0, 2)
    return {
        name: any(
            not torch.equal(old, new)
            for old, new in zip(before[name], replica.module.parameters(), strict=True)
        )
        for name, replica in runner.model.modules.items()
    }


def test_a_family_may_want_other_settings_of_adam(run_ranks: Callable[..., list]) -> None:
    (moved,) = run_ranks(1, weights_moved, ONE_RANK)
    assert moved == {"encoder": True, "readings": False, "llm": True}


def returns(chosen: Layout, what: str) -> str:
    """The error of a run whose module returns something that peers do not expect."""
    import torch

    from megatron_mimo.training.step import train_step

    runner, loader = runner_of(chosen, frozenset({"filter", "mapping"}))
    replica = runner.topology.modules.get("readings") and runner.model.modules["readings"]
    if replica:
        forward = replica.module.forward
        wrong: dict[str, Any] = {
            "nothing": lambda rows: None,
            "narrow rows": lambda rows: rows[:, 1:],
            "float64": lambda rows: rows.to(torch.float64),
        }
        replica.module.forward = lambda *args: wrong[what](forward(*args))
    with pytest.raises(RuntimeError) as found:
        train_step(runner, loader, 1, GLOBAL_BATCH_SIZE)
    return str(found.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "module readings returned NoneType: expected a tensor"),
        ("narrow rows", "rows of the readings: expected float32 ["),
        ("float64", "but the module gave float64 ["),
    ],
)
def test_what_a_module_returns_is_checked_where_it_leaves(
    what: str, message: str, run_ranks: Callable[..., list]
) -> None:
    """Sent as it is, it would be waited for, or be trained on as other numbers."""
    (found,) = run_ranks(1, returns, ONE_RANK, what)
    assert message in found
