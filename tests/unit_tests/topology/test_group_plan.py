"""Groups before they are made: who is in them, what travels in them, how many a rank has."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_mimo.topology import Layout, ModuleGridSpec
from megatron_mimo.topology.group_plan import FIELDS, Carries, group_sizes, planned_groups

LAYOUT = Layout.of(
    ModuleGridSpec(name="encoder", dp=2),
    ModuleGridSpec(name="llm", offset=2, pp=2),
    world_size=4,
)
# One lane's encoder is on its own ranks, the other module's ranks have both.
PARTLY_ALONE = Layout.of(
    ModuleGridSpec(name="vision", dp=2),
    ModuleGridSpec(name="llm", offset=1, tp=2, cp=2),
    world_size=5,
)


def _sizes(layout: Layout) -> list[int]:
    """Sizes of the groups that this rank has in fact."""
    import torch.distributed as dist

    from megatron_mimo.topology.groups import build_topology

    before = set(dist.distributed_c10d._world.pg_map)
    build_topology(layout)
    made = set(dist.distributed_c10d._world.pg_map) - before
    return sorted(dist.get_world_size(group) for group in made)


def test_no_group_is_forgotten(run_ranks: Callable[..., Any]) -> None:
    for rank, found in enumerate(run_ranks(4, _sizes, LAYOUT)):
        sizes = group_sizes(LAYOUT, rank, 1)
        counted = [size for carried in Carries for size in sizes[carried]]
        for size in set(found):
            assert found.count(size) <= counted.count(size), (rank, size)
        # The world's own and that of checkpoints are made elsewhere.
        larger = sorted(size for size in counted if size > 1)
        assert larger == sorted([size for size in found if size > 1] + 2 * [4])


def test_groups_of_one_rank_are_one_group(run_ranks: Callable[..., Any]) -> None:
    assert all(found.count(1) == 1 for found in run_ranks(4, _sizes, LAYOUT))


def test_the_device_has_its_backend_and_the_hosts_have_gloo() -> None:
    backends = {group.name: group.backend("nccl") for group in planned_groups(LAYOUT)}
    assert len(backends) == len(planned_groups(LAYOUT))
    hosts = [name for name, backend in backends.items() if backend != "nccl"]
    assert hosts == ["encoder stage hosts", "llm stage hosts", "control"]
    assert {backends[name] for name in hosts} == {"gloo"}
    assert {group.backend("gloo") for group in planned_groups(LAYOUT)} == {"gloo"}


def test_messages_travel_over_bridges_pipelines_and_context_parallel_groups() -> None:
    found = [group.name for group in planned_groups(LAYOUT) if group.carries is Carries.MESSAGES]
    assert found == [
        "encoder cp",
        "llm cp",
        "bridge of encoder forward",
        "bridge of encoder backward",
        "llm stages 0 forward",
        "llm stages 0 backward",
        "llm stages 1 forward",
        "llm stages 1 backward",
    ]


@pytest.mark.parametrize("layout", [LAYOUT, PARTLY_ALONE], ids=["pipeline", "partly alone"])
def test_a_rank_is_in_one_group_of_each_purpose(layout: Layout) -> None:
    for group in planned_groups(layout):
        ranks = [rank for one in group.sets for rank in one]
        assert len(ranks) == len(set(ranks)), group.name


def as_megatron_core_has_them(spec: ModuleGridSpec) -> dict[str, list[list[int]]]:
    """Sets of each field, from megatron-core's own grid."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    from megatron_mimo.topology.spec import AXES, EXPERT_AXES

    with pytest.MonkeyPatch.context() as patch:
        # Only numbers are asked for, of a world that is not running.
        patch.setenv("WORLD_SIZE", str(spec.ranks.stop))
        grid = HyperCommGrid(list(spec.shape), list(AXES), rank_offset=spec.offset)
    grid.register_view("expert", list(spec.expert_shape), list(EXPERT_AXES), shared_dims=["pp"])
    return {
        name: grid.get_rank_enum(list(axes), view=None if set(axes) <= set(AXES) else "expert")
        for name, axes in FIELDS
    }


def test_sets_are_those_of_megatron_core(run_ranks: Callable[..., Any]) -> None:
    llm = ModuleGridSpec(name="llm", offset=2, tp=2, cp=2, dp=3, pp=2, ep=3, expt_tp=2)
    (found,) = run_ranks(1, as_megatron_core_has_them, llm)
    layout = Layout.of(ModuleGridSpec(name="encoder", dp=2), llm, world_size=26)
    planned = {group.name: group.sets for group in planned_groups(layout)}
    for name, _ in FIELDS:
        assert sorted(planned[f"llm {name}"]) == sorted(
            tuple(sorted(ranks)) for ranks in found[name]
        ), name
    assert len(planned["llm ep"]) == 8 and len(planned["llm expt_dp"]) == 12


def test_ranks_alone_in_a_set_make_the_groups_of_others_too(run_ranks: Callable[..., Any]) -> None:
    """Rank 0 alone has a set of its own in some groups, and all have the same number of others."""
    found = run_ranks(5, _sizes, PARTLY_ALONE)
    assert found[0].count(1) == 1 and 4 not in found[0]
