"""Rotary embedding of packed sequences, against megatron-core's own."""

from collections.abc import Callable
from typing import Any

import pytest


def learn(preset: str, ours: bool, recompute: bool) -> Any:
    """Loss and gradients of a packed sequence, rotated by us or by megatron-core."""
    from dataclasses import replace

    from megatron_mimo.kernels import packed
    from tests.unit_tests.modules.test_fused_adapters import build, fill, text_loss

    module = build(preset, "float32")
    named = fill(module)
    if recompute:
        module.config.recompute_granularity = "full"
        module.config.recompute_method, module.config.recompute_num_layers = "uniform", 1
    whole = packed.packed_documents
    if not ours:
        packed.packed_documents = lambda *args: replace(whole(*args), positions=None)  # type: ignore[assignment]
    try:
        loss = text_loss(module, packed=True)
        loss.backward()
    finally:
        packed.packed_documents = whole
    return float(loss.detach()), {name: weight.grad for name, weight in named.items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_megatron_core(
    recompute: bool, run_ranks: Callable[..., list]
) -> None:
    ((loss, gradients),) = run_ranks(1, learn, "gpt", True, recompute)
    ((wanted, wanted_gradients),) = run_ranks(1, learn, "gpt", False, recompute)
    assert loss == wanted
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.equal(wanted_gradients[name]), name


LENGTHS = (5, 1, 7, 3)


def rotated(cp: int) -> Any:
    """Losses of this rank's tokens of a packed sequence, and gradients of all ranks' losses."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.kernels.cut import cut_documents
    from megatron_mimo.kernels.packed import packed_documents
    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.kernels.cuts import positions_of
    from tests.unit_tests.kernels.small_gpt import VOCAB, build_gpt, llm_layout, named

    module = build_topology(llm_layout(cp=cp)).modules["llm"]
    model = build_gpt(
        module, {"context_parallel_size": cp, "params_dtype": torch.float64, "num_query_groups": 2}
    ).double()
    cut, rank = cut_documents(LENGTHS, cp), module.place.cp
    mine = positions_of(cut, rank)
    tokens = torch.randint(
        0, VOCAB, (1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(2)
    )
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    losses = model(
        tokens[:, :-1][:, mine],
        None,
        attention_mask=None,
        labels=tokens[:, 1:][:, mine],
        packed_seq_params=packed_documents(bounds, LENGTHS, cut, rank),
    )
    (losses * torch.linspace(1, 2, sum(LENGTHS), dtype=torch.float64)[mine]).sum().backward()
    gradients = {}
    for name, weight in named(model):
        dist.all_reduce(weight.grad, group=module.pg_collection.cp)
        gradients[name] = weight.grad
    return mine, losses.detach(), gradients


@pytest.mark.parametrize("cp", [2, 4])
def test_tokens_of_a_context_parallel_rank_are_rotated_by_their_own_positions(
    cp: int, run_ranks: Callable[..., list]
) -> None:
    import torch

    ((_, losses, gradients),) = run_ranks(1, rotated, 1)
    for mine, part, parts in run_ranks(cp, rotated, cp):
        # Angles are float32, and the same ones.
        torch.testing.assert_close(part, losses[:, mine], rtol=1e-10, atol=1e-12)
        for name, wanted in gradients.items():
            torch.testing.assert_close(parts[name], wanted, rtol=1e-9, atol=1e-10)
