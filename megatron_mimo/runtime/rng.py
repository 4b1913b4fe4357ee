"""Random streams of a rank."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# Distances between the seeds of stages and replicas; megatron-core offsets tp and ep ranks itself.
_STAGE_STRIDE = 100
_REPLICA_STRIDE = 10


def seed_everything(
    seed: int,
    *,
    tp_rank: int,
    pp_rank: int,
    dp_rank: int,
    ep_rank: int = 0,
    expt_tp_rank: int = 0,
) -> None:
    """Seed Python, numpy, torch and megatron-core's tracker for a module's place on its grid.

    Torch's streams, from which weights are drawn, do not depend on `dp_rank`: replicas, frozen ones
    too, start equal. Python's and numpy's do. A rank that holds several modules calls this before
    it builds each: they share megatron-core's one tracker.

    Args:
        seed: Run seed, from 0.
        tp_rank: Tensor-parallel rank; has its own stream for sharded weights and dropout.
        pp_rank: Pipeline stage; stages draw different weights.
        dp_rank: Data-parallel rank.
        ep_rank: Expert-parallel rank.
        expt_tp_rank: Tensor-parallel rank inside an expert.

    Raises:
        ValueError: A negative seed.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if seed < 0:
        raise ValueError(f"--seed {seed}: expected 0 or more")
    stage_seed = seed + _STAGE_STRIDE * pp_rank
    replica_seed = stage_seed + _REPLICA_STRIDE * dp_rank
    random.seed(replica_seed)
    np.random.seed(replica_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(
        stage_seed,
        tp_rank=tp_rank,
        ep_rank=ep_rank,
        etp_rank=expt_tp_rank,
        force_reset_rng=True,
    )


def rng_state() -> dict[str, Any]:
    """Of every generator of this process, as Megatron's checkpoints name them."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": dict(get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        state["cuda_rng_state"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every generator where `rng_state` found it; a GPU's only where there is one."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if torch.cuda.is_available() and "cuda_rng_state" in state:
        torch.cuda.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(dict(state["rng_tracker_states"]))
