"""Stop and go on: bit for bit on the same layout, and along the same curve on another one."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.model.config import Frozen
from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.engines import (
    SEQ_LENGTH,
    beside,
    layout,
    mock_data,
    mock_loader,
    small_runner,
)

# The second save uses the plans of the first one.
BEFORE, AFTER = 3, 3
GLOBAL_BATCH_SIZE = 4
TINY = "nemotron-moe-vlm-tiny"
OVERRIDES = (
    "language.pattern=ME*-ME",
    "language.moe_aux_loss_coeff=0.1",
    "language.moe_router_bias_update_rate=0.05",
    "language.ffn_hidden_size=192",
    "vision.hidden_size=64",
)
HYBRID = {"provider": TINY, "overrides": OVERRIDES}
ONE_RANK = layout({}, {})
LAYOUTS = {
    "one rank": ONE_RANK,
    "dp 2 each": beside({"dp": 2}, {"dp": 2}),
    "llm dp 2": beside({}, {"dp": 2}),
    "llm tp 2": beside({}, {"tp": 2}),
    "encoder tp 2": beside({"tp": 2}, {}),
    "llm ep 2": beside({"dp": 2}, {"dp": 2, "ep": 2}),
    "llm ep 2 tp 2": beside({}, {"tp": 2, "ep": 2}),
    "llm pp 2": beside({}, {"pp": 2}),
    "llm pp 2 ep 2": beside({}, {"pp": 2, "dp": 2, "ep": 2}),
    "encoder pp 2, llm cp 2": beside({"pp": 2}, {"cp": 2}),
    "encoder cp 2": beside({"cp": 2}, {}),
    "colocated": layout({"dp": 2}, {"tp": 2}),
}


def build(chosen: Layout, data: dict[str, Any], engine: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A rank's engine, its loader, and what of it is saved."""

    built = small_runner(chosen, steps=BEFORE + AFTER, **(HYBRID | engine))
    if "path" in data:
        loader = energon_loader(chosen, **data)
    else:
        loader = mock_loader(chosen, mock_data(global_batch_size=GLOBAL_BATCH_SIZE, **data))
    return (
        built,
        loader,
        built,
    )


def energon_loader(
    chosen: Layout,
    path: str,
    num_workers: int,
    *,
    packing: int | None = None,
    seq_length: int = SEQ_LENGTH,
) -> Any:
    """Handwritten digits, several to a sequence if they are packed."""
    import torch.distributed as dist

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, build_train_loader, data_role
    from megatron_mimo.media.images import ImageInput

    config = DataConfig(
        provider="energon",
        path=path,
        seed=7,
        seq_length=seq_length,
        packing_buffer_size=packing,
        micro_batch_size=1,
        global_batch_size=GLOBAL_BATCH_SIZE,
        num_workers=num_workers,
        shuffle_buffer_size=20,
        inputs={
            "encoder": ImageInput(
                config=model_config(TINY).part("vision").image_config(position_crop=True)
            )
        },
    )
    return build_train_loader(config, data_role(chosen, dist.get_rank()), ByteTokenizer())


def steps(engine: Any, loader: Any, first: int, number: int) -> list[list[float]]:
    """(loss, gradient norm, learning rate) of each step; none without a loss."""
    from megatron_mimo.training.step import train_step

    points = []
    for iteration in range(first + 1, first + number + 1):
        metrics = train_step(engine, loader, iteration, GLOBAL_BATCH_SIZE)
        llm = engine.topology.target
        if llm is not None and llm.is_last_stage:
            points.append([float(metrics.loss), metrics.update.grad_norm, metrics.learning_rate])
    return points


