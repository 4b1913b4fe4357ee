"""float16 with scaled losses: the scale finds its height, and the curve is that of float32."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.engines import beside, layout, mock_data, mock_loader, small_runner

STEPS, GLOBAL_BATCH_SIZE = 24, 4
# At 1e-3 rounding sends tokens to other experts after six steps, by which losses differ by 2 %,
# more or less with every loss scale; at half of it they differ by 0.3 %.
LEARNING_RATE = 5e-4
OVERRIDES = (
    "language.pattern=ME*-",
    "language.moe_aux_loss_coeff=0.1",
    "language.ffn_hidden_size=192",
    "vision.hidden_size=64",
)
LAYOUTS = {
    "one rank": layout({}, {}),
    "llm ep 2": beside({}, {"dp": 2, "ep": 2}),
    "encoder dp 2, llm pp 2": beside({"dp": 2}, {"pp": 2}),
}


def train(chosen: Layout, fp16: bool, scale: dict[str, Any] | None) -> list[list[float]]:
    """(loss, norm, loss scale, applied) of each step on this rank; a loss of 0 without one."""
    from megatron_mimo.training.step import train_step

    engine = small_runner(
        chosen,
        steps=STEPS,
        lr=LEARNING_RATE,
        provider="nemotron-moe-vlm-tiny",
        overrides=OVERRIDES,
        fp16=fp16,
        scale=scale,
    )
    loader = mock_loader(chosen, mock_data(global_batch_size=GLOBAL_BATCH_SIZE))
    points = []
    for step in range(STEPS):
        metrics = train_step(engine, loader, step + 1, GLOBAL_BATCH_SIZE)
        llm, update = engine.topology.target, metrics.update
        loss = float(metrics.loss) if llm is not None and llm.is_last_stage else 0.0
        points.append([loss, update.grad_norm, update.loss_scale, update.applied])
    return points


def curve(found: list[list[list[float]]]) -> list[list[float]]:
    """Of a rank with losses."""
    return next(points for points in found if points[0][0])


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "one rank"))
def test_a_fixed_scale_changes_nothing_but_rounding(
    name: str, run_ranks: Callable[..., list]
) -> None:
    (wanted,) = run_ranks(1, train, LAYOUTS["one rank"], False, None)
    chosen = LAYOUTS[name]
    found = curve(run_ranks(chosen.world_size, train, chosen, True, {"constant": 1024.0}))
    assert all(applied and scale == 1024 for _, _, scale, applied in found)
    for (loss, norm, _, _), (wanted_loss, wanted_norm, _, _) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=0.02)
        assert norm == pytest.approx(wanted_norm, rel=0.1)


def test_the_scale_comes_down_to_what_float16_holds(run_ranks: Callable[..., list]) -> None:
    chosen = LAYOUTS["llm ep 2"]
    ranks = run_ranks(chosen.world_size, train, chosen, True, {"initial": 2.0**24})
    # Whichever module's gradients overflow, every rank skips and halves alike.
    assert (
        len({tuple((scale, applied) for _, _, scale, applied in points) for points in ranks}) == 1
    )
    found = curve(ranks)
    skipped = [scale for _, _, scale, applied in found if not applied]
    assert skipped and skipped[0] == 2.0**24
    assert not any(applied for _, _, _, applied in found[: len(skipped)])
    # The first time hysteresis forgives one.
    assert [found[i][2] for i in range(len(skipped))] == [
        2.0 ** (24 - max(0, i - 1)) for i in range(len(skipped))
    ]
    assert found[-1][0] < found[0][0]


@pytest.mark.slow
def test_a_scale_that_is_too_large_everywhere_changes_nothing(
    run_ranks: Callable[..., list],
) -> None:
    chosen = LAYOUTS["llm ep 2"]
    found = curve(run_ranks(chosen.world_size, train, chosen, True, {"constant": 2.0**60}))
    assert not any(applied for _, _, _, applied in found)
