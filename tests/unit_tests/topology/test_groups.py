"""Groups on real ranks against the pure description of the grid."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from megatron_mimo.topology import Layout, ModuleGridSpec

LAYOUTS = {
    "disjoint": Layout(
        encoder=ModuleGridSpec(name="encoder", dp=2),
        llm=ModuleGridSpec(name="llm", offset=2, tp=2),
        world_size=4,
    ),
    "pipeline": Layout(
        encoder=ModuleGridSpec(name="encoder"),
        llm=ModuleGridSpec(name="llm", offset=1, pp=3),
        world_size=4,
    ),
    "colocated": Layout(
        encoder=ModuleGridSpec(name="encoder", dp=4),
        llm=ModuleGridSpec(name="llm", tp=2, dp=2, ep=4),
        world_size=4,
    ),
    "language only": Layout(encoder=None, llm=ModuleGridSpec(name="llm", tp=2, pp=2), world_size=4),
}

# Field -> axes of the dense view that its group spans.
DENSE = {
    "tp": ("tp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "mp": ("tp", "pp"),
    "dp_cp": ("cp", "dp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}


def describe_groups(layout: Layout) -> dict[str, dict[str, list[int]]]:
    """Ranks of every group of this rank, by module and field."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mimo.topology.groups import build_topology

    topology = build_topology(layout)
    found = {}
    for module in (topology.encoder, topology.llm):
        if module is not None:
            assert isinstance(module.pg_collection, ProcessGroupCollection)
            found[module.spec.name] = {
                field: dist.get_process_group_ranks(group)
                for field, group in vars(module.pg_collection).items()
                if group is not None
            }
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_span_the_ranks_of_their_axes(name: str, run_ranks: Callable[..., list]) -> None:
    layout = LAYOUTS[name]
    found = run_ranks(4, describe_groups, layout)
    for rank, modules in enumerate(found):
        assert set(modules) == {grid.name for grid in layout.grids if rank in grid.ranks}
        for grid in layout.grids:
            if rank not in grid.ranks:
                continue
            for field, axes in DENSE.items():
                (expected,) = [group for group in grid.groups(*axes) if rank in group]
                assert sorted(modules[grid.name][field]) == sorted(expected), (field, rank)


def test_embedding_groups_join_the_ends_of_a_pipeline(run_ranks: Callable[..., list]) -> None:
    found = run_ranks(4, describe_groups, LAYOUTS["pipeline"])
    assert found[1]["llm"]["embd"] == found[3]["llm"]["embd"] == [1, 3]
    assert "embd" not in found[2]["llm"]
    assert found[1]["llm"]["pos_embd"] == [1]


def test_expert_groups_come_from_the_expert_view(run_ranks: Callable[..., list]) -> None:
    found = run_ranks(4, describe_groups, LAYOUTS["colocated"])
    assert [sorted(modules["llm"]["ep"]) for modules in found] == [[0, 1, 2, 3]] * 4
    assert [modules["llm"]["expt_dp"] for modules in found] == [[0], [1], [2], [3]]


def build_for_another_world(layout: Layout) -> None:
    from megatron_mimo.topology.groups import build_topology

    with pytest.raises(RuntimeError, match="the layout is for 4 ranks, but 2 are running"):
        build_topology(layout)


def wait_for_nobody(layout: Layout) -> list[str]:
    import torch
    import torch.distributed as dist

    from megatron_mimo.topology.groups import build_topology

    topology = build_topology(layout, timeout=timedelta(seconds=1))
    if topology.rank == 1:
        return []
    groups = [topology.control, topology.bridge.forward]
    assert topology.encoder is not None
    groups.append(topology.encoder.pg_collection.dp)
    errors = []
    for group in groups:
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(torch.zeros(1), group=group)
        errors.append(str(error.value))
    with pytest.raises(RuntimeError) as error:
        dist.irecv(torch.zeros(1), src=1, group=topology.bridge.backward).wait()
    return [*errors, str(error.value)]


def test_no_group_waits_longer_than_the_timeout(run_ranks: Callable[..., list]) -> None:
    encoder = ModuleGridSpec(name="encoder", dp=2)
    llm = ModuleGridSpec(name="llm", dp=2)
    errors, _ = run_ranks(2, wait_for_nobody, Layout(encoder=encoder, llm=llm, world_size=2))
    assert len(errors) == 4
    assert all("imed out" in error for error in errors), errors


def test_a_layout_of_another_world_is_refused(run_ranks: Callable[..., list]) -> None:
    run_ranks(2, build_for_another_world, LAYOUTS["disjoint"])
