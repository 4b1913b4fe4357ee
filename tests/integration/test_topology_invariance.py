"""The loss curve must not depend on the layout: same seed, same global batch, any grids."""

from collections.abc import Callable
from functools import cache

import pytest

from megatron_mimo.topology import Layout
from tests.integration.engines import beside, layout, mock_data, mock_loader, small_engine

STEPS = 20
GLOBAL_BATCH_SIZE = 8


ONE_RANK = layout({}, {})
LAYOUTS = {
    "encoder dp 1, llm dp 1": beside({}, {}),
    "encoder dp 1, llm dp 2 (fan-out)": beside({}, {"dp": 2}),
    "encoder dp 2, llm dp 1 (fan-in)": beside({"dp": 2}, {}),
    "encoder dp 2, llm dp 2": beside({"dp": 2}, {"dp": 2}),
    "llm tp 2": beside({}, {"tp": 2}),
    "llm tp 2, encoder dp 2": beside({"dp": 2}, {"tp": 2}),
    "encoder tp 2": beside({"tp": 2}, {}),
    "encoder tp 2, llm tp 2": beside({"tp": 2}, {"tp": 2}),
    "encoder tp 2, llm dp 2": beside({"tp": 2}, {"dp": 2}),
    "the llm first, the encoder behind": layout({"offset": 2}, {"dp": 2}),
    "colocated, dp 2 each": layout({"dp": 2}, {"dp": 2}),
    "colocated, encoder dp 2, llm tp 2": layout({"dp": 2}, {"tp": 2}),
    "colocated, encoder dp 4, llm tp 2 dp 2": layout({"dp": 4}, {"tp": 2, "dp": 2}),
    "colocated, encoder tp 2, llm dp 2": layout({"tp": 2}, {"dp": 2}),
}


def curve(chosen: Layout, text_only_fraction: float, sequence_parallel: bool) -> list[list[float]]:
    """Train on mock data; (loss, gradient norm, encoder's norm) of each step on this rank."""
    from megatron_mimo.training.step import train_step

    engine = small_engine(chosen, sequence_parallel=sequence_parallel, steps=STEPS)
    loader = mock_loader(chosen, mock_data(text_only_fraction=text_only_fraction))
    points = []
    for iteration in range(1, STEPS + 1):
        metrics = train_step(engine, loader, iteration, GLOBAL_BATCH_SIZE)
        update = metrics.update
        points.append([float(metrics.loss), update.grad_norm, update.module_norms["encoder"]])
    return points if engine.topology.llm is not None else [[]]


@pytest.fixture(scope="session")
def one_rank(run_ranks: Callable[..., list]) -> Callable[[float], list[list[float]]]:
    """The curve of one rank, by the fraction of text-only samples; each is run once."""

    @cache
    def reference(text_only_fraction: float) -> list[list[float]]:
        (points,) = run_ranks(1, curve, ONE_RANK, text_only_fraction, True)
        return points

    return reference


def assert_same(found: list[list[list[float]]], reference: list[list[float]]) -> None:
    curves = [points for points in found if points != [[]]]
    assert curves
    for points in curves:
        losses, norms, encoder_norms = zip(*points, strict=True)
        want_losses, want_norms, want_encoder_norms = zip(*reference, strict=True)
        assert losses == pytest.approx(want_losses, rel=1e-5)
        assert norms == pytest.approx(want_norms, rel=1e-4)
        assert encoder_norms == pytest.approx(want_encoder_norms, rel=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_is_that_of_one_rank(
    name: str,
    run_ranks: Callable[..., list],
    one_rank: Callable[[float], list[list[float]]],
) -> None:
    chosen = LAYOUTS[name]
    assert_same(run_ranks(chosen.world_size, curve, chosen, 0.0, True), one_rank(0.0))


@pytest.mark.parametrize("name", ["encoder dp 2, llm dp 2", "encoder dp 2, llm dp 1 (fan-in)"])
def test_text_only_samples_change_nothing(
    name: str,
    run_ranks: Callable[..., list],
    one_rank: Callable[[float], list[list[float]]],
) -> None:
    chosen = LAYOUTS[name]
    assert_same(run_ranks(chosen.world_size, curve, chosen, 0.5, True), one_rank(0.5))


def test_without_sequence_parallelism_too(
    run_ranks: Callable[..., list], one_rank: Callable[[float], list[list[float]]]
) -> None:
    assert_same(run_ranks(3, curve, LAYOUTS["llm tp 2"], 0.0, False), one_rank(0.0))


def test_the_loss_falls_and_the_encoder_learns(
    one_rank: Callable[[float], list[list[float]]],
) -> None:
    points = one_rank(0.0)
    assert points[-1][0] < 0.8 * points[0][0]
    assert all(encoder_norm > 0 for _, _, encoder_norm in points)
