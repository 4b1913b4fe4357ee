"""Items run where there is least to do, and the curve is still that of one rank."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from megatron_mimo.topology import Layout, balanced
from tests.harness.slices import slow_but
from tests.integration.curves import assert_parity
from tests.integration.engines import (
    beside,
    layout,
    micro_batch_size,
    mock_data,
    shared_loader,
    small_runner,
)
from tests.integration.state import Part, assemble, assert_same_state, parts_of

STEPS = 50
FEWER_STEPS = 5
GLOBAL_BATCH_SIZE = 12

ONE_RANK = layout({}, {})
LAYOUTS = {
    "encoder dp 2, llm dp 4 (fan-out)": beside({"dp": 2}, {"dp": 4}),
    "encoder dp 2, llm dp 1 (fan-in)": beside({"dp": 2}, {}),
    "encoder dp 2, llm dp 2": beside({"dp": 2}, {"dp": 2}),
    "encoder dp 2, llm dp 3": beside({"dp": 2}, {"dp": 3}),
    "encoder dp 3, llm dp 2": beside({"dp": 3}, {"dp": 2}),
    "encoder tp 2 dp 2, llm dp 2": beside({"tp": 2, "dp": 2}, {"dp": 2}),
    "encoder pp 2 dp 2, llm dp 2": beside({"pp": 2, "dp": 2}, {"dp": 2}),
    "encoder dp 2, llm tp 2 dp 2": beside({"dp": 2}, {"tp": 2, "dp": 2}),
    "encoder dp 2, llm pp 2 dp 2": beside({"dp": 2}, {"pp": 2, "dp": 2}),
    "encoder dp 2, llm cp 2 dp 2": beside({"dp": 2}, {"cp": 2, "dp": 2}),
    "the llm first, the encoder behind": layout({"dp": 2, "offset": 3}, {"dp": 3}),
    "colocated, dp 2 each": layout({"dp": 2}, {"dp": 2}),
    "colocated, encoder dp 4, llm tp 2 dp 2": layout({"dp": 4}, {"tp": 2, "dp": 2}),
    "colocated, encoder tp 2 dp 2, llm dp 4": layout({"tp": 2, "dp": 2}, {"dp": 4}),
    "colocated, encoder dp 2, llm pp 2": layout({"dp": 2}, {"pp": 2}),
    "grids that overlap": layout({"dp": 3}, {"dp": 3, "offset": 1}),
}
# All replicas of the encoder read the only lane.
EVERY_HOME = ("encoder dp 2, llm dp 1 (fan-in)", "colocated, encoder dp 2, llm pp 2")

Found = tuple[list[list[float]], list[Part], int]


def train(
    chosen: Layout,
    steps: int,
    window: int = 1,
    check_bridge: bool = False,
    run_ahead: int = 1,
) -> Found:
    """(loss, norms) of each step, all that was learnt in the first, and bytes that arrived."""
    from megatron_mimo.data import ByteTokenizer, build_train_loader
    from megatron_mimo.training.step import train_step

    runner = small_runner(chosen, steps=STEPS, check_bridge=check_bridge, run_ahead=run_ahead)
    size = micro_batch_size(chosen, GLOBAL_BATCH_SIZE)
    data = mock_data(
        global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=size, text_only_fraction=0.3
    )
    loader = shared_loader(
        chosen,
        data,
        runner,
        lambda role, dispatcher: build_train_loader(data, role, ByteTokenizer(), dispatcher),
        window=window,
    )
    points: list[list[float]] = []
    learnt: list[Part] = []
    received = 0
    llm = runner.topology.target
    for step in range(steps):
        data_of_step = loader.next_step()
        if data_of_step.dispatch is not None:
            received += sum(each.received for each in data_of_step.dispatch.modules.values())
        metrics = train_step(runner, Once(data_of_step), step + 1, GLOBAL_BATCH_SIZE)
        if llm is not None and llm.is_last_stage:
            norms = [metrics.update.grad_norm, metrics.update.module_norms["encoder"]]
            points.append([float(metrics.loss), *norms])
        if not step:
            learnt = parts_of(runner)
    loader.close()
    return points, learnt, received


class Once:
    """A loader of a step that has been drawn."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def next_step(self) -> Any:
        return self._step


@pytest.fixture(scope="session")
def one_rank(run_ranks: Callable[..., list]) -> Callable[[int], Found]:
    @cache
    def reference(steps: int) -> Found:
        (found,) = run_ranks(1, train, ONE_RANK, steps)
        return found

    return reference


def assert_same(found: list[Found], wanted: Found) -> int:
    """The same curve and gradients; number of bytes that moved."""
    curves = [points for points, _, _ in found if points]
    assert curves
    for points in curves:
        assert_parity(wanted[0], points)
        norms = [point[2] for point in points]
        assert norms == pytest.approx([p[2] for p in wanted[0][: len(norms)]], rel=1e-4)
    assert_same_state(assemble(parts for _, parts, _ in found), assemble([wanted[1]]))
    return sum(received for *_, received in found)


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "encoder dp 3, llm dp 2"))
def test_curve_and_every_gradient_are_those_of_one_rank(
    name: str, run_ranks: Callable[..., list], one_rank: Callable[[int], Found]
) -> None:
    chosen = balanced(LAYOUTS[name])
    steps = FEWER_STEPS if name == "encoder dp 3, llm dp 2" else STEPS
    found = run_ranks(chosen.world_size, train, chosen, steps)
    moved = assert_same(found, one_rank(steps))
    assert (moved > 0) == (name not in EVERY_HOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder tp 2 dp 2, llm dp 2", "grids that overlap"])
@pytest.mark.parametrize(
    "settings",
    # Microbatches that are balanced together, whether ends compare, and how far sources are ahead.
    [(2, False, 1), (9, False, 1), (1, True, 1), (1, False, 3)],
    ids=["window 2", "window 9", "check bridge", "run ahead 3"],
)
def test_settings_change_no_curve(
    name: str,
    settings: tuple[int, bool, int],
    run_ranks: Callable[..., list],
    one_rank: Callable[[int], Found],
) -> None:
    chosen = balanced(LAYOUTS[name])
    found = run_ranks(chosen.world_size, train, chosen, FEWER_STEPS, *settings)
    assert assert_same(found, one_rank(FEWER_STEPS)) > 0


@pytest.mark.slow
def test_nor_do_groups_of_replicas(
    run_ranks: Callable[..., list], one_rank: Callable[[int], Found]
) -> None:
    chosen = balanced(beside({"dp": 4}, {"dp": 4}), 2)
    found = run_ranks(chosen.world_size, train, chosen, FEWER_STEPS)
    assert assert_same(found, one_rank(FEWER_STEPS)) > 0
