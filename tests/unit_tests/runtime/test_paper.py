"""Ranks on paper: numbers that are read back, messages, bytes that are held, even routing."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mimo.runtime.paper.experts import even_map
from megatron_mimo.runtime.paper.memory import bytes_of
from megatron_mimo.runtime.paper.mode import PaperMode

RANKS = 4


@pytest.fixture
def mode() -> Iterator[PaperMode]:
    """A rank on paper, but for what stays in its process."""
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=1, world_size=RANKS)
    try:
        with PaperMode() as entered:
            yield entered
    finally:
        dist.destroy_process_group()


def floats(number: int) -> torch.Tensor:
    return torch.empty(number, device="meta")


def sent(mode: PaperMode) -> dict[str, tuple[int, int]]:
    return {name: (sent.messages, sent.bytes) for (_, name), sent in mode.traffic.sent.items()}


def test_a_storage_counts_once_until_nothing_refers_to_it(mode: PaperMode) -> None:
    memory = mode.memory
    first = floats(1000)
    view = first.view(10, 100)
    assert memory.held == 4000
    second = view * 2
    del first
    assert memory.held == memory.peak == 8000
    del view
    assert (memory.held, memory.peak) == (4000, 8000)
    memory.begin()
    assert memory.peak == 4000
    del second
    assert memory.held == 0


def test_backward_holds_what_it_needs_and_no_longer(mode: PaperMode) -> None:
    weight = floats(1000).requires_grad_()
    squares = weight * weight
    loss = squares.exp().sum()
    del squares
    # The weight, and the result of exp, which its backward needs; and the loss.
    assert mode.memory.held == 8004
    loss.backward()
    del loss
    assert mode.memory.held == 8000
    assert bytes_of([weight, weight.view(-1)]) == 4000


def test_host_tensors_do_not_count(mode: PaperMode) -> None:
    kept = torch.ones(1000) * 2
    assert mode.memory.held == 0 and kept[0] == 2


def test_numbers_from_the_device_are_ones(mode: PaperMode) -> None:
    tensor = floats(3)
    assert tensor.sum().item() == 1.0
    assert bool(tensor.isfinite().all())
    assert tensor.cpu().tolist() == [1.0, 1.0, 1.0]
    assert torch.zeros(3).copy_(tensor).tolist() == [1.0, 1.0, 1.0]


def test_integers_of_the_device_keep_what_follows_from_the_data(mode: PaperMode) -> None:
    tokens = torch.tensor([[5, 9, 9, 2], [9, 1, 1, 9]]).to("meta")
    at = tokens == 9
    assert tokens.is_meta and at.is_meta and at.sum().item() == 4
    assert at.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 3]]
    # Also through views, changes in place, and numbers made of integers.
    view = tokens[0]
    view[1:3] = 0
    assert tokens.tolist() == [[5, 0, 0, 2], [9, 1, 1, 9]]
    weights = torch.nn.functional.one_hot(tokens % 2, 2).float() / 2
    assert (weights == 0).all(dim=1).tolist() == [[False, False], [True, False]]
    repeated = torch.arange(3, device="meta").repeat_interleave(torch.arange(3, device="meta"))
    assert repeated.is_meta and repeated.tolist() == [1, 2, 2]


def test_known_places_choose_unknown_numbers(mode: PaperMode) -> None:
    hidden = torch.empty(2, 4, 3, device="meta", requires_grad=True)
    at = torch.tensor([[True, False, True, True], [False] * 4]).to("meta")
    chosen = hidden[at]
    assert chosen.shape == (3, 3)
    assert torch.masked_select(hidden.detach(), at[..., None]).shape == (9,)
    rows = torch.empty(3, 3, device="meta", requires_grad=True)
    (hidden.masked_scatter(at[..., None], rows).sum() + chosen.sum()).backward()
    assert hidden.grad is not None and rows.grad is not None
    assert (hidden.grad.shape, rows.grad.shape) == (hidden.shape, rows.shape)


def test_what_comes_from_weights_or_other_ranks_is_not_known(mode: PaperMode) -> None:
    best = floats(4).argmax()
    assert best.item() == 1
    received = torch.arange(4).to("meta")
    dist.broadcast(received, 0)
    assert received.tolist() == [1, 1, 1, 1]
    # A store of unknown numbers makes what is stored in unknown.
    held = torch.arange(4).to("meta")
    held.copy_(floats(4))
    assert held.tolist() == [1, 1, 1, 1]


def test_messages_are_counted_by_what_they_do(mode: PaperMode) -> None:
    whole, part = floats(4 * RANKS), floats(4)
    dist.all_reduce(part)
    dist.all_gather([floats(4) for _ in range(RANKS)], part)
    dist.reduce_scatter(part, [floats(4) for _ in range(RANKS)])
    dist.all_to_all_single(whole, floats(10), [4, 4, 4, 4], [1, 2, 3, 4])
    dist.barrier()
    work = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, part, 0), dist.P2POp(dist.irecv, whole, 2)]
    )
    assert all(each.wait() for each in work)
    assert sent(mode) == {
        "all-reduce": (1, 16),
        "all-gather": (1, 64),
        "reduce-scatter": (1, 64),
        "all-to-all": (1, 64),
        "barrier": (1, 0),
        "send": (1, 16),
        "receive": (1, 64),
    }


def test_tensors_of_a_coalesced_call_count_each(mode: PaperMode) -> None:
    with _coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
        for size in (1, 3):
            dist.reduce_scatter_tensor(floats(size), floats(size * RANKS))
    manager.wait()
    assert sent(mode) == {"reduce-scatter": (2, 64)}


def test_a_group_of_one_rank_sends_nothing(mode: PaperMode) -> None:
    alone = dist.new_group([1], backend="cpu:fake,meta:fake")
    dist.all_reduce(floats(4), group=alone)
    assert sent(mode) == {}


def test_sizes_that_do_not_fit_are_refused(mode: PaperMode) -> None:
    with pytest.raises(RuntimeError, match=r"all-gather between 4 ranks.*: 15 .* 4 .* 16"):
        dist.all_gather_into_tensor(floats(15), floats(4))
    with pytest.raises(RuntimeError, match="reduce-scatter between 4 ranks"):
        dist.reduce_scatter_tensor(floats(4), floats(17))
    with pytest.raises(RuntimeError, match="Split sizes"):
        dist.all_to_all_single(floats(16), floats(10), [4, 4, 4, 4], [1, 2, 3, 3])


@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(16, 8, 2), (7, 4, 3), (5, 5, 1)])
def test_even_routing(tokens: int, experts: int, per_token: int) -> None:
    chosen = even_map(tokens, experts, per_token=per_token)
    assert chosen.sum(1).tolist() == [per_token] * tokens
    loads = chosen.sum(0).tolist()
    assert max(loads) - min(loads) <= 1
