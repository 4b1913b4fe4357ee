"""The interface between a family of modules and the rest of the program.

The rest of the program calls a family's adapter (`families.adapter_of`) and never checks the type
of a config. A family is a folder with its config, its adapter, its arithmetic and
its torch modules, and one line in the table of `families`. Adapters and configs import without
megatron-core, so that flags can be checked before a run starts; what needs it is imported by the
methods that build.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from megatron_mimo.modules.flops import Flops, Linear, LoraLayers, Work
from megatron_mimo.modules.language.config import ExecutionConfig
from megatron_mimo.modules.projector.config import ProjectorConfig

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mimo.modules.stage import ModuleStage

type Axis = Literal["tp", "cp", "pp", "ep", "expt_tp"]
"""A parallel axis that shares a module out; data parallelism copies it."""


class ModuleConfig(Protocol):
    """Architecture of a module: a frozen dataclass whose type names its family."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class Division(NamedTuple):
    """A field of the architecture that the ranks of an axis divide evenly.

    Attributes:
        axis: Name of the parallel axis.
        part: Name of the part of the module whose config has the field.
        field: Name of the field.
        repeats: Whether ranks may hold copies where there are fewer units than ranks.
    """

    axis: Axis
    part: str
    field: str
    repeats: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The MoE layers of a module.

    Attributes:
        layers: Numbers of the layers that have experts, from 1 among all layers.
        number: Number of experts of such a layer.
        per_token: Number of experts that a token is sent to.
    """

    layers: tuple[int, ...]
    number: int
    per_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildContext:
    """Settings that building a stage needs beyond the module's architecture.

    Attributes:
        pg_collection: Groups of the module's grid.
        params_dtype: Dtype of parameters, activations and rows.
        frozen: Names of the module's parts that do not train.
        row_width: Width of every row; in most families that of the language model, H.
        vocab_size: Number of tokens of a language model's vocabulary, V.
        seq_length: Number of positions of a language model's sequence, S.
        sequence_parallel: Whether a language model's tp ranks divide the sequence among them.
        execution: Recomputation, grouping and fusing in a language model.
        initialize: Whether to draw initial weights. Where weights are read from a file anyway, a
            family may leave them undefined, which saves the time to draw them.
        without_memory: Whether weights have shapes alone until `ModuleStage.materialise`, as
            data-parallel ranks divide them first.
    """

    pg_collection: "ProcessGroupCollection"
    params_dtype: "torch.dtype"
    row_width: int
    vocab_size: int
    seq_length: int
    frozen: frozenset[str] = frozenset()
    sequence_parallel: bool = False
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    initialize: bool = True
    without_memory: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsContext:
    """Settings that operations depend on beyond the module's architecture and its work.

    Attributes:
        frozen: Names of the module's parts that do not train.
        row_width: Width of every row; in most families that of the language model, H.
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Number of positions of a sequence, S.
        rows_train: Whether a source trains, so that a language model computes gradients of rows.
        lora: Part of the module -> the adapters that train in place of its weights.
    """

    row_width: int
    vocab_size: int
    seq_length: int
    frozen: frozenset[str] = frozenset()
    rows_train: bool = True
    lora: Mapping[str, LoraLayers] = MappingProxyType({})

    def trains(self, part: str) -> bool:
        """Whether a part has gradients, of its weights or of adapters."""
        return part not in self.frozen

    def linear(self, part: str, *, backward: bool) -> "Linear":
        """The count of a part's linear layers.

        Args:
            part: Name of the part.
            backward: Whether their inputs have gradients.
        """
        lora = self.lora.get(part)
        weight = self.trains(part) and lora is None
        return Linear(weight=weight, inputs=backward, lora=lora)


class ModuleAdapter[C: ModuleConfig, W: Work](ABC):
    """Adapter of a family of modules; derive from `SourceAdapter` or `LanguageAdapter`.

    An adapter has no state: all that it knows of a module is the config that it is given.

    Attributes:
        config_type: Type of the family's config, by which an architecture names the family.
        work_type: Type of the work of its modules; called without arguments it gives zero work.
    """

    config_type: type[C]
    work_type: type[W]

    def own(self, config: object) -> C | None:
        """A module's config if it is of this family, else None."""
        return config if isinstance(config, self.config_type) else None

    # Parts

    def parts(self, config: C) -> Mapping[str, Any]:
        """The parts of a module by name, each with its config, a frozen dataclass.

        Names are used in `--override PART.FIELD=VALUE`, in the sections of `--model-config` and in
        `--freeze PART`. By default every field of the config is a part.
        """
        return {part.name: getattr(config, part.name) for part in fields(config)}

    def with_parts(self, config: C, parts: Mapping[str, Any]) -> C:
        """The module with some of its parts replaced.

        Raises:
            ValueError: The parts do not fit each other.
        """
        return replace(config, **parts)

    def part_titles(self, config: C) -> Mapping[str, str]:
        """Title of each part in tables; by default its name."""
        return {name: name for name in self.parts(config)}

    def trains(self, config: C, frozen: frozenset[str]) -> bool:
        """Whether any part trains; a source in which a part trains uses gradients of its rows.

        Args:
            config: Architecture of the module.
            frozen: Names of the module's parts that do not train.
        """
        return any(name not in frozen for name in self.parts(config))

    def trains_inside(self, config: C, frozen: frozenset[str]) -> bool:
        """Whether any part before the last stage trains, so that gradients pass between stages.

        Not used for a language model, between whose stages gradients always pass. By default the
        result of `trains`, which is right for a module whose last stage has no part of its own.
        """
        return self.trains(config, frozen)

    def linear_layers(
        self, config: C, row_width: int
    ) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """Layers that may have adapters of low rank: part -> name -> widths of input and output.

        A name is the last of a layer's path in the part, `shared_experts.` in front for those of
        shared experts; layers of the same name have adapters together. By default there are none.

        Args:
            config: Architecture of the module.
            row_width: Width of the language model, H.
        """
        return {}

    # Building

    @abstractmethod
    def build(self, config: C, context: BuildContext) -> "ModuleStage":
        """This rank's shard of its pipeline stage; frozen parts have no weight that trains.

        Raises:
            ValueError: A size does not fit its parallel size; the message names both.
        """

    @abstractmethod
    def hidden_width(self, config: C) -> int:
        """Width of the hidden states between stages; for a language model also that of rows."""

    def prefixes(self, config: C, name: str) -> Mapping[str, str]:
        """Beginning of a weight's name in the stage -> its beginning in checkpoints.

        By default all weights are stored under the module's name.

        Args:
            config: Architecture of the module.
            name: Name of the module.
        """
        return {"": f"{name}."}

    def optimizer(self, config: C) -> Mapping[str, Any] | None:
        """Fields of `optim.config.AdamConfig` that differ from the run's values; None for none."""
        return None

    # Layouts

    def divisions(self, config: C) -> Iterable[Division]:
        """Fields that must divide by parallel sizes."""
        return ()

    def parallel_axes(self, config: C) -> frozenset[Axis]:
        """Axes among cp, ep and expt_tp that may be above 1; tp, pp and dp always may."""
        return frozenset()

    def check_stages(self, config: C, number: int) -> None:  # noqa: B027 (most accept any)
        """Refuse an unsupported number of pipeline stages that `divisions` does not refuse.

        Raises:
            ValueError: The layers cannot be divided into so many stages.
        """

    def check_sizes(  # noqa: B027 (most accept any)
        self, config: C, flags: Mapping[Axis, str], sizes: Mapping[Axis, int]
    ) -> None:
        """Refuse parallel sizes that `divisions` does not refuse.

        Args:
            config: Architecture of the module.
            flags: Axis -> flag that sets it.
            sizes: Axis -> size.

        Raises:
            ValueError: A layer cannot be divided so; the message names the flag.
        """

    def one_stage(self, config: C) -> C:
        """The config without its boundaries between pipeline stages, where it has any."""
        return config

    # What a run says of itself

    @abstractmethod
    def flops(self, config: C, work: W, context: FlopsContext) -> Flops:
        """Number of operations of some work and its backward, as `modules.flops` counts them."""

    def experts(self, config: C) -> Experts | None:
        """The module's MoE layers; None without any."""
        return None

    def kernels(self, config: C) -> tuple[str, ...]:
        """Lines of the start-up log on the kernels of layers that only this family has."""
        return ()


