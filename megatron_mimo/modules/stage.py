"""A pipeline stage of a module, as the rest of the program calls it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_mimo.weights.initial import Draw


class ModuleStage(MegatronModule, ABC):
    """One pipeline stage of a module, without data parallelism; `ModuleAdapter.build` returns it.

    A source is called as `stage(packed_input, hidden)` with an input that the data side has packed
    and, on later stages, the hidden states [N, width] of the previous stage. It returns hidden
    states [N, width], on its last stage rows [R, H of the language model], both in the dtype of
    parameters. A language model is called as `LanguageModule.forward`.

    Attributes:
        config: Configuration of megatron-core, a TransformerConfig.
    """

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module | None]:
        """Submodule of each part of the module; None for a part that another stage holds."""

    @abstractmethod
    def initial(self, name: str) -> Draw | None:
        """Distribution of an initial weight, for `initialize_topology_invariant`.

        Args:
            name: Name of the parameter within this stage, as separate layers have it
                (`weights.names.separate_name`).

        Returns:
            The distribution; None keeps the constant that the weight was built with.
        """

    def initial_name(self, name: str) -> str:
        """The name that an initial weight is drawn by; equal names get equal weights.

        Args:
            name: Name of the parameter within the module, layers counted over all stages and
                experts over all ranks.
        """
        return name

    @property
    def experts_per_rank(self) -> int:
        """Number of experts of an MoE layer that a rank holds; 0 without such layers."""
        return 0
