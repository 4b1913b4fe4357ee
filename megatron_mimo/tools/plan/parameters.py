"""Number of parameters of a model and of a rank, without building the weights."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.modules.adapter import BuildContext, Experts, ModuleConfig
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.modules.lora.config import Lora
from megatron_mimo.runtime import Device, prepare_megatron_core
from megatron_mimo.topology import ModuleGridSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a part of a module.

    Attributes:
        name: Name of the part, in words.
        total: Number in all.
        active: Number that a token meets: of the experts of a layer, those that it goes to.
        stages: Number on a rank of each pipeline stage.
    """

    name: str
    total: int
    active: int
    stages: tuple[int, ...]


def count_parameters(
    architecture: ModelConfig,
    grids: Mapping[str, ModuleGridSpec],
    vocab_size: int,
    lora: Lora | None = None,
    *,
    dtype: str = "bfloat16",
    divided: Collection[str] = (),
) -> tuple[ParameterCount, ...]:
    """Count the parts of every module, on torch's meta device; adapters of a part by themselves.

    Args:
        architecture: Architecture of every module.
        grids: Name of a module -> its grid, of those to count.
        vocab_size: Number of tokens of the vocabulary, V.
        lora: Adapters that train in place of weights; None for none.
        dtype: Name of the dtype that the run computes with.
        divided: Names of the modules whose weights data-parallel ranks divide among them.
    """
    prepare_megatron_core(Device("cpu"))
    counts = []
    for name, grid in grids.items():
        config = architecture.modules[name]
        adapter = adapter_of(config)
        sizes = (architecture.row_width, vocab_size)
        targets = {} if lora is None else architecture.of_module(name, lora.targets)
        computes = getattr(torch, dtype)
        build = partial(_parts, lora=lora, targets=targets, dtype=computes)
        held = partial(_held, ranks=grid.dp * grid.cp, dtype=computes)
        size = held if name in divided else _size
        whole = build(adapter.one_stage(config), ModuleGridSpec(name=name), 0, *sizes)
        stages = [build(config, grid, stage, *sizes) for stage in range(grid.pp)]
        for part, title in adapter.part_titles(config).items():
            total = _size(whole[part])
            counts.append(
                ParameterCount(
                    name=title,
                    total=total,
                    active=total - _idle(whole[part], adapter.experts(config)),
                    stages=tuple(size(stage[part]) for stage in stages),
                )
            )
        for part in targets:
            title = f"{adapter.part_titles(config)[part]}: adapters"
            sizes_of = [_size(of_stage.get(f"lora.{part}")) for of_stage in (whole, *stages)]
            counts.append(
                ParameterCount(
                    name=title,
                    total=sizes_of[0],
                    active=sizes_of[0],
                    stages=tuple(sizes_of[1:]),
                )
            )
    return tuple(counts)


def _idle(module: nn.Module | None, experts: Experts | None) -> int:
    """Parameters of the experts of each layer that a token does not go to."""
    if experts is None or module is None:
        return 0
    held = sum(
        parameter.numel() for name, parameter in module.named_parameters() if ".experts." in name
    )
    return held - held * experts.per_token // experts.number


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def _held(module: nn.Module | None, *, ranks: int, dtype: torch.dtype) -> int:
    """Parameters of the data-parallel rank that holds most, where these divide weights."""
    from megatron_mimo.model.fully_sharded import most_held

    weights = [] if module is None else module.parameters()
    return sum(most_held(weight, ranks, dtype) for weight in weights)


def _parts(
    config: ModuleConfig,
    spec: ModuleGridSpec,
    stage: int,
    row_width: int,
    vocab_size: int,
    *,
    lora: Lora | None,
    targets: Mapping[str, frozenset[str]],
    dtype: torch.dtype,
) -> Mapping[str, nn.Module | None]:
    """Parts of a stage of a module, and their adapters, which the stage's first rank holds."""
    from megatron_mimo.modules.lora.apply import ADAPTERS, add_lora
    from megatron_mimo.runtime.solo import paper_groups, solo_world

    sizes = {axis: getattr(spec, axis) for axis in ("tp", "cp", "dp", "ep", "expt_tp")}
    places = {axis: (0, size) for axis, size in sizes.items()} | {"pp": (stage, spec.pp)}
    with solo_world(), torch.device("meta"):
        context = BuildContext(
            pg_collection=paper_groups(places),
            params_dtype=dtype,
            row_width=row_width,
            vocab_size=vocab_size,
            seq_length=math.lcm(64, 2 * spec.cp * spec.tp),
            sequence_parallel=spec.tp > 1,
        )
        built = adapter_of(config).build(config, context)
        if lora is None:
            return built.parts
        add_lora(built, lora, targets, context.pg_collection.tp)
        adapters = built.get_submodule(ADAPTERS).named_children()
        return {**built.parts, **{f"{ADAPTERS}.{name}": module for name, module in adapters}}
