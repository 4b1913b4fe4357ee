"""Boundaries that gradients cross, from the parts that are frozen."""

from collections.abc import Sequence

from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.schedule.graph import GradientFlow


def gradient_flow(config: ModelConfig, frozen: Frozen, sources: Sequence[str]) -> GradientFlow:
    """Sources that use gradients of their rows, and those that send them between their stages.

    Args:
        config: Architecture of every module.
        frozen: Names of the parts that do not train.
        sources: Names of the modules that feed the language model.
    """
    inside = {
        name
        for name in sources
        if adapter_of(config.modules[name]).trains_inside(
            config.modules[name], config.frozen_in(name, frozen)
        )
    }
    returning = {name for name in sources if config.trains(name, frozen)}
    return GradientFlow(returning=frozenset(returning), inside=frozenset(inside))
