"""Adapters beside the layers of a stage: placed, found again, and merged into the weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mimo.modules.lora.config import Lora, layer_name
from megatron_mimo.modules.lora.layer import LoraAdapter, embeddings_need_gradients
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.weights.names import table_name

ADAPTERS = "lora"
"""Name in a stage of the module that holds its adapters, by part and by the path of the layer."""


class LoraTree(nn.Module):
    """Modules by name, down to the adapters of a stage."""


def add_lora(
    stage: ModuleStage,
    lora: Lora,
    targets: Mapping[str, frozenset[str]],
    tp_group: dist.ProcessGroup,
) -> None:
    """Give layers of a stage adapters of zeros; other weights of their parts no longer train.

    The adapters are beside the layers, so that nothing else that goes through the weights of a
    stage meets them.

    Args:
        stage: Stage of a module, in one piece with its weights.
        lora: Rank, factor and dropout of the adapters.
        targets: Part of the module -> names of its layers (`layer_name`).
        tp_group: Tensor-parallel group of the module.
    """
    stage.add_module(ADAPTERS, LoraTree())
    for name, layers in targets.items():
        part = stage.parts[name]
        if part is None:  # Another stage has it.
            continue
        part.requires_grad_(False)
        embeddings_need_gradients(part)
        for path, layer in list(part.named_modules()):
            # Balanced by their load, which is a part of the model that stays as it is.
            if hasattr(layer, "expert_bias"):
                layer.frozen_expert_bias = True
            if layer_name(path) not in layers:
                continue
            adapter = LoraAdapter(
                layer,
                rank=lora.rank,
                scale=lora.scale,
                dropout=lora.dropout,
                tp_group=tp_group,
                row_parts=_row_parts(path, stage.config),
            )
            # Layers are counted over all pipeline stages.
            _place(stage.get_submodule(ADAPTERS), f"{name}.{table_name(part, path)}", adapter)


def lora_adapters(stage: nn.Module) -> Iterator[tuple[str, LoraAdapter]]:
    """The adapters of a stage, each with its part and its layer's path, counted over all stages."""
    for path, module in getattr(stage, ADAPTERS, nn.Module()).named_modules():
        if isinstance(module, LoraAdapter):
            yield path, module


def base_names(stage: ModuleStage, parts: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of the names of all weights and buffers of some parts of a stage."""
    modules = {id(module): f"{name}." for name, module in stage.named_modules()}
    weights = {id(weight): name for name, weight in stage.named_parameters()}
    found: list[str] = []
    for part in parts:
        held = stage.parts[part]
        if held is None:
            continue
        # A part may be weights of several modules.
        whole = modules.get(id(held))
        found += [weights[id(one)] for one in held.parameters()] if whole is None else [whole]
    return tuple(found)


@torch.no_grad()
def merge_lora(stage: ModuleStage) -> None:
    """Add each adapter's product to its layer's weight, and remove the adapters.

    Args:
        stage: Stage whose layers are whole in this process.
    """
    for _, adapter in lora_adapters(stage):
        adapter.merge()
    delattr(stage, ADAPTERS)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, LoraTree())
        root = root.get_submodule(parent)
    root.add_module(last, module)


def _row_parts(path: str, config: Any) -> Tensor | None:
    """Number of the part (query, key, value) of each row of a whole weight; None for one part."""
    if not path.endswith("linear_qkv"):
        return None
    groups, width = config.num_query_groups, config.kv_channels
    queries = config.num_attention_heads // groups * width
    of_group = torch.repeat_interleave(torch.arange(3), torch.tensor([queries, width, width]))
    return of_group.repeat(groups)
