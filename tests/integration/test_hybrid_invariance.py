"""The hybrid model's curve, load-balancing loss and expert biases must not depend on the layout."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.integration.curves import assert_parity
from tests.integration.engines import (
    beside,
    layout,
    micro_batch_size,
    mock_data,
    mock_loader,
    small_runner,
)

pytestmark = pytest.mark.slow

STEPS = 15
GLOBAL_BATCH_SIZE = 4
# So large that experts' balance shows in loss and norms within a few steps.
OVERRIDES = (
    "language.pattern=ME*-ME",
    "language.moe_aux_loss_coeff=0.1",
    "language.moe_router_bias_update_rate=0.05",
    "language.ffn_hidden_size=192",
    "vision.hidden_size=64",
)
LAYOUTS = {
    "llm tp 2": beside({}, {"tp": 2}),
    "llm dp 2": beside({}, {"dp": 2}),
    "llm ep 2": beside({"dp": 2}, {"dp": 2, "ep": 2}),
    "llm ep 2 tp 2": beside({}, {"tp": 2, "ep": 2}),
    "llm ep 2 tp 2 dp 2": beside({}, {"tp": 2, "dp": 2, "ep": 2}),
    "llm ep 4 tp 2 dp 2": beside({}, {"tp": 2, "dp": 2, "ep": 4}),
    "llm expt-tp 2": beside({}, {"tp": 2, "expt_tp": 2}),
    "llm pp 2": beside({}, {"pp": 2}),
    "llm pp 2 ep 2": beside({}, {"pp": 2, "dp": 2, "ep": 2}),
    "llm cp 2": beside({}, {"cp": 2}),
    "colocated, encoder dp 2, llm dp 2 ep 2": layout({"dp": 2}, {"dp": 2, "ep": 2}),
}

Found = tuple[list[list[float]], dict[str, list[float]], list[list[float]]]


def train(
    chosen: Layout,
    overrides: tuple[str, ...] = OVERRIDES,
    recompute: tuple[str, ...] | None = None,
    reduce: dict[str, Any] | None = None,
) -> Found:
    """(loss, gradient norm) of each step, expert biases behind the last, and loads in it."""
    from megatron_mimo.training.step import train_step
    from megatron_mimo.weights.names import table_name

    engine = small_runner(
        chosen,
        steps=STEPS,
        provider="nemotron-moe-vlm-tiny",
        overrides=overrides,
        recompute=recompute,
        reduce=reduce,
    )
    loader = mock_loader(
        chosen,
        mock_data(
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=micro_batch_size(chosen, GLOBAL_BATCH_SIZE),
        ),
    )
    points: list[list[float]] = []
    loads: list[list[float]] = []
    for step in range(STEPS):
        metrics = train_step(engine, loader, step + 1, GLOBAL_BATCH_SIZE)
        points.append([float(metrics.loss), metrics.update.grad_norm])
        if metrics.experts is not None:
            loads = metrics.experts.tolist()
    language = engine.model.target
    if language is None:
        return [], {}, []
    model = language.module.model
    biases = {
        table_name(model, name, first_expert=0): buffer.tolist()
        for name, buffer in model.named_buffers()
        if name.endswith("expert_bias")
    }
    return points if language.groups.is_last_stage else [], biases, loads


@pytest.fixture(scope="module")
def one_rank(run_ranks: Callable[..., list]) -> Found:
    """What one rank finds."""
    (found,) = run_ranks(1, train, layout({}, {}))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_is_that_of_one_rank(
    name: str, run_ranks: Callable[..., list], one_rank: Any
) -> None:
    assert_same(run_ranks(LAYOUTS[name].world_size, train, LAYOUTS[name]), one_rank)


@pytest.mark.parametrize(
    "recompute",
    [("full",), ("selective", "core_attn", "mlp", "moe"), ("selective", "shared_experts")],
    ids=",".join,
)
def test_recomputing_changes_nothing(
    recompute: tuple[str, ...], run_ranks: Callable[..., list], one_rank: Any
) -> None:
    """Nor are tokens of a recomputed router counted twice."""
    chosen = LAYOUTS["llm ep 2 tp 2"]
    assert_same(run_ranks(chosen.world_size, train, chosen, OVERRIDES, recompute), one_rank)


@pytest.mark.parametrize("overlap_params", [False, True])
@pytest.mark.parametrize("name", ["llm ep 2", "llm pp 2 ep 2", "llm ep 2 tp 2 dp 2"])
def test_overlapping_changes_nothing(
    name: str, overlap_params: bool, run_ranks: Callable[..., list], one_rank: Any
) -> None:
    chosen = LAYOUTS[name]
    reduce = {"overlap_grads": True, "overlap_params": overlap_params, "num_buckets": 5}
    found = run_ranks(chosen.world_size, train, chosen, OVERRIDES, None, reduce)
    assert_same(found, one_rank)


def assert_same(found: list[Found], one_rank: Any) -> None:
    wanted, wanted_biases, wanted_loads = one_rank
    assert len(wanted_biases) == 2
    seen: set[str] = set()
    curves = 0
    for points, biases, loads in found:
        for bias, values in biases.items():
            assert values == pytest.approx(wanted_biases[bias], abs=1e-6), bias
        seen.update(biases)
        for load, wanted_load in zip(loads, wanted_loads, strict=bool(loads)):
            assert load[:-1] == wanted_load[:-1]
            assert load[-1] == pytest.approx(wanted_load[-1], rel=1e-4)
        if points:
            curves += 1
            assert len(points) == len(wanted)
            assert_parity(wanted, points)
    assert curves
    assert seen == set(wanted_biases)


def test_balance_has_its_say(run_ranks: Callable[..., list], one_rank: Any) -> None:
    """Without either means of balance the curve is another one; biases move only with theirs."""
    points, biases, loads = one_rank
    # Each token of the batch goes to two experts of each layer.
    assert [sum(load[:-1]) for load in loads] == [GLOBAL_BATCH_SIZE * 64 * 2] * 2
    # Even loads have the least loss, which is one.
    assert all(load[-1] > 1 for load in loads)
    assert all(any(values) for values in biases.values())
    for coefficient, rate in ((0.0, 0.05), (0.1, 0.0)):
        changed = (
            *OVERRIDES,
            f"language.moe_aux_loss_coeff={coefficient}",
            f"language.moe_router_bias_update_rate={rate}",
        )
        ((other, other_biases, _),) = run_ranks(1, train, layout({}, {}), changed)
        assert other[0][0] == points[0][0]
        assert other[-1] != pytest.approx(points[-1], rel=1e-4)
        assert all(any(values) == bool(rate) for values in other_biases.values())
