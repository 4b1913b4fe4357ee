"""Experts of a host: without gradients those run that have tokens, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit_tests.modules.hybrid.peer import random_tokens, write_nemotron


def ran(folder: Path) -> list[tuple[int, int, bool]]:
    """(tokens, experts that ran, same logits) of one layer of 8 experts, 3 of them per token."""
    import torch

    from megatron_mimo.kernels.host_layers import HostExperts
    from megatron_mimo.modules.hybrid import HybridLM

    write_nemotron(folder, "E")
    model = HybridLM.from_pretrained(folder, device="cpu")
    (experts,) = (module for module in model.modules() if isinstance(module, HostExperts))
    calls: list[int] = []

    def count(module: Any, given: Any, output: Any) -> None:
        calls.append(1)

    for expert in experts.local_experts:
        expert.register_forward_hook(count)
    found = []
    for length in (1, 40):
        tokens = random_tokens(1, length)
        calls.clear()
        wanted = model.logits(tokens)
        with_gradients = len(calls)
        calls.clear()
        with torch.no_grad():
            same = model.logits(tokens).equal(wanted)
        found.append((with_gradients, len(calls), same))
    return found


def test_those_without_tokens_are_passed_over(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    (found,) = run_ranks(1, ran, tmp_path)
    assert found == [(8, 3, True), (8, 8, True)]
