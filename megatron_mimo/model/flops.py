"""Operations of a training step of a whole model; `modules.flops` has the conventions."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Self

from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.modules.flops import Flops, LoraLayers, Work
from megatron_mimo.modules.lora.config import Lora


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Amount of work of the modules of a model; work of microbatches, lanes and ranks adds up.

    Attributes:
        modules: Work of each module by its name; a module that is left out runs nothing.
    """

    modules: Mapping[str, Work] = field(default_factory=dict)

    def __add__(self, other: Self) -> Self:
        both = dict(self.modules)
        for name, work in other.modules.items():
            both[name] = both[name] + work if name in both else work
        return type(self)(both)

    def numbers(self) -> list[int]:
        """All counts as one list, for one message; `filled` reads them."""
        return [count for work in self.modules.values() for count in astuple(work)]

    def filled(self, numbers: Iterable[float]) -> Self:
        """Work of the same modules and kinds, with the counts that `numbers` has made.

        Args:
            numbers: Counts from `numbers`, whole numbers; further ones are ignored.
        """
        rest = iter(numbers)
        return type(self)(
            {
                name: type(work)(**{count.name: int(next(rest)) for count in fields(work)})
                for name, work in self.modules.items()
            }
        )


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Operations of each module.

    Attributes:
        modules: Number of operations of each module by its name.
    """

    modules: Mapping[str, Flops]

    @property
    def total(self) -> int:
        """Operations of all modules, forward and backward."""
        return sum(flops.total for flops in self.modules.values())


def no_work(config: ModelConfig) -> ModelWork:
    """Work of zero for every module."""
    return ModelWork(
        {name: adapter_of(module).work_type() for name, module in config.modules.items()}
    )


def model_flops(
    config: ModelConfig,
    frozen: Frozen,
    work: ModelWork,
    *,
    vocab_size: int,
    seq_length: int,
    lora: Lora | None = None,
) -> ModelFlops:
    """Operations of a training step, module by module.

    Args:
        config: Architecture of every module.
        frozen: Names of the parts that have no backward.
        work: Work of the step.
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Number of positions of a sequence, S.
        lora: Adapters that train in place of weights; None for none.

    Raises:
        ValueError: The model has no such part.
    """
    adapters = {} if lora is None else lora.targets
    rows_train = any(config.trains(name, frozen) for name in config.sources)
    found = {}
    for name, module in config.modules.items():
        adapter = adapter_of(module)
        context = FlopsContext(
            frozen=config.frozen_in(name, frozen),
            row_width=config.row_width,
            vocab_size=vocab_size,
            seq_length=seq_length,
            rows_train=rows_train,
            lora={
                part: LoraLayers(rank=lora.rank, layers=layers)
                for part, layers in config.of_module(name, adapters).items()
                if lora is not None
            },
        )
        found[name] = adapter.flops(module, work.modules.get(name, adapter.work_type()), context)
    return ModelFlops(found)
