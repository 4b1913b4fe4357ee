"""Look up a preset, and change single fields of it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_origin

from megatron_mimo.config.presets.mock import mock
from megatron_mimo.config.presets.nemotron import (
    nemotron_moe_vlm_20l,
    nemotron_moe_vlm_54l,
    nemotron_moe_vlm_tiny,
)
from megatron_mimo.config.presets.omni import omni_tiny
from megatron_mimo.model.config import ModelConfig, unknown
from megatron_mimo.settings import Declared, declared, unmet

PROVIDERS: dict[str, Callable[[], ModelConfig]] = {
    "mock": mock,
    "nemotron-moe-vlm-tiny": nemotron_moe_vlm_tiny,
    "nemotron-moe-vlm-20l": nemotron_moe_vlm_20l,
    "nemotron-moe-vlm-54l": nemotron_moe_vlm_54l,
    "omni-tiny": omni_tiny,
}


def register_provider(name: str, provider: Callable[[], ModelConfig]) -> None:
    """Add a preset from outside of the package, for `--model-provider`.

    Args:
        name: Name of the preset.
        provider: Function that returns the architecture; registering it again has no effect.

    Raises:
        ValueError: Another preset has the name.
    """
    known = PROVIDERS.setdefault(name, provider)
    if known is not provider:
        raise ValueError(f"there is a preset {name!r} already: choose another name")


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
        overrides: Changes "part.field=value", for instance "language.num_layers=4"; they win.
        fields: Part -> field -> value, for a model that no preset describes.
        where: Location of `fields` for error messages.

    Raises:
        ValueError: The preset, part or field is unknown (the nearest known one is named), or the
            value does not parse as the field's type.
    """
    if provider not in PROVIDERS:
        raise ValueError(
            f"--model-provider {provider}: expected one of {', '.join(PROVIDERS)}, hf with "
            f"--load-hf, or one that a --custom-import registers"
        )
    return changed(_preset(provider), overrides, fields=fields, where=where)


def _preset(provider: str) -> ModelConfig:
    """The architecture of a preset, which may be code of the user."""
    try:
        found = PROVIDERS[provider]()
    except Exception as error:
        raise ValueError(
            f"--model-provider {provider} fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, ModelConfig):
        raise ValueError(
            f"--model-provider {provider} returns {type(found).__name__}: expected a ModelConfig"
        )
    return found


def changed(
    config: ModelConfig,
    overrides: Iterable[str] = (),
    *,
    fields: Mapping[str, Any] = MappingProxyType({}),
    where: str = "",
) -> ModelConfig:
    """An architecture with fields changed; arguments and errors are those of `model_config`."""
    changes = [_read_override(override) for override in overrides]
    return _apply(config, [*_read_fields(fields, where, config.parts), *changes])


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """A change of one field, and its origin."""

    section: str
    field: str
    text: str
    where: str


def _read_override(override: str) -> _Change:
    path, equals, text = override.partition("=")
    # The name of a part may have a dot: MODULE.PART.
    section, dot, field = path.strip().rpartition(".")
    where = f"--override {override}"
    if not (equals and dot):
        raise ValueError(f"{where}: expected section.field=value, as in language.num_layers=4")
    return _Change(section, field, text, where)


def _read_fields(
    sections: Mapping[str, Any], source: str, parts: Mapping[str, Any]
) -> Iterator[_Change]:
    for section, fields in sections.items():
        where = f"{source}: {section}"
        _known(parts, section, where)
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: expected fields and values, as in `hidden_size: 128`")
        for field, value in fields.items():
            items = value if isinstance(value, list) else [value]
            if any(item is None or isinstance(item, dict | list) for item in items):
                raise ValueError(f"{where}.{field}: expected a value or a list, not {value!r}")
            text = ",".join(str(item) for item in items)
            yield _Change(str(section), str(field), text, f"{where}.{field}")


def _apply(config: ModelConfig, changes: Iterable[_Change]) -> ModelConfig:
    """Apply all changes of a part at once, since fields are checked against each other."""
    parts = config.parts
    values: dict[str, dict[str, Any]] = {}
    for change in changes:
        part = _known(parts, change.section, change.where)
        field = _known(
            {field.path[-1]: field for field in declared(type(part))}, change.field, change.where
        )
        value = _parse(change.text, field, change.where)
        values.setdefault(change.section, {})[change.field] = value
    for section, changed_fields in values.items():
        try:
            part = dataclasses.replace(parts[section], **changed_fields)
            config = config.with_parts(**{section: part})
        except ValueError as error:
            raise ValueError(f"{section} of the model: {error}") from error
    return config


def _known(known: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in known:
        raise ValueError(f"{where}: {unknown(name, known)}")
    return known[name]


def _parse(text: str, field: Declared, where: str) -> Any:
    """The value of a field, which the field itself accepts.

    Raises:
        ValueError: The text is no such value; the message says what is expected.
    """
    is_tuple = get_origin(field.kind) is tuple
    texts = text.split(",") if is_tuple else [text]
    items = [_read(item.strip(), field.item_kind) for item in texts]
    value = tuple(items) if is_tuple else items[0]
    expected = unmet(field, value)
    if expected is None and any(isinstance(i, float) and not math.isfinite(i) for i in items):
        expected = "a finite number"  # Of a field without bounds, of a family from outside.
    if expected is not None:
        raise ValueError(f"{where}: expected {expected}, not {text.strip()!r}")
    return value


def _read(text: str, kind: Any) -> Any:
    """A text as a value of a kind; the text itself where it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        return text
