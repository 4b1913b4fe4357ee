"""Operations of a training step of a whole model; `modules.flops` has the conventions."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields
from functools import lru_cache
from typing import Self

from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.modules.adapter import FlopsContext, ModuleConfig
from megatron_mimo.modules.families import adapter_of, source_adapter
from megatron_mimo.modules.flops import Flops, LoraLayers, Work
from megatron_mimo.modules.lora.config import Lora

_SIZES = 2**16
"""Number of sizes of items whose costs are kept."""


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
    found = {}
    for name, module in config.modules.items():
        adapter = adapter_of(module)
        context = _context(config, name, frozen, vocab_size, seq_length, lora)
        found[name] = adapter.flops(module, work.modules.get(name, adapter.work_type()), context)
    return ModelFlops(found)


type ItemCost = Callable[[tuple[int, ...], int], int]
"""Operations of an item, forward and backward, from its lengths (`ItemInput.lengths`) and rows."""


def item_costs(
    config: ModelConfig,
    frozen: Frozen,
    *,
    vocab_size: int,
    seq_length: int,
    lora: Lora | None = None,
) -> dict[str, ItemCost]:
    """What an item of each source costs; the same on every rank.

    Args:
        config: Architecture of every module.
        frozen: Names of the parts that have no backward.
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Number of positions of a sequence, S.
        lora: Adapters that train in place of weights; None for none.
    """
    return {
        name: _item_cost(module, _context(config, name, frozen, vocab_size, seq_length, lora))
        for name, module in config.sources.items()
    }


def _item_cost(module: ModuleConfig, context: FlopsContext) -> ItemCost:
    adapter = source_adapter(module)

    # Items of one size are frequent, and a count takes as long as planning for a hundred items.
    @lru_cache(maxsize=_SIZES)
    def cost(lengths: tuple[int, ...], rows: int) -> int:
        return adapter.item_cost(module, lengths, rows, context)

    return cost


def _context(
    config: ModelConfig,
    name: str,
    frozen: Frozen,
    vocab_size: int,
    seq_length: int,
    lora: Lora | None,
) -> FlopsContext:
    """Settings that the operations of a module depend on."""
    adapters = {} if lora is None else lora.targets
    return FlopsContext(
        frozen=config.frozen_in(name, frozen),
        row_width=config.row_width,
        vocab_size=vocab_size,
        seq_length=seq_length,
        rows_train=any(config.trains(source, frozen) for source in config.sources),
        lora={
            part: LoraLayers(rank=lora.rank, layers=layers)
            for part, layers in config.of_module(name, adapters).items()
            if lora is not None
        },
    )
