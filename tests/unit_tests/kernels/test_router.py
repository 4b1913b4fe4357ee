"""The router's balancing loss and counts, of tokens alone, as transformers and by hand."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.engines import layout

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, EXPERTS, CHOSEN, COEFFICIENT = 16, 6, 2, 0.5
LENGTH = 8
# Tokens of each sequence: of some, one rank has only padding, and of the last both.
TOKENS = (8, 3, 5, 0)


def inputs() -> "tuple[Tensor, Tensor, Tensor]":
    """Hidden states [S, B, H], weights [E, H], and where there is no token, bool [B, S]."""
    import torch

    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(LENGTH, len(TOKENS), WIDTH, generator=random)
    weights = torch.randn(EXPERTS, WIDTH, generator=random)
    return hidden, weights, torch.arange(LENGTH) >= torch.tensor(TOKENS)[:, None]


def routed(score: str, masked: bool) -> "tuple[Tensor, Tensor, Tensor | None]":
    """This rank's part of the loss, of the weights' gradient, and of the tokens of each expert."""
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_logging import (
        MoEMetricsTracker,
        get_moe_metrics_tracker,
        set_moe_metrics_tracker,
    )

    from megatron_mimo.kernels.router import BALANCE_LOSS, TokenRouter
    from megatron_mimo.runtime import Device
    from megatron_mimo.runtime.megatron_core import scale_auxiliary_losses, transformer_config
    from megatron_mimo.topology.groups import build_topology

    size = dist.get_world_size()
    topology = build_topology(layout(None, {"cp": size}), device=Device("cpu"))
    assert topology.target is not None
    config = transformer_config(
        topology.target.pg_collection,
        params_dtype=torch.float32,
        sequence_parallel=False,
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        add_bias_linear=False,
        num_moe_experts=EXPERTS,
        moe_router_topk=CHOSEN,
        moe_router_score_function=score,
        # megatron-core has biases for this function alone.
        moe_router_enable_expert_bias=score == "sigmoid",
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=COEFFICIENT,
        moe_router_dtype="fp32",
    )
    set_moe_metrics_tracker(MoEMetricsTracker())
    scale_auxiliary_losses(1.0)
    router = TokenRouter(config=config, pg_collection=topology.target.pg_collection)
    router.set_layer_number(1)
    hidden, weights, padding = inputs()
    own = slice(dist.get_rank() * LENGTH // size, (dist.get_rank() + 1) * LENGTH // size)
    router.weight.data.copy_(weights)
    mask = padding[:, own].T if masked else None
    probabilities, _ = router(hidden[own], mask)
    (0.0 * probabilities.sum()).backward()
    loss = get_moe_metrics_tracker().metrics[BALANCE_LOSS].values
    return loss, router.weight.grad, router.local_tokens_per_expert


def by_hand(score: str, tokens: tuple[int, ...]) -> "tuple[float, Tensor, Tensor]":
    """The loss in float64 of the tokens alone, sequence by sequence, with gradient and counts."""
    import torch

    hidden, weights, _ = inputs()
    weights = weights.double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(EXPERTS, dtype=torch.float64)
    for sequence, length in enumerate(tokens):
        if not length:
            continue
        logits = hidden[:length, sequence].double() @ weights.T
        if score == "softmax":
            scores = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            scores = scores / scores.sum(-1, keepdim=True)
        sent = torch.zeros_like(scores).scatter(1, scores.topk(CHOSEN).indices, 1.0).sum(0)
        counts += sent
        # Fractions of the choices and mean scores; the sum is 1 / E when both are even.
        share = (sent / (CHOSEN * length) * scores.mean(0)).sum()
        loss = loss + length * EXPERTS * share
    (gradient,) = torch.autograd.grad(COEFFICIENT * loss, weights)
    return loss.item(), gradient, counts


@pytest.mark.parametrize("masked", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_and_counts_are_those_of_tokens(
    score: str, ranks: int, masked: bool, run_ranks: Callable[..., list]
) -> None:
    found: list[Any] = run_ranks(ranks, routed, score, masked)
    loss, gradient, counts = by_hand(score, TOKENS if masked else (LENGTH,) * len(TOKENS))
    assert sum(one.item() for one, *_ in found) == pytest.approx(loss, rel=1e-6)
    summed = sum(one for _, one, _ in found)
    assert (summed - gradient).abs().max() <= 1e-6 * gradient.abs().max()
    if score == "sigmoid":
        assert sum(one for *_, one in found).tolist() == counts.tolist()


def test_the_loss_is_that_of_transformers(run_ranks: Callable[..., list]) -> None:
    """transformers counts each of a token's choices as a whole, so its loss is k times ours."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    found = run_ranks(2, routed, "softmax", True)
    hidden, weights, padding = inputs()
    wanted = sum(
        length
        * load_balancing_loss_func(
            (hidden[:, sequence] @ weights.T,), EXPERTS, CHOSEN, ~padding[sequence][None]
        )
        / CHOSEN
        for sequence, length in enumerate(TOKENS)
        if length
    )
    assert sum(loss.item() for loss, *_ in found) == pytest.approx(wanted.item(), rel=1e-6)
