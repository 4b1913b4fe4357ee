"""Rows over real process groups: each row carries its own name, so that a misplaced one shows."""

from collections.abc import Callable

import pytest

from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.topology import Layout, ModuleGridSpec

WIDTH = 3


def layout(encoder: dict[str, int], llm: dict[str, int]) -> Layout:
    encoder_grid = ModuleGridSpec(name="encoder", **encoder)
    llm_grid = ModuleGridSpec(name="llm", **llm)
    return Layout(
        encoder=encoder_grid,
        llm=llm_grid,
        world_size=max(encoder_grid.ranks.stop, llm_grid.ranks.stop),
    )


LAYOUTS = {
    "fan-out": layout({"dp": 1}, {"offset": 1, "dp": 3}),
    "fan-in": layout({"dp": 3}, {"offset": 3, "dp": 1}),
    "tensor parallel both": layout({"tp": 2}, {"offset": 2, "tp": 2}),
    "colocated": layout({"dp": 4}, {"tp": 2, "dp": 2}),
}


def manifest_for(chosen: Layout) -> Manifest:
    """Images of uneven sizes, some without rows, dealt to encoder ranks in turn."""
    assert chosen.encoder is not None
    sizes = (2, 0, 5, 1)
    return tuple(
        ManifestEntry(lane, (lane + image) % chosen.encoder.dp, rows)
        for lane in range(chosen.num_lanes)
        for image, rows in enumerate(sizes)
    )


def round_trip(chosen: Layout) -> None:
    """Send named rows forward and doubled rows back; check both on every rank."""
    import torch

    from megatron_mimo.bridge.plan import encoder_plan, language_plan
    from megatron_mimo.bridge.transport import Direction, LocalRows, post_receive, post_send
    from megatron_mimo.topology.groups import build_topology

    topology = build_topology(chosen)
    rank, manifest, local = topology.rank, manifest_for(chosen), LocalRows()
    forward = Direction(name="rows", group=topology.rows_group, local=local)
    back = Direction(name="grads", group=topology.grads_group, local=local)
    kind = {"rank": rank, "width": WIDTH, "dtype": torch.float32, "device": torch.device("cpu")}

    def named(keep: Callable[[ManifestEntry], bool]) -> torch.Tensor:
        names = [
            100.0 * index + row
            for index, entry in enumerate(manifest)
            if keep(entry)
            for row in range(entry.rows)
        ]
        return torch.tensor(names).unsqueeze(1).expand(-1, WIDTH).contiguous()

    sends, expected_gradients, posted_gradients = [], None, None
    if topology.encoder is not None:
        plan = encoder_plan(chosen, rank, manifest)
        rows = named(lambda entry: entry.encoder_rank == topology.encoder.place.dp)
        posted_gradients = post_receive(plan, back, 0, **kind)
        sends.append(post_send(plan, forward, 0, rows, rank=rank))
        expected_gradients = 2 * rows
    if topology.llm is not None:
        plan = language_plan(chosen, rank, manifest)
        rows = post_receive(plan, forward, 0, **kind).wait()
        assert torch.equal(rows, named(lambda entry: entry.lane == topology.llm.place.dp))
        sends.append(post_send(plan, back, 0, 2 * rows, rank=rank))
    if posted_gradients is not None:
        assert torch.equal(posted_gradients.wait(), expected_gradients)
    for send in sends:
        send.wait()


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_and_gradients_arrive_in_order(name: str, run_ranks: Callable[..., list]) -> None:
    run_ranks(4, round_trip, LAYOUTS[name])


def send_too_few() -> None:
    import torch

    from megatron_mimo.bridge.plan import Message, ModulePlan
    from megatron_mimo.bridge.transport import Direction, LocalRows, post_send

    direction = Direction(name="rows", group=None, local=LocalRows())
    plan = ModulePlan(3, (Message(0, ((0, 3),)),), ())
    post_send(plan, direction, 2, torch.zeros(2, WIDTH), rank=0)


def test_a_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(RuntimeError, match="microbatch 2: the manifest names 3 rows, but 2"):
        send_too_few()
