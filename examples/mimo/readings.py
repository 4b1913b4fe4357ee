r"""An encoder of sensor readings: a family of modules from outside of the package.

One file is all that a family needs: its architecture, the reading of its items, its computation,
and the line that registers it. A run imports it with `--custom-import readings`; the preset
"mock-readings" adds the encoder to vision and language model, on a separate grid:

    PYTHONPATH=examples/mimo megatron-mimo train --nproc 4 --custom-import readings \
        --model-provider mock-readings --grid readings.tp=2 --seq-length 96 --train-iters 200

docs/develop/add-a-module.md explains it step by step.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from megatron_mimo.config.presets import PROVIDERS, register_provider
from megatron_mimo.data import BrokenItemError, ItemWords, MockItems, OneRunItems
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.modules.adapter import BuildContext, Division, FlopsContext, SourceAdapter
from megatron_mimo.modules.families import register
from megatron_mimo.modules.flops import Flops, Work, product
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.settings import Within, check_fields

if TYPE_CHECKING:
    from megatron_mimo.modules.stage import ModuleStage

# Number of channels of a reading, and number of readings of a row.
CHANNELS, WINDOW = 4, 2


# -- architecture ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """Architecture of the layer that filters a window of readings.

    Attributes:
        hidden_size: Width of a filtered window.
        init_method_std: Standard deviation of the initial weights.
        mock_share: Fraction of mock samples that have readings, 0 to 1.
    """

    hidden_size: Annotated[int, Within(1, 1_000_000)] = 64
    init_method_std: Annotated[float, Within(0, 100)] = 0.5
    mock_share: Annotated[float, Within(0, 1)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingsConfig:
    """Architecture of the module: its fields are its parts.

    Attributes:
        filter: Architecture of a linear layer and a nonlinearity.
        mapping: Architecture of the projector to the width of the language model.
    """

    filter: FilterConfig = field(default_factory=FilterConfig)
    mapping: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(ffn_hidden_size=128, init_method_std=0.06)
    )


# -- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EncodedReadings:
    """The readings of one item, split into windows.

    Attributes:
        rows: Number of windows, each of which becomes a row.
        windows: Windows, float32 [rows, WINDOW * CHANNELS]; None where this rank does not run the
            module.
    """

    rows: int
    windows: np.ndarray[Any, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedReadings:
    """The readings that one rank runs in a microbatch, one item after the other.

    Attributes:
        windows: Windows of all items, float32 [R, WINDOW * CHANNELS].
        lengths: Number of windows of each item; they sum to R.
    """

    windows: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Number of windows, R."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingsInput(OneRunItems):
    """Readings as the items of a module: numpy files, float32 [n, CHANNELS].

    Attributes:
        placeholder: Placeholder of an item in texts, and the token that its rows replace.
        mock_share: Fraction of mock samples that have readings, 0 to 1.
    """

    placeholder: str = "<readings>"
    mock_share: float = 0.5

    @property
    def words(self) -> ItemWords:
        """Names of an item in messages and stored samples."""
        return ItemWords(noun="reading", smaller="cut the readings into shorter ones")

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files of stored samples."""
        return ("npy",)

    @property
    def item_type(self) -> type[EncodedReadings]:
        """Type of the result of `encode`."""
        return EncodedReadings

    @property
    def packed_type(self) -> type[PackedReadings]:
        """Type of the result of `pack`."""
        return PackedReadings

    def examine(self, source: bytes) -> int:
        """Number of readings of a file.

        Raises:
            BrokenItemError: The file is not a numpy file, or has another dtype or shape.
        """
        return len(_read(source))

    def encode(
        self, source: bytes, shape: int, *, with_content: bool
    ) -> tuple[EncodedReadings, str | None]:
        """Split readings into windows, with zeros at the end of the last one."""
        rows = -(-shape // WINDOW)
        if not with_content:
            return EncodedReadings(rows, None), None
        filled = np.zeros((rows * WINDOW, CHANNELS), np.float32)
        filled[:shape] = _read(source)
        return EncodedReadings(rows, filled.reshape(rows, -1)), None

    def pack(self, items: Sequence[EncodedReadings], seeds: Sequence[int]) -> PackedReadings | None:
        """Concatenate the windows of items; None for no item."""
        windows = [item.windows for item in items if item.windows is not None]
        if not windows:
            return None
        return PackedReadings(
            windows=torch.from_numpy(np.concatenate(windows)),
            lengths=tuple(len(each) for each in windows),
        )

    def without_augmentation(self) -> "ReadingsInput":
        """The same settings: there is no augmentation."""
        return self

    def mock(self, rng: np.random.Generator, room: int) -> MockItems | None:
        """Readings that rise or fall, with a question; None for a sample without readings."""
        if rng.random() >= self.mock_share:
            return None
        length, slope = int(rng.integers(2, 8)), float(rng.choice([-1.0, 1.0]))
        steps = slope * np.arange(length)[:, None] + rng.normal(0, 0.1, (length, CHANNELS))
        file = io.BytesIO()
        np.save(file, steps.astype(np.float32))
        return MockItems(
            sources=(file.getvalue(),),
            question=f"{self.placeholder}Trend?",
            answer="up" if slope > 0 else "down",
        )

    def check_mock(self, room: int) -> None:
        """Refuse a sequence without room for the longest mock item and its texts.

        Raises:
            ValueError: There is no room.
        """
        needed = 4 + len("Trend?\ndown") + 1
        if room < needed:
            raise ValueError(
                f"mock readings need {needed} positions and have {room}: raise --seq-length"
            )


def _read(source: bytes) -> np.ndarray[Any, Any]:
    try:
        found: np.ndarray[Any, Any] = np.load(io.BytesIO(source), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BrokenItemError(f"it is no file of numpy: {error}") from error
    if found.dtype != np.float32 or found.ndim != 2 or found.shape[1] != CHANNELS or not len(found):
        raise BrokenItemError(
            f"it holds {found.dtype} {list(found.shape)}: expected float32 [n, {CHANNELS}]"
        )
    return found


# -- what the rest of the program asks -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingsWork(Work):
    """What the module runs: its rows, one for each window."""


class ReadingsAdapter(SourceAdapter[ReadingsConfig, ReadingsWork]):
    """Adapter of the family."""

    config_type = ReadingsConfig
    work_type = ReadingsWork

    def build(self, config: ReadingsConfig, context: BuildContext) -> "ModuleStage":
        """This rank's shard of its pipeline stage: the filter on the first, the mapping last."""
        return _stage(config, context)

    def hidden_width(self, config: ReadingsConfig) -> int:
        """Width between two stages."""
        return config.filter.hidden_size

    def trains_inside(self, config: ReadingsConfig, frozen: frozenset[str]) -> bool:
        """Whether the filter trains; the mapping is on the last stage."""
        return "filter" not in frozen

    def divisions(self, config: ReadingsConfig) -> Iterable[Division]:
        """The mapping's inner width divides over tensor-parallel ranks."""
        return (Division("tp", "mapping", "ffn_hidden_size"),)

    def check_stages(self, config: ReadingsConfig, number: int) -> None:
        """Refuse more stages than the two parts of the module.

        Raises:
            ValueError: There are more than two stages.
        """
        if number > 2:
            raise ValueError(f"readings on {number} pipeline stages: expected 1 or 2")

    def work(self, config: ReadingsConfig, packed: PackedReadings) -> ReadingsWork:
        """Work of packed readings."""
        return ReadingsWork(rows=packed.num_tokens)

    def flops(self, config: ReadingsConfig, work: ReadingsWork, context: FlopsContext) -> Flops:
        """Number of operations of the filter and of both layers of the mapping."""
        filters, maps = ("filter" not in context.frozen, "mapping" not in context.frozen)
        width, inner = config.filter.hidden_size, config.mapping.ffn_hidden_size
        total = product(work.rows, WINDOW * CHANNELS, width, weight=filters, inputs=False)
        total += product(work.rows, width, inner, weight=maps, inputs=filters or maps)
        return total + product(
            work.rows, inner, context.row_width, weight=maps, inputs=filters or maps
        )

    def item_input(
        self, config: ReadingsConfig, *, name: str, frozen: frozenset[str], **settings: Any
    ) -> ReadingsInput:
        """Conversion of items for the data side."""
        return ReadingsInput(placeholder=f"<{name}>", mock_share=config.filter.mock_share)


def _stage(config: ReadingsConfig, context: BuildContext) -> "ModuleStage":
    # megatron-core can be imported only after a run has prepared it for the machine.
    from megatron_mimo.modules.projector.projector import Projector
    from megatron_mimo.modules.stage import ModuleStage
    from megatron_mimo.runtime.megatron_core import (
        is_first_stage,
        is_last_stage,
        transformer_config,
    )
    from megatron_mimo.weights.initial import Draw, Normal

    class ReadingsStage(ModuleStage):
        """A stage from windows to rows of the language model's width."""

        def __init__(self) -> None:
            groups, width = context.pg_collection, config.filter.hidden_size
            super().__init__(
                config=transformer_config(
                    groups,
                    params_dtype=context.params_dtype,
                    sequence_parallel=False,
                    num_layers=groups.pp.size(),
                    hidden_size=width,
                    num_attention_heads=groups.tp.size(),
                )
            )
            self.filter = self.mapping = None
            if is_first_stage(groups):
                self.filter = torch.nn.Linear(WINDOW * CHANNELS, width, dtype=context.params_dtype)
                # What `--init megatron` begins with; the other kind of initial weights comes after.
                torch.nn.init.normal_(self.filter.weight, std=config.filter.init_method_std)
            if is_last_stage(groups):
                self.mapping = Projector(
                    config.mapping, width, context.row_width, groups, context.params_dtype
                )
            for name, part in self.parts.items():
                if part is not None:
                    part.requires_grad_(name not in context.frozen)

        @property
        def parts(self) -> dict[str, torch.nn.Module | None]:
            """Submodule of each part; None for a part on another stage."""
            return {"filter": self.filter, "mapping": self.mapping}

        def initial(self, name: str) -> Draw | None:
            """Distribution of an initial weight; biases and norms stay as built."""
            if name.endswith(".bias") or ".norm." in name:
                return None
            is_filter = name.startswith("filter.")
            part = config.filter if is_filter else config.mapping
            return Normal(part.init_method_std)

        def forward(
            self, readings: PackedReadings, hidden: torch.Tensor | None = None
        ) -> torch.Tensor:
            """Rows [R, H of the language model] or hidden states [R, hidden_size], params_dtype."""
            if self.filter is not None:
                hidden = torch.tanh(self.filter(readings.windows.to(context.params_dtype)))
            assert hidden is not None
            if self.mapping is None:
                return hidden
            rows: torch.Tensor = self.mapping(hidden)
            return rows

    return ReadingsStage()


def mock_readings() -> ModelConfig:
    """The mock preset with readings in addition to vision."""
    *sources, (target, language) = PROVIDERS["mock"]().modules.items()
    return ModelConfig(modules={**dict(sources), "readings": ReadingsConfig(), target: language})


register(ReadingsAdapter())
register_provider("mock-readings", mock_readings)
