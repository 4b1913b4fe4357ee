"""Look a preset up and change single fields of it."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.presets.mock import mock
from megatron_mimo.presets.nemotron import (
    nemotron_moe_vlm_20l,
    nemotron_moe_vlm_54l,
    nemotron_moe_vlm_tiny,
)

PROVIDERS: dict[str, Callable[[], ModelConfig]] = {
    "mock": mock,
    "nemotron-moe-vlm-tiny": nemotron_moe_vlm_tiny,
    "nemotron-moe-vlm-20l": nemotron_moe_vlm_20l,
    "nemotron-moe-vlm-54l": nemotron_moe_vlm_54l,
}


def model_config(
    provider: str,
    overrides: Iterable[str] = (),
    *,
    fields: Mapping[str, Any] = MappingProxyType({}),
    where: str = "",
) -> ModelConfig:
    """The architecture of a preset, with fields changed.

    Args:
        provider: Name of the preset.
        overrides: Each "section.field=value", for instance "language.num_layers=4"; they win.
        fields: Section -> field -> value, for a model that no preset describes.
        where: Where those stand, for errors.

    Raises:
        ValueError: The preset, section or field is unknown (the nearest known one is named), or the
            value does not parse as the field's type.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"--model-provider {provider}: expected one of {', '.join(PROVIDERS)}")
    return changed(PROVIDERS[provider](), overrides, fields=fields, where=where)


def changed(
    config: ModelConfig,
    overrides: Iterable[str] = (),
    *,
    fields: Mapping[str, Any] = MappingProxyType({}),
    where: str = "",
) -> ModelConfig:
    """An architecture with fields changed; arguments and errors as of `model_config`."""
    changes = [_read_override(override) for override in overrides]
    return _apply(config, [*_read_fields(fields, where), *changes])


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """One field, and who wants it changed."""

    section: str
    field: str
    text: str
    where: str


def _read_override(override: str) -> _Change:
    path, equals, text = override.partition("=")
    section, dot, field = path.strip().partition(".")
    where = f"--override {override}"
    if not (equals and dot):
        raise ValueError(f"{where}: expected section.field=value, as in language.num_layers=4")
    return _Change(section, field, text, where)


def _read_fields(sections: Mapping[str, Any], source: str) -> Iterator[_Change]:
    for section, fields in sections.items():
        where = f"{source}: {section}"
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: expected fields and values, as in `hidden_size: 128`")
        for field, value in fields.items():
            items = value if isinstance(value, list) else [value]
            if any(item is None or isinstance(item, dict | list) for item in items):
                raise ValueError(f"{where}.{field}: expected a value or a list, not {value!r}")
            text = ",".join(str(item) for item in items)
            yield _Change(str(section), str(field), text, f"{where}.{field}")


def _apply(config: ModelConfig, changes: Iterable[_Change]) -> ModelConfig:
    """All changes of a section at once, since fields are checked against each other."""
    values: dict[str, dict[str, Any]] = {}
    for change in changes:
        part = _known(config, change.section, change.where)
        current = _known(part, change.field, change.where)
        if isinstance(current, tuple):
            items = [item.strip() for item in change.text.split(",")]
            value: Any = tuple(_parse(item, type(current[0]), change.where) for item in items)
        else:
            value = _parse(change.text.strip(), type(current), change.where)
        values.setdefault(change.section, {})[change.field] = value
    for section, fields in values.items():
        try:
            part = dataclasses.replace(getattr(config, section), **fields)
        except ValueError as error:
            raise ValueError(f"{section} of the model: {error}") from error
        config = dataclasses.replace(config, **{section: part})
    return config


def _known(config: Any, name: str, where: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? known" if near else "known"
        raise ValueError(f"{where}: unknown {name!r}; {hint}: {', '.join(names)}")
    return getattr(config, name)


def _parse(text: str, kind: type, where: str) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{where}: expected true or false, not {text!r}")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__}, not {text!r}") from None
