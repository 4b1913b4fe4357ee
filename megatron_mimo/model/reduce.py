"""Flags that say when data-parallel ranks exchange gradients and weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_mimo.settings import InsteadOf, Number, OnlyWith, Switch, Within, named

_OVERLAP = OnlyWith("--overlap-grad-reduce")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceConfig:
    """What data-parallel ranks of the language model exchange, and when.

    Replicas of a source exchange theirs after the last backward: not all of them have items in each
    microbatch, so no bucket of gradients is ready on all ranks at the same time before.

    Attributes:
        sharding: What each data-parallel rank of the language model holds: with "ddp" all weights
            and gradients, and its part of the optimizer's state; with "fsdp2" its part of all of
            them, from which weights are gathered layer by layer (torch's fully_shard). For models
            of --load-hf that run transformers' own forward.
        overlap_grads: Whether to reduce gradients of the language model while its backward still
            runs.
        overlap_params: Whether to gather updated weights of the language model while its next
            forward already runs.
        num_buckets: Number of buckets of about equal size in which gradients of the language model
            are reduced.
        bucket_size: Smallest size of such a bucket, in weights; left out: 40 million, or a million
            for each data-parallel rank.
        pad_buckets: Whether to pad such buckets to sizes at which NCCL is fastest.
    """

    sharding: Literal["ddp", "fsdp2"] = "ddp"
    overlap_grads: Annotated[Switch, named("--overlap-grad-reduce")] = False
    overlap_params: Annotated[Switch, named("--overlap-param-gather"), _OVERLAP] = False
    num_buckets: Annotated[Number, named("--ddp-num-buckets"), Within(1, 1_000_000), _OVERLAP] = (
        None
    )
    bucket_size: Annotated[
        Number,
        named("--ddp-bucket-size"),
        Within(1, 10**12),
        _OVERLAP,
        InsteadOf("--ddp-num-buckets"),
    ] = None
    pad_buckets: Annotated[Switch, named("--ddp-pad-buckets-for-high-nccl-busbw"), _OVERLAP] = False
