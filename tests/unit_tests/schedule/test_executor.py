"""Whole steps of a toy model over real process groups, checked against its closed form."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_mimo.topology import Layout, balanced
from tests.unit_tests.schedule.toy import grids, modules, sharding_of

LAYOUTS = {
    "one rank": (grids({}, {}, colocated=True), False),
    "llm alone, pp 3": (grids(None, {"pp": 3}), False),
    "fan-out 2 to 3, encoder tp 2": (grids({"dp": 2, "tp": 2}, {"dp": 3}), False),
    "fan-in 3 to 2": (grids({"dp": 3}, {"dp": 2}), False),
    "llm tp 2 replicated, encoder tp 2": (grids({"tp": 2}, {"tp": 2}), False),
    "llm tp 2 sharded": (grids({}, {"tp": 2}), True),
    "llm cp 2 tp 2 sharded, encoder dp 2": (grids({"dp": 2}, {"tp": 2, "cp": 2}), True),
    "llm pp 3": (grids({"dp": 2}, {"pp": 3}), False),
    "encoder pp 3": (grids({"pp": 3}, {"dp": 2}), False),
    "pp 2 on both, llm tp 2": (grids({"pp": 2}, {"pp": 2, "tp": 2}), True),
    "colocated, encoder dp 4, llm tp 2 dp 2": (
        grids({"dp": 4}, {"tp": 2, "dp": 2}, colocated=True),
        True,
    ),
    "colocated, encoder tp 2, llm dp 2": (grids({"tp": 2}, {"dp": 2}, colocated=True), False),
    "colocated, encoder dp 4, llm pp 2 cp 2": (
        grids({"dp": 4}, {"pp": 2, "cp": 2}, colocated=True),
        False,
    ),
    "colocated, encoder pp 2 dp 2, llm pp 2 tp 2": (
        grids({"pp": 2, "dp": 2}, {"pp": 2, "tp": 2}, colocated=True),
        True,
    ),
    "colocated, encoder pp 2, llm tp 2": (grids({"pp": 2}, {"tp": 2}, colocated=True), True),
    "items anywhere, encoder tp 2": (
        balanced(grids({"dp": 2, "tp": 2}, {"dp": 3})),
        False,
    ),
    "items anywhere, grids that overlap": (
        balanced(modules(vision={"dp": 3}, llm={"offset": 1, "dp": 2, "pp": 2})),
        False,
    ),
    "three grids apart": (
        modules(vision={"dp": 2}, audio={"offset": 2}, llm={"offset": 3, "dp": 2}),
        False,
    ),
    "two sources together, apart from a pipeline": (
        modules(vision={"tp": 2}, audio={"dp": 2}, llm={"offset": 2, "pp": 2}),
        False,
    ),
    "a source on a part of the target's ranks": (
        modules(vision={"dp": 2}, audio={"offset": 1, "pp": 2}, llm={"dp": 4}),
        False,
    ),
    "a replica uses another's rows": (modules(vision={"dp": 2}, llm={"dp": 4}), False),
    "a source that reaches over the target's end": (
        modules(vision={"dp": 3, "offset": 1}, llm={"tp": 2}),
        True,
    ),
    "a source under the second stage": (
        modules(vision={"dp": 2, "offset": 2}, llm={"pp": 2, "tp": 2}),
        True,
    ),
    "four grids over each other": (
        modules(
            vision={"dp": 2},
            audio={"offset": 1, "pp": 2},
            video={"offset": 2, "tp": 2},
            llm={"offset": 0, "pp": 2, "tp": 2},
        ),
        True,
    ),
}


def step(layout: Layout, sequence_parallel: bool = True, **settings: Any) -> None:
    """Run a step twice, so that buffers are used again, and check this rank's gradients."""
    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.schedule.toy_program import Settings, Toy

    toy = Toy(build_topology(layout), sharding_of(layout, sequence_parallel), Settings(**settings))
    for _ in range(2):
        toy.run()
        toy.check()


def step_with(layout: Layout, settings: dict[str, Any]) -> None:
    step(layout, **settings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_and_gradients_cross_every_layout(name: str, run_ranks: Callable[..., list]) -> None:
    layout, sequence_parallel = LAYOUTS[name]
    run_ranks(layout.world_size, step, layout, sequence_parallel)


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_ends_agree_when_they_compare(name: str, run_ranks: Callable[..., list]) -> None:
    layout, sequence_parallel = LAYOUTS[name]
    settings = {"check": True, "sequence_parallel": sequence_parallel}
    run_ranks(layout.world_size, step_with, layout, settings)


@pytest.mark.parametrize("run_ahead", [0, 3, 9])
def test_any_run_ahead(run_ahead: int, run_ranks: Callable[..., list]) -> None:
    run_ranks(4, step_with, grids({"pp": 2}, {"pp": 2}), {"run_ahead": run_ahead})


@pytest.mark.parametrize("num_microbatches", [1, 2, 8])
def test_any_number_of_microbatches(num_microbatches: int, run_ranks: Callable[..., list]) -> None:
    run_ranks(5, step_with, grids({"dp": 2}, {"pp": 3}), {"num_microbatches": num_microbatches})


FLOWS = {
    "vision frozen": {"fixed": frozenset({"encoder"})},
    "encoder side frozen": {"still": frozenset({"encoder"})},
    "language frozen": {"target_trains": False},
    "vision and language frozen": {"fixed": frozenset({"encoder"}), "target_trains": False},
    "evaluation": {"gradients": False},
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    "layout",
    [
        grids({"pp": 2}, {"pp": 2, "tp": 2}),
        grids({"pp": 2, "dp": 2}, {"pp": 2, "tp": 2}, colocated=True),
        modules(audio={"pp": 2}, encoder={"offset": 1, "pp": 2}, llm={"offset": 2, "pp": 2}),
    ],
    ids=["disjoint", "colocated", "overlapping"],
)
def test_frozen_parts_send_no_gradients(
    flow: str, layout: Layout, run_ranks: Callable[..., list]
) -> None:
    run_ranks(layout.world_size, step_with, layout, FLOWS[flow])


def buffers_left(layout: Layout, gradients: bool) -> int:
    """Buffers of rows that a rank made for 8 microbatches and got back."""
    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.schedule.toy_program import Settings, Toy

    settings = Settings(num_microbatches=8, gradients=gradients)
    toy = Toy(build_topology(layout), sharding_of(layout, False), settings)
    toy.run()
    if "encoder" not in toy.executor._bridges:
        return 0
    return len(toy.executor._bridges["encoder"].forward._pool._free)


@pytest.mark.parametrize("gradients", [True, False])
def test_no_more_buffers_than_microbatches_in_flight(
    gradients: bool, run_ranks: Callable[..., list]
) -> None:
    """Of three microbatches in a row only two have rows, so at most two are on this rank."""
    assert run_ranks(3, buffers_left, grids({}, {"pp": 2}), gradients) == [0, 2, 0]