def weights(engine: Any) -> dict[str, list[float]]:
    """Every weight, buffer and moment of this rank, as sums that differ when a bit does."""
    import hashlib

    digests = {}
    for replica in engine.model.replicas:
        for name, tensor in replica.module.state_dict().items():
            if hasattr(tensor, "numpy"):
                raw = tensor.detach().float().numpy().tobytes()
                digests[f"{replica.groups.spec.name}.{name}"] = hashlib.sha256(raw).hexdigest()
    for index, state in enumerate(engine.optimizer.param_states().values()):
        for kind, tensor in state.tensors.items():
            digests[f"{index}.{kind}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return digests


def straight(
    chosen: Layout,
    data: dict[str, Any],
    engine: dict[str, Any],
    root: str,
    save: dict[str, Any],
) -> tuple[list[list[float]], dict[str, Any]]:
    """Train without a break, saving after each step of the first half."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.training.loop import _lane_states

    built, loader, parts = build(chosen, data, engine)
    checkpoints = Checkpointer(parts, SaveConfig(root=Path(root), **save), {})
    points = steps(built, loader, 0, 1)
    # Later saves use the plans of the first ones.
    for done in range(1, BEFORE + 1):
        progress = Progress(done, done * GLOBAL_BATCH_SIZE)
        checkpoints.save(progress, _lane_states(built, loader))
        if done < BEFORE:
            points += steps(built, loader, done, 1)
    points += steps(built, loader, BEFORE, AFTER)
    checkpoints.finish()
    return points, weights(built)


def resumed(
    chosen: Layout, data: dict[str, Any], engine: dict[str, Any], root: str, load: dict[str, Any]
) -> tuple[list[list[float]], dict[str, Any]]:
    """Train on from what `straight` saved."""
    from megatron_mimo.checkpoint.checkpointer import load as load_checkpoint
    from megatron_mimo.checkpoint.config import LoadConfig

    built, loader, parts = build(chosen, data, engine)
    loaded = load_checkpoint(parts, LoadConfig(root=Path(root), **load))
    assert loaded is not None and loaded.loader is not None
    assert loaded.progress.iteration == BEFORE
    assert loaded.progress.consumed_samples == BEFORE * GLOBAL_BATCH_SIZE
    loader.restore(loaded.loader["lanes"])
    return steps(built, loader, BEFORE, AFTER), weights(built)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of handwritten digits."""
    from megatron_mimo.data.samples.digits import write_digits_dataset

    path = tmp_path_factory.mktemp("digits") / "digits"
    write_digits_dataset(path)
    return str(path)


Ranks = list[tuple[list[list[float]], dict[str, Any]]]
Saved = Callable[[str], tuple[Ranks, Path]]


@pytest.fixture(scope="module")
def saved(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """What the ranks of a layout find that never stop, and the folder they save into.

    Each layout trains once, however many others load what it has saved.
    """

    @cache
    def run(name: str) -> tuple[Ranks, Path]:
        root, chosen = tmp_path_factory.mktemp("saved"), LAYOUTS[name]
        ranks = run_ranks(chosen.world_size, straight, chosen, {}, {}, str(root), {}, timeout=120)
        return ranks, root

    return run


def assert_exact(before: Ranks, after: Ranks) -> None:
    assert any(points for points, _ in before)
    for (points, ends), (later_points, later_ends) in zip(before, after, strict=True):
        assert points[BEFORE:] == later_points
        assert ends == later_ends


def check_exact(
    run_ranks: Callable[..., list], chosen: Layout, root: Path, data: Any, engine: Any, save: Any
) -> None:
    before = run_ranks(
        chosen.world_size, straight, chosen, data, engine, str(root), save, timeout=120
    )
    after = run_ranks(chosen.world_size, resumed, chosen, data, engine, str(root), {}, timeout=120)
    assert_exact(before, after)


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "llm pp 2 ep 2", "colocated"))
def test_the_same_layout_goes_on_bit_for_bit(
    name: str, run_ranks: Callable[..., list], saved: Saved
) -> None:
    chosen = LAYOUTS[name]
    before, root = saved(name)
    after = run_ranks(chosen.world_size, resumed, chosen, {}, {}, str(root), {}, timeout=120)
    assert_exact(before, after)