class SourceAdapter[C: ModuleConfig, W: Work](ModuleAdapter[C, W]):
    """A family of modules that feed rows to the language model."""

    def projections(self, config: C) -> frozenset[str]:
        """Names of the parts that only map rows to the width of the language model.

        The training stages "stage1" and "stage2" train them while the rest of the module is frozen.
        By default they are the parts whose config is a `ProjectorConfig`.
        """
        parts = self.parts(config).items()
        return frozenset(name for name, part in parts if isinstance(part, ProjectorConfig))

    @abstractmethod
    def work(self, config: C, packed: Any) -> W:
        """Work of one packed input, with which a stage is called."""

    def item_work(self, config: C, lengths: Sequence[int], rows: int) -> W:
        """Work of one item, from its sizes alone.

        By default its rows. The sum over items should be the work of their packed input, up to what
        no item has by itself, such as gaps between items.

        Args:
            config: Architecture of the module.
            lengths: Number of tokens of each segment of the item (`ItemInput.lengths`).
            rows: Number of rows of the item.
        """
        return self.work_type(rows=rows)

    def item_cost(self, config: C, lengths: Sequence[int], rows: int, context: FlopsContext) -> int:
        """Number of operations of one item, forward and backward, by which items are shared out.

        Args:
            config: Architecture of the module.
            lengths: Number of tokens of each segment of the item.
            rows: Number of rows of the item.
            context: Sizes, and the parts that train.
        """
        return self.flops(config, self.item_work(config, lengths, rows), context).total

    def part(self, config: C, packed: Any, *, rank: int, ranks: int) -> Any:
        """The part of a packed input that a context-parallel rank of a replica computes.

        It is cut out on the host, ahead of the step, and a stage is then called with it: rows of
        the last stage are still those of the whole packed input, in its order, on every rank. Its
        `num_tokens` are those of the rank, which may have none. Needed by families with the axis cp
        among their `parallel_axes`.

        Args:
            config: Architecture of the module.
            packed: Packed input of the replica in a microbatch, on the host.
            rank: Number of the context-parallel rank.
            ranks: Number of context-parallel ranks, at least 2.
        """
        raise NotImplementedError(f"{type(self).__name__} has no context parallelism")

    @abstractmethod
    def item_input(self, config: C, *, name: str, frozen: frozenset[str], **settings: Any) -> Any:
        """The conversion of items (images, recordings) into packed inputs of the module.

        Args:
            config: Architecture of the module.
            name: Name of the module. Placeholders of two modules of one family must differ.
            frozen: Names of the module's parts that do not train; augmentation may depend on it.
            settings: Fields that the architecture leaves open, with the values of the flags.
        """

    def takes(self, config: C) -> str:
        """What the module's items are, in a word; by default that of the family.

        Modules of one word need different placeholders.
        """
        return type(config).__name__

    def without_videos(self, config: C) -> tuple[C, C] | None:
        """The same module without videos, and one that takes them alone.

        None, the default, for a module that does not take videos beside others.
        """
        return None

    def guest_inputs(
        self, config: C, *, name: str, frozen: frozenset[str], **settings: Any
    ) -> Mapping[str, Any]:
        """Further kinds of items that the module takes, by name, such as videos beside images.

        Their `feeds` is the module's name. By default there are none; arguments are those of
        `item_input`.
        """
        return {}
