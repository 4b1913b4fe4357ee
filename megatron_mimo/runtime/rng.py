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
        seed: Seed of the run, 0 or larger.
        tp_rank: Tensor-parallel rank, which has its own stream for sharded weights and dropout.
        pp_rank: Pipeline stage; stages draw different weights.
        dp_rank: Data-parallel rank.
        ep_rank: Expert-parallel rank.
        expt_tp_rank: Tensor-parallel rank inside an expert.

    Raises:
        ValueError: The seed is negative.
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
    """States of all random generators of this process, named as in Megatron's checkpoints.

    They are tensors and plain values, which a checkpoint can hold without a pickle of other types.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": (kind, torch.from_numpy(np.array(keys, np.int64)), *rest),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": dict(get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        state["cuda_rng_state"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the states that `rng_state` returned; those of a GPU only where there is one."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.setstate(state["random_rng_state"])
    kind, keys, *rest = state["np_rng_state"]
    # Earlier checkpoints hold an array.
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(state["torch_rng_state"])
    if torch.cuda.is_available() and "cuda_rng_state" in state:
        torch.cuda.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(dict(state["rng_tracker_states"]))