@pytest.mark.slow
def test_so_does_a_save_in_the_background(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    check_exact(run_ranks, LAYOUTS["llm ep 2"], tmp_path, {}, {}, {"in_background": True})


@pytest.mark.slow
def test_so_does_bf16(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    check_exact(run_ranks, LAYOUTS["llm ep 2 tp 2"], tmp_path, {}, {"bf16": True}, {})


DENSE = {"provider": "mock", "overrides": ("language.hidden_size=64",)}


@pytest.mark.slow
def test_so_does_a_dense_model(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    check_exact(run_ranks, LAYOUTS["llm tp 2"], tmp_path, {}, DENSE, {})


def test_embeddings_tied_over_two_stages_are_stored_once(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    tied = DENSE | {"tied_embeddings": True}
    chosen, root = LAYOUTS["llm pp 2"], str(tmp_path)
    started = run_ranks(chosen.world_size, straight, chosen, {}, tied, root, {})
    after = run_ranks(chosen.world_size, resumed, chosen, {}, tied, root, {})
    assert_exact(started, after)
    assert_same_curve(started, run_ranks(1, resumed, ONE_RANK, {}, tied, root, {}))


STAGES = {
    "stage 1": Frozen({"vision", "language"}),
    "stage 2": Frozen({"vision"}),
}


@pytest.mark.parametrize("stage", slow_but(STAGES, "stage 1"))
def test_so_does_a_run_that_trains_a_part(
    stage: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    chosen = LAYOUTS["llm ep 2"]
    check_exact(run_ranks, chosen, tmp_path, {}, {"freeze": STAGES[stage]}, {})


def owners(chosen: Layout, freeze: Frozen) -> tuple[str, int]:
    """This rank's module, and of how many weights it keeps optimizer state."""
    engine, _, _ = build(chosen, {}, {"freeze": freeze})
    (replica,) = engine.model.replicas
    return replica.groups.spec.name, len(engine.optimizer.param_states())


def test_ranks_of_a_frozen_module_own_no_optimizer_state(run_ranks: Callable[..., list]) -> None:
    chosen = LAYOUTS["llm ep 2"]
    found = run_ranks(chosen.world_size, owners, chosen, STAGES["stage 1"])
    assert {name for name, weights in found if weights} == {"encoder"}
    assert {name for name, _ in found} == {"encoder", "llm"}


@pytest.mark.parametrize(
    ("name", "num_workers"),
    [
        ("dp 2 each", 0),
        pytest.param("dp 2 each", 2, marks=pytest.mark.slow),
        pytest.param("llm pp 2 ep 2", 0, marks=pytest.mark.slow),
        pytest.param("llm pp 2 ep 2", 2, marks=pytest.mark.slow),
    ],
)
def test_so_does_an_energon_dataset(
    name: str, num_workers: int, run_ranks: Callable[..., list], tmp_path: Path, digits: str
) -> None:
    data = {"path": digits, "num_workers": num_workers}
    check_exact(run_ranks, LAYOUTS[name], tmp_path, data, {}, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_so_do_packed_sequences_over_context_parallel_ranks(
    kind: str, run_ranks: Callable[..., list], tmp_path: Path, digits: str
) -> None:
    data = {"path": digits, "num_workers": 2, "packing": 6, "seq_length": 128}
    engine = {"seq_length": 128} | (DENSE if kind == "dense" else {})
    chosen, root = LAYOUTS["encoder pp 2, llm cp 2"], str(tmp_path)
    size = chosen.world_size
    started = run_ranks(size, straight, chosen, data, engine, root, {}, timeout=120)
    assert_exact(started, run_ranks(size, resumed, chosen, data, engine, root, {}, timeout=120))
    # One rank, which has the whole sequence, goes on along the same curve.
    alone = run_ranks(1, resumed, ONE_RANK, data, engine, root, {}, timeout=120)
    assert_same_curve(started, alone)


MOVES = {
    f"{before} -> {after}": (before, after)
    for before, layouts in {
        "one rank": ["llm tp 2", "llm ep 2 tp 2", "encoder cp 2"],
        "llm tp 2": ["one rank", "llm pp 2"],
        "llm dp 2": ["dp 2 each"],
        "dp 2 each": ["llm tp 2"],
        "llm ep 2": ["one rank"],
        "llm pp 2 ep 2": ["one rank", "llm ep 2 tp 2", "encoder pp 2, llm cp 2"],
        "encoder tp 2": ["encoder pp 2, llm cp 2"],
        "encoder pp 2, llm cp 2": ["encoder tp 2"],
        "encoder cp 2": ["encoder tp 2"],
        "colocated": ["llm ep 2", "encoder tp 2"],
    }.items()
    for after in layouts
}


@pytest.mark.parametrize(
    "move",
    slow_but(
        MOVES,
        "llm pp 2 ep 2 -> one rank",
        "llm pp 2 ep 2 -> llm ep 2 tp 2",
        "llm pp 2 ep 2 -> encoder pp 2, llm cp 2",
        "colocated -> llm ep 2",
        "colocated -> encoder tp 2",
    ),
)
def test_another_layout_goes_on_along_the_same_curve(
    move: str, run_ranks: Callable[..., list], saved: Saved
) -> None:
    before, after = MOVES[move]
    started, root = saved(before)
    second = LAYOUTS[after]
    ended = run_ranks(second.world_size, resumed, second, {}, {}, str(root), {}, timeout=120)
    assert_same_curve(started, ended)


def assert_same_curve(started: Ranks, ended: Ranks) -> None:
    (wanted, *_) = [points[BEFORE:] for points, _ in started if points]
    curves = [points for points, _ in ended if points]
    assert curves
    for points in curves:
        for found, expected in zip(points, wanted, strict=True):
            assert found[0] == pytest.approx(expected[0], rel=1e-5)
            assert found[1] == pytest.approx(expected[1], rel=1e-4)
            assert found[2] == expected[2]
