"""How many parameters a model has, in all and on a rank, without building its weights."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from megatron_mimo.language.config import ExecutionConfig, HybridConfig
from megatron_mimo.model.config import FreezeConfig, ModelConfig
from megatron_mimo.runtime import Device, prepare_engine
from megatron_mimo.topology import ModuleGridSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a module.

    Attributes:
        name: Of the module.
        total: In all.
        active: That a token meets: of the experts of a layer, those that it goes to.
        stages: On a rank of each pipeline stage.
    """

    name: str
    total: int
    active: int
    stages: tuple[int, ...]


def count_parameters(
    architecture: ModelConfig, encoder: ModuleGridSpec | None, llm: ModuleGridSpec, vocab_size: int
) -> tuple[ParameterCount, ...]:
    """Count vision encoder, projector and language model, on torch's meta device.

    Args:
        architecture: Of every module.
        encoder: The encoder's grid, if any.
        llm: The language model's.
        vocab_size: V.
    """
    prepare_engine(Device("cpu"))
    language = architecture.language
    whole = _language(_without_bars(architecture), ModuleGridSpec(name="llm"), 0, vocab_size)
    total = _size(whole)
    idle = 0
    if isinstance(language, HybridConfig):
        experts = sum(
            parameter.numel() for name, parameter in whole.named_parameters() if ".experts." in name
        )
        idle = experts - experts * language.moe_router_topk // language.num_moe_experts
    counts = [
        ParameterCount(
            name="language model",
            total=total,
            active=total - idle,
            stages=tuple(
                _size(_language(architecture, llm, stage, vocab_size)) for stage in range(llm.pp)
            ),
        )
    ]
    if encoder is not None:
        module = _encoder(architecture, ModuleGridSpec(name="encoder"), 0)
        stages = [_encoder(architecture, encoder, stage) for stage in range(encoder.pp)]
        for part, name in (("projector", "projector"), ("vision", "vision encoder")):
            size = _size(module.get_submodule(part))
            held = (getattr(stage, part) for stage in stages)
            counts.insert(
                0,
                ParameterCount(
                    name=name,
                    total=size,
                    active=size,
                    stages=tuple(0 if one is None else _size(one) for one in held),
                ),
            )
    return tuple(counts)


def _without_bars(architecture: ModelConfig) -> ModelConfig:
    """The same layers, for one pipeline stage."""
    language = architecture.language
    if not isinstance(language, HybridConfig):
        return architecture
    return replace(architecture, language=replace(language, pattern=language.layers))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _language(
    architecture: ModelConfig, spec: ModuleGridSpec, stage: int, vocab_size: int
) -> nn.Module:
    from megatron_mimo.model.modules import LanguageModule
    from megatron_mimo.runtime.solo import paper_groups, solo_world

    with solo_world(), torch.device("meta"):
        return LanguageModule(
            architecture,
            FreezeConfig(),
            paper_groups(_places(spec, stage)),
            torch.bfloat16,
            vocab_size=vocab_size,
            seq_length=math.lcm(64, 2 * spec.cp * spec.tp),
            sequence_parallel=spec.tp > 1,
            execution=ExecutionConfig(),
        )


def _encoder(architecture: ModelConfig, spec: ModuleGridSpec, stage: int) -> nn.Module:
    from megatron_mimo.model.modules import EncoderModule
    from megatron_mimo.runtime.solo import paper_groups, solo_world

    with solo_world(), torch.device("meta"):
        return EncoderModule(
            architecture, FreezeConfig(), paper_groups(_places(spec, stage)), torch.bfloat16
        )


def _places(spec: ModuleGridSpec, stage: int) -> dict[str, tuple[int, int]]:
    """Of the first rank of a stage."""
    sizes = {axis: getattr(spec, axis) for axis in ("tp", "cp", "dp", "ep", "expt_tp")}
    return {axis: (0, size) for axis, size in sizes.items()} | {"pp": (stage, spec.pp)}
