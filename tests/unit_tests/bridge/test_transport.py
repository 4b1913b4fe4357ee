"""Channels over real process groups, and their buffers."""

from collections.abc import Callable
from typing import Any

import pytest

WIDTH = 3


def test_buffers_are_used_again_and_never_shared() -> None:
    import torch

    from megatron_mimo.bridge.buffers import BufferPool

    pool = BufferPool(WIDTH, torch.float32, torch.device("cpu"))
    first, second = pool.take(10), pool.take(300)
    assert first.shape[0] >= 10
    assert second.shape[0] >= 300
    assert first.data_ptr() != second.data_ptr()
    pool.give(second)
    pool.give(first)
    # The smallest that fits.
    assert pool.take(10).data_ptr() == first.data_ptr()
    assert pool.take(200).data_ptr() == second.data_ptr()


def test_an_outgrown_buffer_makes_room_for_its_successor() -> None:
    import torch

    from megatron_mimo.bridge.buffers import BufferPool

    pool = BufferPool(WIDTH, torch.float32, torch.device("cpu"))
    for rows in (10, 1000, 5000):
        pool.give(pool.take(rows))
    assert len(pool._free) == 1


def channel_of_world() -> Any:
    import torch
    import torch.distributed as dist

    from megatron_mimo.bridge.transport import Channel

    return Channel(
        "rows",
        dist.group.WORLD,
        rank=dist.get_rank(),
        width=WIDTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def send_and_receive(runs: list[tuple[tuple[int, int], ...]]) -> None:
    """Rank 0 sends named rows to rank 1 microbatch by microbatch; buffers come back each time."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.bridge.plan import Message
    from megatron_mimo.bridge.transport import Incoming, Outgoing

    rank = dist.get_rank()
    channel = channel_of_world()
    rows = torch.arange(12.0).unsqueeze(1).expand(-1, WIDTH).contiguous()
    places = set()
    for m, cuts in enumerate(runs):
        picked = torch.cat([rows[start:stop] for start, stop in cuts])
        if rank == 0:
            assert channel.post(m, Outgoing((Message(1, cuts),), rows), None) is None
            channel.wait_sent(m)
        else:
            # Where they land mirrors where they came from.
            pending = channel.post(m, None, Incoming((Message(0, cuts),), 12))
            assert pending is not None
            got = pending.wait()
            assert got is not None
            assert torch.equal(torch.cat([got[start:stop] for start, stop in cuts]), picked)
            places.add(got.data_ptr())
            pending.release()
    channel.drain()
    assert len(places) == rank
    # One for what arrives, and one where pieces are put together.
    staging = any(len(cuts) > 1 for cuts in runs)
    assert len(channel._pool._free) == rank + staging


@pytest.mark.parametrize(
    "runs",
    [
        [((0, 12),)] * 3,
        [((2, 5),), ((0, 1), (4, 9)), ((7, 8), (10, 12))],
    ],
    ids=["whole", "pieces"],
)
def test_rows_arrive_where_the_plan_says(
    runs: list[tuple[tuple[int, int], ...]], run_ranks: Callable[..., list]
) -> None:
    run_ranks(2, send_and_receive, runs)


def send_before_anyone_receives() -> None:
    import torch
    import torch.distributed as dist

    from megatron_mimo.bridge.plan import Message
    from megatron_mimo.bridge.transport import Incoming, Outgoing

    channel, rank = channel_of_world(), dist.get_rank()
    pieces = ((0, 1), (2, 3))
    if rank == 0:
        for m in range(3):
            rows = torch.full((4, WIDTH), float(m))
            channel.post(m, Outgoing((Message(1, pieces),), rows), None)
    dist.barrier()
    if rank == 1:
        for m in range(3):
            pending = channel.post(m, None, Incoming((Message(0, ((0, 2),)),), 2))
            assert torch.equal(pending.wait(), torch.full((2, WIDTH), float(m)))
    channel.drain()


def test_rows_on_their_way_keep_their_memory(run_ranks: Callable[..., list]) -> None:
    run_ranks(2, send_before_anyone_receives)


def keep_for_itself() -> None:
    import torch

    from megatron_mimo.bridge.plan import Message
    from megatron_mimo.bridge.transport import Incoming, Outgoing

    channel = channel_of_world()
    rows = torch.randn(8, WIDTH)
    own = Message(0, ((0, 8),))
    pending = channel.post(0, Outgoing((own,), rows), Incoming((own,), 8))
    assert pending is not None
    got = pending.wait()
    assert got is not None
    assert got.data_ptr() == rows.data_ptr()
    pending.release()
    # In another order it is a copy.
    out, back = Message(0, ((4, 8), (0, 4))), Message(0, ((0, 8),))
    pending = channel.post(1, Outgoing((out,), rows), Incoming((back,), 8))
    assert pending is not None
    assert torch.equal(pending.wait(), torch.cat([rows[4:], rows[:4]]))


def test_a_rank_hands_itself_a_view_where_it_can(run_ranks: Callable[..., list]) -> None:
    run_ranks(1, keep_for_itself)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 8), "float32"), ((3, 7), "float32"), ((3, 1, 8), "float32"), ((3, 8), "float64")],
)
def test_other_rows_than_peers_expect_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    """Sent all the same, they would be waited for, or be read as other numbers."""
    import torch

    from megatron_mimo.bridge.boundary import require_rows

    expected: Any = {"shape": (3, 8), "dtype": torch.float32, "where": "microbatch 2, rows of a"}
    require_rows(torch.zeros(3, 8), **expected)
    message = rf"microbatch 2, rows of a: expected float32 \[3, 8\].* gave {dtype} \["
    with pytest.raises(RuntimeError, match=message):
        require_rows(torch.zeros(shape, dtype=getattr(torch, dtype)), **expected)
