"""A pipeline stage of a module, as the rest of the program calls it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
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

    def idle(self, *, backward: bool) -> None:
        """Take part in what data-parallel ranks do together, on a rank without items.

        It is called in place of the forward, and of the backward, of a microbatch in which this
        rank has no items and others may have some.

        Args:
            backward: Whether it is the backward.
        """

    @property
    def experts_per_rank(self) -> int:
        """Number of experts of an MoE layer that a rank holds; 0 without such layers."""
        return 0

    @property
    def units(self) -> Sequence[nn.Module]:
        """Layers whose weights data-parallel ranks gather together where they divide them."""
        return ()

    def materialise(self, device: torch.device) -> None:
        """Give memory to a stage that was built without any (`BuildContext.without_memory`).

        Args:
            device: Device of the memory.
        """
        raise NotImplementedError(f"{type(self).__name__} is always built with memory")
