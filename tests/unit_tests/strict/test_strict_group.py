"""Programs that are right under NCCL run in strict groups; those that are not are told why."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.harness import RanksFailed

HOST = torch.device("cpu")


def group_of(limit_s: float = 30.0, *, begun: bool = True) -> Any:
    """A strict group of all ranks, for the rest of the call."""
    from tests.strict.install import STRICT

    group = dist.new_group(
        backend=STRICT, timeout=timedelta(seconds=limit_s), group_desc="the group"
    )
    if begun:
        dist.all_reduce(torch.zeros(1, device=HOST), group=group)
    return group


def filled(value: float, size: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of the device."""
    return torch.full((size,), value, dtype=dtype, device=HOST)


def in_strict_groups(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function` where strict groups can be made."""
    from tests.strict.install import strict_groups

    with strict_groups():
        return function(*args)


def every_collective() -> list[str]:
    """Names of collectives that found something else than in a group of gloo."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def run(group: Any) -> dict[str, torch.Tensor]:
        mine = torch.arange(6.0, device=HOST) + 10 * rank
        found: dict[str, Any] = {}
        found["all_reduce"] = mine.clone()
        dist.all_reduce(found["all_reduce"], group=group)
        found["largest"] = mine.clone()
        dist.all_reduce(found["largest"], op=dist.ReduceOp.MAX, group=group)
        found["broadcast"] = mine.clone()
        dist.broadcast(found["broadcast"], 1, group=group)
        pieces = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(pieces, mine, group=group)
        found["all_gather"] = torch.stack(pieces)
        found["into_tensor"] = filled(0, 6 * size)
        dist.all_gather_into_tensor(found["into_tensor"], mine, group=group)
        found["reduce_scatter"] = filled(0, 6 // size)
        work = dist.reduce_scatter_tensor(found["reduce_scatter"], mine, group=group, async_op=True)
        work.wait()
        gives = [1, 5] if rank == 0 else [2, 4]
        found["all_to_all"] = filled(0, 3 if rank == 0 else 9)
        takes = [1, 2] if rank == 0 else [5, 4]
        dist.all_to_all_single(found["all_to_all"], mine, takes, gives, group=group)
        found["first"], found["second"] = mine.clone(), 2 * mine
        with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as batch:
            dist.all_reduce(found["first"], group=group)
            dist.all_reduce(found["second"], group=group)
        batch.wait()
        return found

    strict, plain = run(group_of()), run(dist.group.WORLD)
    return [name for name in plain if not torch.equal(strict[name], plain[name])]


def test_collectives_find_what_gloo_does(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(2, in_strict_groups, every_collective) == [[], []]


def batches_in_any_order() -> list[float]:
    """Each rank exchanges with the next and the one before, listed differently on each."""
    group, rank, size = group_of(), dist.get_rank(), dist.get_world_size()
    found = []
    for step in range(3):
        arrived = filled(-1)
        operations = [
            dist.P2POp(dist.isend, filled(10 * step + rank), (rank + 1) % size, group, step),
            dist.P2POp(dist.irecv, arrived, (rank - 1) % size, group, step),
        ]
        (work,) = dist.batch_isend_irecv(operations[:: 1 if rank else -1])
        work.wait()
        found.append(float(arrived[0]))
    return found


def test_a_batch_is_one_operation_without_an_order_inside(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(3, in_strict_groups, batches_in_any_order) == [
        [2, 12, 22],
        [0, 10, 20],
        [1, 11, 21],
    ]


def parts_of_a_batch() -> float:
    """Rank 0's batch receives from rank 1, which sends once rank 2 has what rank 0 sends it."""
    group, rank = group_of(), dist.get_rank()
    arrived = filled(-1)
    if rank == 0:
        operations = [
            dist.P2POp(dist.irecv, arrived, 1, group),
            dist.P2POp(dist.isend, filled(7), 2, group),
        ]
        (work,) = dist.batch_isend_irecv(operations)
        work.wait()
    if rank == 2:
        dist.recv(arrived, 0, group=group)
        dist.send(filled(8), 1)
    if rank == 1:
        dist.recv(arrived, 2)
        dist.send(filled(9), 0, group=group)
    return float(arrived[0])


def test_parts_of_a_batch_do_not_wait_for_each_other(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(3, in_strict_groups, parts_of_a_batch) == [9, 8, 7]


def answer(groups: int) -> float:
    """Rank 0 posts the receive of an answer before it sends the question."""
    limit_s = 30.0 if groups > 1 else 4.0
    made, rank = [group_of(limit_s) for _ in range(groups)], dist.get_rank()
    arrived = filled(-1)
    if rank == 0:
        answered = dist.irecv(arrived, 1, group=made[-1])
        dist.send(filled(1), 1, group=made[0])
        answered.wait()
    else:
        dist.recv(arrived, 0, group=made[0])
        dist.send(arrived + 1, 0, group=made[-1])
    return float(arrived[0])


def test_an_early_receive_holds_up_what_comes_after_it(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(2, in_strict_groups, answer, 2) == [2, 1]
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, in_strict_groups, answer, 1)
    assert (
        "In line on this rank: 'the group': receive of 4 float32 from 1, then send of 4 float32 "
        "to 1"
    ) in str(failed.value)


def both_send_first() -> None:
    group, peer = group_of(4.0), 1 - dist.get_rank()
    works = [dist.isend(filled(1), peer, group=group), dist.irecv(filled(0), peer, group=group)]
    for work in works:
        work.wait()


def test_two_that_send_first_wait_for_each_other(run_ranks: Callable[..., Any]) -> None:
    with pytest.raises(RanksFailed, match="send of 4 float32 to 1 has waited 4 s"):
        run_ranks(2, in_strict_groups, both_send_first)


def send_early() -> list[bool]:
    """Whether a send was done before the receive was posted, and after it."""
    group = group_of()
    if dist.get_rank() == 1:
        dist.barrier()
        dist.recv(filled(0), 0, group=group)
        return []
    work = dist.isend(filled(1), 1, group=group)
    time.sleep(0.2)
    before = work.is_completed()
    dist.barrier()
    work.wait()
    return [before, work.is_completed()]


def test_a_send_is_done_when_it_was_received(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(2, in_strict_groups, send_early)[0] == [False, True]


def begin(with_barrier: bool) -> None:
    group = group_of(begun=False)
    if with_barrier:
        dist.barrier(group=group)
    elif dist.get_rank() == 0:
        dist.send(filled(1), 1, group=group)
    else:
        dist.recv(filled(0), 0, group=group)


@pytest.mark.parametrize(
    ("with_barrier", "what"), [(True, "a barrier: "), (False, r"messages \(send of 4 float32 to 1")]
)
def test_a_group_begins_with_a_reduction(
    with_barrier: bool, what: str, run_ranks: Callable[..., Any]
) -> None:
    with pytest.raises(RanksFailed, match=f"'the group' begins with {what}"):
        run_ranks(2, in_strict_groups, begin, with_barrier)


def send_and_receive(sent: dict[str, Any], received: dict[str, Any]) -> None:
    group = group_of()
    if dist.get_rank() == 0:
        dist.send(filled(1, **sent["of"]), 1, group=group, tag=sent.get("tag", 0))
    else:
        dist.recv(filled(0, **received["of"]), 0, group=group, tag=received.get("tag", 0))


@pytest.mark.parametrize(
    ("sent", "received", "said"),
    [
        (
            {"of": {"size": 6}},
            {"of": {"size": 5}},
            "receive of 5 float32 from 0 on rank 1, but rank 0 sends 6 float32",
        ),
        (
            {"of": {"dtype": torch.float64}},
            {"of": {}},
            "receive of 4 float32 from 0 on rank 1, but rank 0 sends 4 float64",
        ),
        (
            {"of": {}, "tag": 3},
            {"of": {}, "tag": 2},
            "with tag 2 on rank 1 meets what rank 0 sends with tag 3: NCCL has no tags",
        ),
    ],
    ids=["size", "dtype", "tag"],
)
def test_what_meets_is_alike(
    sent: dict[str, Any], received: dict[str, Any], said: str, run_ranks: Callable[..., Any]
) -> None:
    with pytest.raises(RanksFailed, match=said):
        run_ranks(2, in_strict_groups, send_and_receive, sent, received)


def differ(what: str) -> None:
    group, rank = group_of(), dist.get_rank()
    if what == "size":
        dist.all_reduce(filled(1, 3 + rank), group=group)
    elif what == "kind" and rank == 0:
        dist.all_reduce(filled(1), group=group)
    elif what == "kind":
        dist.broadcast(filled(1), 0, group=group)
    else:
        # Rank 0 gives rank 1 three elements, of which it takes two.
        gives, takes = ([1, 3], [1, 2]) if rank == 0 else ([2, 2], [2, 2])
        dist.all_to_all_single(filled(0, sum(takes)), filled(1), takes, gives, group=group)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("size", "differ: all_reduce SUM of [34] float32 here, all_reduce .* of [34] float32"),
        ("kind", "differ: (all_reduce|broadcast) .* here, (all_reduce|broadcast) .* there"),
        ("pieces", "3 elements are given, 2 taken there|3 elements are given there, 2 taken"),
    ],
)
def test_collectives_of_all_ranks_are_the_same(
    what: str, said: str, run_ranks: Callable[..., Any]
) -> None:
    with pytest.raises(RanksFailed, match=said):
        run_ranks(2, in_strict_groups, differ, what)


def send_of_the_hosts(what: str) -> None:
    group = group_of()
    if what == "object":
        dist.all_gather_object([None, None], "object", group=group)
        return
    tensors = {
        "made without a device": torch.zeros(2),
        "numpy": torch.from_numpy(np.zeros(2)),
        "bytes": torch.frombuffer(bytearray(8), dtype=torch.uint8),
        "shared": torch.zeros(2, device=HOST).share_memory_(),
    }
    dist.all_reduce(tensors[what], group=group)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("object", "send objects in a group of the hosts"),
        ("made without a device", "was made without a device, so it is one of the hosts"),
        ("numpy", "was made without a device"),
        ("bytes", "was made without a device"),
        ("shared", "lies in memory that processes share"),
    ],
)
def test_nothing_of_the_hosts_travels(what: str, said: str, run_ranks: Callable[..., Any]) -> None:
    with pytest.raises(RanksFailed, match=said):
        run_ranks(2, in_strict_groups, send_of_the_hosts, what)


def reduce_what_was_moved() -> list[float]:
    group = group_of()
    tensors = [torch.zeros(2).to(HOST), torch.ones(2).cuda(), torch.zeros(2) + filled(3, 2)]
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
    return [float(tensor[0]) for tensor in tensors]


def test_what_was_moved_to_the_device_travels(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(2, in_strict_groups, reduce_what_was_moved) == [[0, 2, 6]] * 2
