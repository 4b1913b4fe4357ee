"""How often a step waits for its device, on every role; see `tests.waits`."""

from collections import Counter
from collections.abc import Callable

import pytest

from tests.fused.packages import NEWEST, OLDEST
from tests.harness.slices import slow_but
from tests.integration.cover import Case, named
from tests.integration.engines import shared_loader

# Norms and loss are read back together: the host decides whether, and by how much, weights move.
OPTIMIZER = "megatron_mimo/optim/mimo_optimizer.py _agree: cpu (copy to host)"
# The host has to know how many tokens go to each expert: it cuts messages and products by it.
EXPERTS = (
    "megatron/core/transformer/moe/token_dispatcher.py _maybe_dtoh_and_synchronize: "
    "synchronize (synchronize)"
)
EXPERT_LAYERS = 2

ON_HOST_LAYERS = (
    "encoder pp 2, llm pp 2, dense tied, packed",
    "colocated, dense, packed",
    "colocated, packed",
    "encoder dp 2, llm dp 2, dense, text only",
    "llm dp 2, colocated, encoder tp 2, dense, overlap gradients+weights",
    "encoder tp 2, llm tp 2, llm pp 2, dense, no sequence parallel",
    "llm cp 2, llm tp 2, dense, recompute full",
    "llm tp 2, llm ep 2, llm pp 2, run ahead 3",
    "frozen vision, llm dp 2, recompute selective, packed",
    "frozen language, encoder dp 2, dense, packed",
    "llm cp 2, packed",
)
FUSED = (
    "colocated, packed",
    "colocated, dense, packed, recompute selective",
    "colocated, encoder tp 2, llm tp 2, dense",
    "llm dp 2, llm ep 2, llm tp 2, packed",
    "encoder dp 2, llm pp 2, dense tied, recompute full",
    "llm cp 2, llm tp 2, dense, packed, recompute full",
)


def waits_of(case: Case) -> tuple[list[Counter[str]], int]:
    """What each step of this rank waits for, and how often it runs a layer of experts."""
    import torch.distributed as dist

    from megatron_mimo.training.step import train_step
    from tests.integration.test_cover import (
        STEPS,
        data_of,
        global_batch_size,
        loader_of,
        runner_of,
    )
    from tests.waits import counting

    rank, layout = dist.get_rank(), case.layout
    with counting() as waits:
        runner = runner_of(case)
        runs = 0
        for replica in runner.model.replicas:
            for layer in replica.module.modules():
                if type(layer).__name__ == "MoELayer":
                    layer.register_forward_hook(lambda *_: count())

        def count() -> None:
            nonlocal runs
            runs += 1

        loader = shared_loader(
            layout,
            data_of(case, layout),
            runner,
            lambda _, dispatcher: loader_of(case, layout, rank, dispatcher),
        )
        found = []
        for step in range(STEPS):
            waits.clear()
            runs = 0
            train_step(runner, loader, step + 1, global_batch_size(case))
            found.append(Counter(map(str, waits)))
    loader.close()
    return found, runs


def assert_few(found: list[tuple[list[Counter[str]], int]], case: Case) -> None:
    """After the first step, which fills caches, a step waits as often as is written here."""
    # What is computed again in backward is not seen by the hook that counts.
    times = 2 if case.recompute == "selective" else 1
    for steps, runs in found:
        assert runs == 0 or case.model == "hybrid"
        wanted = {OPTIMIZER: 1} | ({EXPERTS: times * runs} if runs else {})
        assert steps[1:] == [wanted] * (len(steps) - 1)
    # The case is about experts where it has them.
    assert any(runs for _, runs in found) == (case.model == "hybrid")


@pytest.mark.parametrize("name", slow_but(ON_HOST_LAYERS, *ON_HOST_LAYERS[:3]))
def test_a_step_waits_once(name: str, run_ranks: Callable[..., list]) -> None:
    case = named(name)
    assert_few(run_ranks(case.layout.world_size, waits_of, case), case)


@pytest.mark.parametrize("name", slow_but(FUSED, FUSED[0]))
def test_a_step_over_fused_layers_waits_once(name: str, run_fused: Callable[..., list]) -> None:
    case = named(name)
    assert_few(run_fused(NEWEST, case.layout.world_size, waits_of, case), case)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_so_does_one_over_the_oldest(name: str, run_fused: Callable[..., list]) -> None:
    case = named(name)
    assert_few(run_fused(OLDEST, case.layout.world_size, waits_of, case), case)
