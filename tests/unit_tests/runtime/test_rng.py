"""Random streams of ranks."""

from typing import Any

from tests.harness import RunRanks


def draws(seed: int, **ranks: int) -> dict[str, Any]:
    """One draw from each stream of a rank at this place."""
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        get_expert_parallel_rng_tracker_name,
    )

    from megatron_mimo.runtime import seed_everything

    place = {"tp_rank": 0, "pp_rank": 0, "dp_rank": 0, "ep_rank": 0, "expt_tp_rank": 0} | ranks
    seed_everything(seed, **place)
    tracker = get_cuda_rng_tracker()
    with tracker.fork():
        model_parallel = float(torch.rand(()))
    with tracker.fork(get_expert_parallel_rng_tracker_name()):
        expert = float(torch.rand(()))
    return {
        "default": float(torch.rand(())),
        "model parallel": model_parallel,
        "expert": expert,
        "python": random.random(),
        "numpy": float(np.random.rand()),
    }


def changed(seed: int, **ranks: int) -> set[str]:
    """Streams that differ from those of rank 0 everywhere with seed 7."""
    base, other = draws(7), draws(seed, **ranks)
    return {name for name in base if base[name] != other[name]}


ALL = {"default", "model parallel", "expert", "python", "numpy"}


def test_streams(run_ranks: RunRanks) -> None:
    def differ(seed: int = 7, **ranks: int) -> set[str]:
        (found,) = run_ranks(1, changed_by, seed, ranks)
        return found

    assert differ() == set()
    assert differ(8) == ALL
    assert differ(pp_rank=1) == ALL
    assert differ(tp_rank=1) == {"model parallel"}
    assert differ(dp_rank=1) == {"python", "numpy"}
    assert differ(ep_rank=1) == {"expert"}
    assert differ(expt_tp_rank=1) == {"expert"}


def changed_by(seed: int, ranks: dict[str, int]) -> set[str]:
    """`changed` with its keywords in a dictionary, as the pool passes arguments."""
    return changed(seed, **ranks)


def restored() -> None:
    """States come back after weights-only loading, and as earlier versions stored them."""
    import io

    import numpy as np
    import torch

    from megatron_mimo.runtime.rng import rng_state, set_rng_state
    from megatron_mimo.weights.torch_dist import load_plain

    draws(7)
    older = rng_state() | {"np_rng_state": np.random.get_state()}
    for state in (rng_state(), older):
        content = io.BytesIO()
        torch.save(state, content)
        set_rng_state(load_plain(io.BytesIO(content.getvalue()), "FILE"))
        first = (np.random.rand(5).tolist(), torch.rand(5).tolist())
        set_rng_state(state)
        assert (np.random.rand(5).tolist(), torch.rand(5).tolist()) == first
        set_rng_state(older)


def test_states_are_plain_values(run_ranks: RunRanks) -> None:
    run_ranks(1, restored)
