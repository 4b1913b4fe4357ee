"""Groups on real ranks against the pure description of the grid."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from megatron_mimo.topology import Layout, ModuleGridSpec
from megatron_mimo.topology.group_plan import bridge_ranks

LAYOUTS = {
    "disjoint": Layout.of(
        ModuleGridSpec(name="encoder", dp=2),
        ModuleGridSpec(name="llm", offset=2, tp=2),
        world_size=4,
    ),
    "pipeline": Layout.of(
        ModuleGridSpec(name="encoder"), ModuleGridSpec(name="llm", offset=1, pp=3), world_size=4
    ),
    "colocated": Layout.of(
        ModuleGridSpec(name="encoder", dp=4),
        ModuleGridSpec(name="llm", tp=2, dp=2, ep=4),
        world_size=4,
    ),
    "language only": Layout.of(ModuleGridSpec(name="llm", tp=2, pp=2), world_size=4),
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
    for name, module in topology.modules.items():
        assert isinstance(module.pg_collection, ProcessGroupCollection)
        found[name] = {
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
        assert set(modules) == {name for name, grid in layout.modules.items() if rank in grid.ranks}
        for grid in layout.modules.values():
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
    bridge = topology.bridges["encoder"]
    groups = [topology.control, bridge.forward, topology.modules["encoder"].pg_collection.dp]
    errors = []
    for group in groups:
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(torch.zeros(1), group=group)
        errors.append(str(error.value))
    with pytest.raises(RuntimeError) as error:
        dist.irecv(torch.zeros(1), src=1, group=bridge.backward).wait()
    return [*errors, str(error.value)]


def test_no_group_waits_longer_than_the_timeout(run_ranks: Callable[..., list]) -> None:
    encoder = ModuleGridSpec(name="encoder", dp=2)
    llm = ModuleGridSpec(name="llm", tp=2)
    errors, _ = run_ranks(2, wait_for_nobody, Layout.of(encoder, llm, world_size=2))
    assert len(errors) == 4
    assert all("imed out" in error for error in errors), errors


def test_a_layout_of_another_world_is_refused(run_ranks: Callable[..., list]) -> None:
    run_ranks(2, build_for_another_world, LAYOUTS["disjoint"])


MANY = Layout.of(
    ModuleGridSpec(name="vision", dp=2),
    ModuleGridSpec(name="audio", offset=1, pp=2),
    ModuleGridSpec(name="video", offset=3),
    ModuleGridSpec(name="llm", offset=4, pp=2, dp=2),
    world_size=8,
)


def talkers(layout: Layout) -> dict[str, list[list[int]]]:
    """Ranks of both groups of each boundary that this rank takes part in."""
    import torch.distributed as dist

    from megatron_mimo.topology.groups import build_topology

    topology = build_topology(layout)
    boundaries = {f"bridge of {name}": groups for name, groups in topology.bridges.items()}
    for name, pair in topology.pipelines.items():
        boundaries |= {f"{name} stages {k}": groups for k, groups in enumerate(pair)}
    return {
        name: [dist.get_process_group_ranks(group) for group in (both.forward, both.backward)]
        for name, both in boundaries.items()
    }


def test_the_groups_of_a_boundary_span_the_ranks_that_talk(run_ranks: Callable[..., list]) -> None:
    found = run_ranks(8, talkers, MANY)
    stages = ["audio stages 0", "audio stages 1"]
    expected = {
        # Each vision rank serves a lane.
        0: {"bridge of vision": [0, 4]},
        1: {"bridge of vision": [1, 5]} | {key: [1, 2] for key in stages},
        2: {"bridge of audio": [2, 4, 5]} | {key: [1, 2] for key in stages},
        3: {"bridge of video": [3, 4, 5]},
        4: {"bridge of vision": [0, 4], "bridge of audio": [2, 4, 5], "bridge of video": [3, 4, 5]}
        | {"llm stages 0": [4, 6], "llm stages 1": [4, 6]},
        7: {"llm stages 0": [5, 7], "llm stages 1": [5, 7]},
    }
    for rank, boundaries in expected.items():
        assert found[rank] == {name: [ranks, ranks] for name, ranks in boundaries.items()}


def test_sets_with_a_rank_in_common_are_one() -> None:
    """Rank 1 makes rows for lanes 2 and 3, and uses those that rank 0 makes for lane 1."""
    layout = Layout.of(
        ModuleGridSpec(name="vision", dp=2), ModuleGridSpec(name="llm", dp=4), world_size=4
    )
    assert bridge_ranks(layout, "vision") == [(0, 1, 2, 3)]


def in_strict_groups(layout: Layout) -> tuple[dict[str, str], list[float]]:
    """Backend of each group of this rank, and what arrives over each boundary at once."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.topology.groups import build_topology
    from tests.strict.install import StrictDevice, strict_groups

    with strict_groups():
        topology = build_topology(layout, device=StrictDevice("cpu"))
        groups = {"world": dist.group.WORLD, "control": topology.control}
        for name, module in topology.modules.items():
            groups[f"{name} stage hosts"] = module.stage_hosts
            groups |= {
                f"{name} {field}": group
                for field, group in vars(module.pg_collection).items()
                if group is not None
            }
        arrived = []
        pairs = [*topology.bridges.values(), *sum(topology.pipelines.values(), ())]
        for group in [group for both in pairs for group in (both.forward, both.backward)]:
            ranks = dist.get_process_group_ranks(group)
            tensor = torch.full((1,), float(topology.rank), device=torch.device("cpu"))
            if topology.rank == ranks[0]:
                dist.send(tensor, ranks[-1], group=group)
            elif topology.rank == ranks[-1]:
                dist.recv(tensor, ranks[0], group=group)
                arrived.append(float(tensor))
        return {name: dist.get_backend(group) for name, group in groups.items()}, arrived


def test_device_groups_have_its_backend_and_take_messages_at_once(
    run_ranks: Callable[..., list],
) -> None:
    found = run_ranks(4, in_strict_groups, LAYOUTS["pipeline"])
    for backends, _ in found:
        hosts = {name for name, backend in backends.items() if backend == "gloo"}
        assert hosts == {name for name in backends if name.endswith(("world", "control", "hosts"))}
        assert set(backends.values()) == {"gloo", "strict"}
    # The bridge is between ranks 0 and 1, the stages are on ranks 1 to 3.
    assert [arrived for _, arrived in found] == [[], [0, 0], [], [1, 1, 1, 1]]


def post_ahead() -> float:
    """What rank 1 receives of a message that is sent only after it has posted the receive."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.topology.groups import build_topology

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_GLOO_LAZY_INIT", "1")
        (boundary, _) = build_topology(
            Layout.of(ModuleGridSpec(name="llm", pp=2), world_size=2)
        ).pipelines["llm"]
    if dist.get_rank() == 0:
        dist.barrier()
        dist.send(torch.ones(1), 1, group=boundary.forward)
        return 0.0
    row = torch.zeros(1)
    work = dist.irecv(row, 0, group=boundary.forward)
    dist.barrier()
    assert work is not None
    work.wait()
    return float(row)


def test_a_receive_is_posted_without_its_sender(run_ranks: Callable[..., list]) -> None:
    """Schedules post receives ahead; one that waited for its sender would be a deadlock."""
    assert run_ranks(2, post_ahead, timeout=30) == [0.0, 1.0]
