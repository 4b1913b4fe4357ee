"""The architecture of a multimodal model, module by module."""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from megatron_mimo.model.reduce import ReduceConfig as ReduceConfig
from megatron_mimo.modules.adapter import ModuleConfig
from megatron_mimo.modules.families import adapter_of, language_adapter, source_adapter
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio.config import (
    RadioConfig,
    RadioModuleConfig,
    VideoEmbeddingConfig,
)

Frozen = frozenset[str]
"""Names of the parts of a model that do not train, as in `ModelConfig.parts`."""


class _Place(NamedTuple):
    """Position of a part in a model.

    Attributes:
        module: Name of the module.
        part: Name of the part within the module.
    """

    module: str
    part: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of every module.

    Attributes:
        modules: Architecture of each module by its name, in order; the last is the language model,
            which all others feed.

    Raises:
        ValueError: A module is of no known family, or the last one is not a language model, or
            another one is.
    """

    modules: Mapping[str, ModuleConfig]

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError("a model without modules: expected a language model at least")
        language_adapter(self.target)
        for config in self.sources.values():
            source_adapter(config)

    @property
    def target_name(self) -> str:
        """Name of the language model."""
        return list(self.modules)[-1]

    @property
    def target(self) -> ModuleConfig:
        """Architecture of the language model."""
        return self.modules[self.target_name]

    @property
    def sources(self) -> Mapping[str, ModuleConfig]:
        """The modules that feed the language model."""
        return {name: self.modules[name] for name in list(self.modules)[:-1]}

    @property
    def row_width(self) -> int:
        """Width of every row that the language model is fed; in most families its own, H."""
        return language_adapter(self.target).row_width(self.target)

    @property
    def hidden_widths(self) -> Mapping[str, int]:
        """Width of the hidden states between the stages of each module."""
        return {
            name: adapter_of(config).hidden_width(config) for name, config in self.modules.items()
        }

    @property
    def parts(self) -> Mapping[str, Any]:
        """Parts of all modules by name, each with its config.

        A name is the family's own, such as "vision"; where several modules have a part of the
        same name, it is MODULE.PART.
        """
        return {
            name: adapter_of(self.modules[place.module]).parts(self.modules[place.module])[
                place.part
            ]
            for name, place in self._places()
        }

    def part(self, name: str) -> Any:
        """The config of a part.

        Raises:
            ValueError: The model has no such part; names those that it has.
        """
        parts = self.parts
        if name not in parts:
            raise ValueError(unknown(name, parts))
        return parts[name]

    def with_parts(self, **parts: Any) -> Self:
        """The model with some of its parts replaced, by the names of `parts`.

        Raises:
            ValueError: The model has no such part, or parts of a module do not fit each other.
        """
        places, modules = dict(self._places()), dict(self.modules)
        changed: dict[str, dict[str, Any]] = {}
        for name, config in parts.items():
            if name not in places:
                raise ValueError(unknown(name, places))
            changed.setdefault(places[name].module, {})[places[name].part] = config
        for module, configs in changed.items():
            modules[module] = adapter_of(modules[module]).with_parts(modules[module], configs)
        return type(self)(modules=modules)

    def part_name(self, module: str, part: str) -> str:
        """Name of a part in `parts`, from the name of its module and its name within the module."""
        return next(name for name, place in self._places() if place == (module, part))

    def parts_of(self, module: str) -> tuple[str, ...]:
        """Names of a module's parts in `parts`."""
        return tuple(name for name, place in self._places() if place.module == module)

    def frozen_in(self, module: str, frozen: Frozen) -> frozenset[str]:
        """Names, within the module, of its parts that do not train.

        Args:
            module: Name of the module.
            frozen: Names of parts of the model.

        Raises:
            ValueError: The model has no such part; names those that it has.
        """
        places = dict(self._places())
        for name in sorted(frozen):
            if name not in places:
                raise ValueError(unknown(name, places))
        return frozenset(
            place.part
            for name, place in places.items()
            if name in frozen and place.module == module
        )

    def of_module[T](self, module: str, by_part: Mapping[str, T]) -> dict[str, T]:
        """What belongs to the parts of a module, by their names within it.

        Args:
            module: Name of the module.
            by_part: Values by the names of parts of the model.
        """
        return {
            place.part: by_part[name]
            for name, place in self._places()
            if name in by_part and place.module == module
        }

    def trains(self, module: str, frozen: Frozen) -> bool:
        """Whether any part of a module trains; arguments and errors are those of `frozen_in`."""
        config = self.modules[module]
        return adapter_of(config).trains(config, self.frozen_in(module, frozen))

    def prefixes(self, *, lora: bool = False) -> Mapping[str, Mapping[str, str]]:
        """Module -> beginning of a weight's name in it -> its beginning in checkpoints.

        Where modules of one family would share names, those of each stand under the module's.

        Args:
            lora: Whether the modules have adapters of low rank.
        """
        found = {
            name: adapter_of(config).prefixes(config, name) for name, config in self.modules.items()
        }
        uses = Counter(stored for prefixes in found.values() for stored in prefixes.values())
        beside = {module: {"lora.": f"lora.{module}."} if lora else {} for module in found}
        return {
            module: beside[module]
            | {
                own: stored if uses[stored] == 1 else f"{module}.{stored}"
                for own, stored in prefixes.items()
            }
            for module, prefixes in found.items()
        }

    def _places(self) -> Iterator[tuple[str, _Place]]:
        """Name of each part, and its position."""
        places = [
            _Place(module, part)
            for module, config in self.modules.items()
            for part in adapter_of(config).parts(config)
        ]
        uses = Counter(place.part for place in places)
        for place in places:
            yield place.part if uses[place.part] == 1 else ".".join(place), place


def vision_language(
    *,
    vision: RadioConfig,
    projector: ProjectorConfig,
    language: ModuleConfig,
    video: VideoEmbeddingConfig | None = None,
    audio: ModuleConfig | None = None,
) -> ModelConfig:
    """A model of the modules "encoder", RADIO with a projector, and "llm", which it feeds.

    Args:
        vision: Architecture of RADIO.
        projector: Architecture of its projector.
        language: Architecture of the language model.
        video: Embedding of videos of the encoder; None for images alone.
        audio: Architecture of a module "audio", which feeds the language model too; None for none.
    """
    encoder = RadioModuleConfig(vision=vision, projector=projector, video=video)
    beside = {} if audio is None else {"audio": audio}
    return ModelConfig(modules={"encoder": encoder, **beside, "llm": language})


def unknown(name: str, known: Mapping[str, Any]) -> str:
    """Error text for an unknown name, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? known" if near else "known"
    return f"unknown {name!r}; {hint}: {', '.join(known)}"
