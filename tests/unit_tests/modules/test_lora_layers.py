"""Adapters of layers that are not megatron-core's: torch's, whole or sharded by hand."""

from collections.abc import Callable
from typing import Any

import pytest

IN, OUT, RANK, ROWS, SCALE = 12, 8, 3, 5, 1.5


def draw(*shape: int, seed: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole() -> tuple[Any, ...]:
    """Output, and gradients of inputs and of both factors, by torch alone."""
    weight, a, b = draw(OUT, IN, seed=1), draw(RANK, IN, seed=2), draw(OUT, RANK, seed=3)
    x = draw(ROWS, IN, seed=4)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    y = x @ weight.T + SCALE * (x @ a.T) @ b.T
    (y * draw(ROWS, OUT, seed=5)).sum().backward()
    return y.detach(), x.grad, a.grad, b.grad


def shard(axis: int | None) -> tuple[Any, ...]:
    """The same of a `torch.nn.Linear` that holds a rank's shard, as transformers' plans cut it.

    What crosses between ranks is in the layer's forward, which is wrapped.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )

    from megatron_mimo.modules.lora.layer import LoraAdapter

    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()

    def part(tensor: Any, along: int | None) -> Any:
        return tensor if along is None else tensor.chunk(size, dim=along)[rank].contiguous()

    layer: Any = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight = torch.nn.Parameter(part(draw(OUT, IN, seed=1), axis), requires_grad=False)
    plain = layer.forward
    if axis is not None:
        layer.weight.tensor_model_parallel = True
        layer.weight.partition_dim, layer.weight.partition_stride = axis, 1
    if axis == 0:
        layer.forward = lambda x: plain(copy_to_tensor_model_parallel_region(x, group=group))
    if axis == 1:
        layer.forward = lambda x: reduce_from_tensor_model_parallel_region(plain(x), group=group)
    adapter = LoraAdapter(layer, rank=RANK, scale=SCALE, dropout=0.0, tp_group=group)
    assert adapter.fan_in == IN
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    inputs, outputs = (1 if axis == 1 else None), (0 if axis == 0 else None)
    with torch.no_grad():
        adapter.lora_A.copy_(part(draw(RANK, IN, seed=2), inputs))
        adapter.lora_B.copy_(part(draw(OUT, RANK, seed=3), outputs))
    x = part(draw(ROWS, IN, seed=4), inputs).requires_grad_()
    y = layer(x)
    (y * part(draw(ROWS, OUT, seed=5), 1 if axis == 0 else None)).sum().backward()
    return y.detach(), x.grad, adapter.lora_A.grad, adapter.lora_B.grad


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_shards_of_a_linear_layer_of_torch(
    axis: int | None, run_ranks: Callable[..., list]
) -> None:
    import torch

    found = run_ranks(2, shard, axis)
    for which, wanted in enumerate(whole()):
        ranks = [of_rank[which] for of_rank in found]
        # Output, inputs, A, B: the dimension along which ranks have shards, if they do.
        along = {0: (1, None, None, 0), 1: (None, 1, 1, None), None: (None,) * 4}[axis][which]
        if along is None:
            torch.testing.assert_close(ranks[0], ranks[1])
        together = ranks[0] if along is None else torch.cat(ranks, dim=along)
        torch.testing.assert_close(together, wanted)


def test_a_merged_layer_computes_the_same(run_ranks: Callable[..., list]) -> None:
    run_ranks(1, merge)


def merge() -> None:
    """Hold a layer with an adapter of three parts against numbers by hand, and merge it."""
    import torch

    from megatron_mimo.modules.lora.layer import LoraAdapter
    from megatron_mimo.runtime.solo import solo_groups

    layer = torch.nn.Linear(IN, OUT)
    parts = torch.tensor([0, 0, 1, 2, 0, 0, 1, 2])
    adapter = LoraAdapter(
        layer, rank=RANK, scale=SCALE, dropout=0.5, tp_group=solo_groups().tp, row_parts=parts
    ).eval()
    x = draw(ROWS, IN, seed=4)
    plain = layer(x)
    with torch.no_grad():
        adapter.lora_A.copy_(draw(3 * RANK, IN, seed=2))
        adapter.lora_B.copy_(draw(OUT, RANK, seed=3))
        before = layer(x)
        # A row of B reads the A of its part alone.
        factors = adapter.lora_A.view(3, RANK, IN)[parts]
        by_hand = plain + SCALE * torch.einsum("or,ori,bi->bo", adapter.lora_B, factors, x)
        torch.testing.assert_close(before, by_hand)
        adapter.merge()
        torch.testing.assert_close(layer(x), before)
