"""The loss curve must not depend on the layout: same seed, same global batch, any grids."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.integration.curves import assert_parity
from tests.integration.engines import (
    beside,
    layout,
    list_loader,
    micro_batch_size,
    mock_data,
    mock_loader,
    small_runner,
)

pytestmark = pytest.mark.slow

STEPS = 50
# Of what varies beside the layout: the curves part at once, or not at all.
FEWER_STEPS = 20
# Divides by 1, 2 and 3 lanes, with two or three microbatches for each.
GLOBAL_BATCH_SIZE = 12

ONE_RANK = layout({}, {})
LAYOUTS = {
    "encoder dp 1, llm dp 1": beside({}, {}),
    "encoder dp 1, llm dp 2 (fan-out)": beside({}, {"dp": 2}),
    "encoder dp 2, llm dp 1 (fan-in)": beside({"dp": 2}, {}),
    "encoder dp 2, llm dp 2": beside({"dp": 2}, {"dp": 2}),
    "encoder dp 2, llm dp 3": beside({"dp": 2}, {"dp": 3}),
    "encoder dp 3, llm dp 2": beside({"dp": 3}, {"dp": 2}),
    "encoder tp 2, llm dp 2": beside({"tp": 2}, {"dp": 2}),
    "encoder cp 2": beside({"cp": 2}, {}),
    "encoder cp 2, llm dp 2 (fan-out)": beside({"cp": 2}, {"dp": 2}),
    "encoder cp 2 dp 2, llm cp 2": beside({"cp": 2, "dp": 2}, {"cp": 2}),
    "encoder cp 2 tp 2, llm tp 2": beside({"cp": 2, "tp": 2}, {"tp": 2}),
    "encoder cp 2 pp 2": beside({"cp": 2, "pp": 2}, {}),
    "encoder cp 3, llm pp 2": beside({"cp": 3}, {"pp": 2}),
    "colocated, encoder cp 2, llm cp 2": layout({"cp": 2}, {"cp": 2}),
    "colocated, encoder cp 2, llm dp 2": layout({"cp": 2}, {"dp": 2}),
    "colocated, encoder cp 2 dp 2, llm pp 2 tp 2": layout({"cp": 2, "dp": 2}, {"pp": 2, "tp": 2}),
    "encoder pp 2": beside({"pp": 2}, {}),
    "encoder pp 2 dp 2, llm dp 2": beside({"pp": 2, "dp": 2}, {"dp": 2}),
    "llm tp 2": beside({}, {"tp": 2}),
    "llm tp 2, encoder dp 2": beside({"dp": 2}, {"tp": 2}),
    "llm tp 2, encoder tp 2": beside({"tp": 2}, {"tp": 2}),
    "llm pp 2": beside({}, {"pp": 2}),
    "llm tp 2 pp 2": beside({}, {"tp": 2, "pp": 2}),
    "llm pp 2, encoder pp 2": beside({"pp": 2}, {"pp": 2}),
    "llm cp 2": beside({}, {"cp": 2}),
    "llm cp 2 tp 2": beside({}, {"cp": 2, "tp": 2}),
    "llm cp 2 pp 2, encoder tp 2": beside({"tp": 2}, {"cp": 2, "pp": 2}),
    "the llm first, the encoder behind": layout({"offset": 2}, {"dp": 2}),
    "colocated, dp 2 each": layout({"dp": 2}, {"dp": 2}),
    "colocated, encoder dp 2, llm tp 2": layout({"dp": 2}, {"tp": 2}),
    "colocated, encoder dp 2, llm pp 2": layout({"dp": 2}, {"pp": 2}),
    "colocated, encoder dp 4, llm tp 2 dp 2": layout({"dp": 4}, {"tp": 2, "dp": 2}),
    "colocated, encoder tp 2, llm dp 2": layout({"tp": 2}, {"dp": 2}),
}


def curve(
    chosen: Layout, data: dict[str, Any], engine: dict[str, Any], steps: int = FEWER_STEPS
) -> list[list[float]]:
    """Train on mock data; (loss, gradient norm, encoder's norm) of each step on this rank."""
    size = micro_batch_size(chosen, GLOBAL_BATCH_SIZE)
    from megatron_mimo.training.step import train_step

    built = small_runner(chosen, steps=STEPS, **engine)
    loader = mock_loader(
        chosen,
        mock_data(global_batch_size=GLOBAL_BATCH_SIZE, **{"micro_batch_size": size} | data),
    )
    return [point(built, train_step(built, loader, i + 1, GLOBAL_BATCH_SIZE)) for i in range(steps)]


def point(engine: Any, metrics: Any) -> list[float]:
    """Loss and norms; ranks without a loss report none."""
    llm, update = engine.topology.target, metrics.update
    if llm is None or not llm.is_last_stage:
        return []
    return [float(metrics.loss), update.grad_norm, update.module_norms["encoder"]]


def assert_same(found: list[list[list[float]]], reference: list[list[float]]) -> None:
    curves = [points for points in found if points[0]]
    assert curves
    for points in curves:
        assert_parity(reference, points)
        encoder_norms = [point[2] for point in points]
        wanted = [point[2] for point in reference[: len(points)]]
        assert encoder_norms == pytest.approx(wanted, rel=1e-4)


Reference = Callable[..., list[list[float]]]


@pytest.fixture(scope="session")
def one_rank(run_ranks: Callable[..., list]) -> Reference:
    """The curve of one rank; each is run once."""

    @cache
    def reference(text_only_fraction: float = 0.0, tied: bool = False) -> list[list[float]]:
        data = {"text_only_fraction": text_only_fraction}
        (points,) = run_ranks(1, curve, ONE_RANK, data, {"tied_embeddings": tied}, STEPS)
        return points

    return reference


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_is_that_of_one_rank(
    name: str, run_ranks: Callable[..., list], one_rank: Reference
) -> None:
    chosen = LAYOUTS[name]
    assert_same(run_ranks(chosen.world_size, curve, chosen, {}, {}, STEPS), one_rank())


@pytest.mark.parametrize(
    "name",
    [
        "encoder dp 2, llm dp 3",
        "encoder dp 3, llm dp 2",
        "llm tp 2 pp 2",
        "llm cp 2",
        "encoder cp 3, llm pp 2",
        "colocated, encoder dp 2, llm pp 2",
    ],
)
def test_text_only_samples_change_nothing(
    name: str, run_ranks: Callable[..., list], one_rank: Reference
) -> None:
    chosen = LAYOUTS[name]
    # One by one, so that whole microbatches are without an image.
    data = {"text_only_fraction": 0.5, "micro_batch_size": 1}
    found = run_ranks(chosen.world_size, curve, chosen, data, {})
    assert_same(found, one_rank(0.5))


@pytest.mark.parametrize("run_ahead", [0, 3])
@pytest.mark.parametrize("name", ["encoder dp 2, llm dp 1 (fan-in)", "llm pp 2, encoder pp 2"])
def test_run_ahead_changes_nothing(
    name: str, run_ahead: int, run_ranks: Callable[..., list], one_rank: Reference
) -> None:
    chosen = LAYOUTS[name]
    # More microbatches than the encoder may be ahead.
    data = {"micro_batch_size": 2}
    found = run_ranks(chosen.world_size, curve, chosen, data, {"run_ahead": run_ahead})
    assert_same(found, one_rank())


def test_without_sequence_parallelism_too(
    run_ranks: Callable[..., list], one_rank: Reference
) -> None:
    found = run_ranks(3, curve, LAYOUTS["llm tp 2"], {}, {"sequence_parallel": False})
    assert_same(found, one_rank())


def test_tied_embeddings_on_two_stages(run_ranks: Callable[..., list], one_rank: Reference) -> None:
    found = run_ranks(3, curve, LAYOUTS["llm pp 2"], {}, {"tied_embeddings": True})
    assert_same(found, one_rank(tied=True))


def test_checking_the_bridge_changes_nothing(
    run_ranks: Callable[..., list], one_rank: Reference
) -> None:
    chosen = LAYOUTS["encoder tp 2, llm dp 2"]
    assert_same(run_ranks(4, curve, chosen, {}, {"check_bridge": True}), one_rank())


def uneven_curve(chosen: Layout) -> list[list[float]]:
    """Microbatches of one sample without rows and one with 500."""
    from megatron_mimo.training.step import train_step

    engine = small_runner(chosen, seq_length=560)
    loader = list_loader(chosen, seq_length=560, micro_batch_size=2, global_batch_size=4)
    return [point(engine, train_step(engine, loader, i + 1, 4)) for i in range(4)]


@pytest.fixture(scope="session")
def uneven_one_rank(run_ranks: Callable[..., list]) -> list[list[float]]:
    """The curve of one rank on uneven samples."""
    (points,) = run_ranks(1, uneven_curve, ONE_RANK)
    return points


@pytest.mark.parametrize(
    "name",
    [
        "encoder dp 2, llm dp 2",
        "llm tp 2, encoder tp 2",
        "llm cp 2 tp 2",
        "encoder cp 2, llm dp 2 (fan-out)",
    ],
)
def test_no_rows_beside_five_hundred(
    name: str, run_ranks: Callable[..., list], uneven_one_rank: list[list[float]]
) -> None:
    chosen = LAYOUTS[name]
    assert_same(run_ranks(chosen.world_size, uneven_curve, chosen), uneven_one_rank)


def test_the_loss_falls_and_the_encoder_learns(one_rank: Reference) -> None:
    points = one_rank()
    assert points[-1][0] < 0.7 * points[0][0]
    assert all(encoder_norm > 0 for _, _, encoder_norm in points)
