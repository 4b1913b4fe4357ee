"""The adapter that all families of language models derive from."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from megatron_mimo.modules.adapter import (
    Axis,
    ModuleAdapter,
    ModuleConfig,
)
from megatron_mimo.modules.flops import TextWork

PART = "language"
# As in a flat checkpoint of a Nemotron vision-language model.
STORED_PREFIX = "language_model."


class LanguageAdapter[C: ModuleConfig](ModuleAdapter[C, TextWork]):
    """Adapter of a family of language models, whose config is its only part, "language".

    `build` returns a `language.module.LanguageModule` over megatron-core's model of the family, or
    another `ModuleStage` with its `forward`.

    Attributes:
        tokens_on_every_stage: Whether every pipeline stage reads tokens and what is known of items,
            not only the first.
        sequence_parallel: Whether tensor-parallel ranks can divide the sequence among them.
        layers_of_megatron: Whether the layers are megatron-core's, which can recompute their parts
            and compute experts in groups.
        replicas_divide: Whether a stage can be built without memory, so that data-parallel ranks
            divide its weights among them (`ModuleStage.units`).
    """

    work_type = TextWork
    tokens_on_every_stage = False
    sequence_parallel = True
    layers_of_megatron = True
    replicas_divide = False

    def parts(self, config: C) -> Mapping[str, Any]:
        """The config itself, as the only part."""
        return {PART: config}

    def with_parts(self, config: C, parts: Mapping[str, Any]) -> C:
        """The part where it is given, else the config."""
        changed: C = parts.get(PART, config)
        return changed

    def part_titles(self, config: C) -> Mapping[str, str]:
        """Title of the part in tables."""
        return {PART: "language model"}

    def prefixes(self, config: C, name: str) -> Mapping[str, str]:
        """Prefixes of a Megatron checkpoint."""
        return {"model.": STORED_PREFIX}

    def parallel_axes(self, config: C) -> frozenset[Axis]:
        """The axis cp, and those of experts where there are any."""
        if self.experts(config) is None:
            return frozenset({"cp"})
        return frozenset({"cp", "ep", "expt_tp"})

    def row_width(self, config: C) -> int:
        """Width of a row that the model is fed; by default that of a token's embedding."""
        return self.hidden_width(config)

    def reads_padding(self, config: C) -> bool:
        """Whether stages are told which positions have no token: experts leave them out."""
        return self.layers_of_megatron and self.experts(config) is not None

    @abstractmethod
    def with_even_load(self, config: C) -> C:
        """The config with tokens sent to experts at random, evenly; itself without experts."""
