"""Random streams of a rank."""

import random

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
