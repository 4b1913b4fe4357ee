"""megatron-core settings that every module shares, and the places where it assumes one grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig


def transformer_config(
    pg_collection: ProcessGroupCollection,
    *,
    params_dtype: torch.dtype,
    sequence_parallel: bool,
    **architecture: Any,
) -> TransformerConfig:
    """A TransformerConfig for a module on the given groups.

    Dropout is off. Losses are sums over tokens, so gradients are summed and divided once, by the
    global number of target tokens. Fusions that need a GPU extension are off on a host.

    Args:
        pg_collection: Groups of the module's grid, which give the parallel sizes.
        params_dtype: Dtype of parameters and activations: float32, bfloat16 or float16.
        sequence_parallel: Whether activations between tensor-parallel regions are sharded over the
            sequence.
        architecture: Fields of TransformerConfig that describe the model.
    """
    on_host = not torch.cuda.is_available()
    return TransformerConfig(
        tensor_model_parallel_size=pg_collection.tp.size(),
        context_parallel_size=pg_collection.cp.size(),
        pipeline_model_parallel_size=pg_collection.pp.size(),
        expert_model_parallel_size=pg_collection.ep.size(),
        expert_tensor_parallel_size=pg_collection.expt_tp.size(),
        sequence_parallel=sequence_parallel and pg_collection.tp.size() > 1,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        use_cpu_initialization=on_host,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=not on_host,
        masked_softmax_fusion=not on_host,
        persist_layer_norm=False,
        **architecture,
    )


def scale_auxiliary_losses(scale: float) -> None:
    """Multiply the gradients of experts' balance losses as the loss itself is multiplied."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))


def is_first_stage(pg_collection: ProcessGroupCollection) -> bool:
    """Whether this rank holds the first pipeline stage of a module."""
    return bool(pg_collection.pp.rank() == 0)


def is_last_stage(pg_collection: ProcessGroupCollection) -> bool:
    """Whether this rank holds the last pipeline stage of a module."""
    return bool(pg_collection.pp.rank() == pg_collection.pp.size() - 1)


@contextmanager
def world_is(group: dist.ProcessGroup) -> Iterator[None]:
    """Let `group` stand for the world in `all_gather_object` and `get_world_size`.

    megatron-core reconciles optimizer parameter groups over the whole world. With several grids
    that mixes the modules' groups, or hangs when one module has no optimizer; inside this block the
    agreement stays within the module.

    Args:
        group: gloo group, since what is agreed on are objects of the hosts.
    """
    gather, world_size = dist.all_gather_object, dist.get_world_size

    def scoped_gather(
        object_list: list[Any], obj: Any, group: dist.ProcessGroup | None = group
    ) -> None:
        gather(object_list, obj, group=group)

    def scoped_world_size(group: dist.ProcessGroup | None = group) -> int:
        return int(world_size(group))

    dist.all_gather_object, dist.get_world_size = scoped_gather, scoped_world_size
    try:
        yield
    finally:
        dist.all_gather_object, dist.get_world_size = gather, world_size
