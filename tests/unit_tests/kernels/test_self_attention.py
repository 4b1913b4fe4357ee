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
