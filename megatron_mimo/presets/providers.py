"""Look a preset up and change single fields of it."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
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


def model_config(provider: str, overrides: Iterable[str] = ()) -> ModelConfig:
    """The architecture of a preset, with fields changed.

    Args:
        provider: Name of the preset.
        overrides: Each "section.field=value", for instance "language.num_layers=4".

    Raises:
        ValueError: The preset, section or field is unknown (the nearest known one is named), or the
            value does not parse as the field's type.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"--model-provider {provider}: expected one of {', '.join(PROVIDERS)}")
    config = PROVIDERS[provider]()
    for override in overrides:
        config = _apply(config, override)
    return config


def _apply(config: ModelConfig, override: str) -> ModelConfig:
    path, equals, text = override.partition("=")
    section, dot, field = path.strip().partition(".")
    if not (equals and dot):
        raise ValueError(
            f"--override {override}: expected section.field=value, as in language.num_layers=4"
        )
    part = _known(config, section, override)
    current = _known(part, field, override)
    if isinstance(current, tuple):
        value = tuple(_parse(item.strip(), type(current[0]), override) for item in text.split(","))
    else:
        value = _parse(text.strip(), type(current), override)
    changed = dataclasses.replace(part, **{field: value})
    return dataclasses.replace(config, **{section: changed})


def _known(config: Any, name: str, override: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? known" if near else "known"
        raise ValueError(f"--override {override}: unknown {name!r}; {hint}: {', '.join(names)}")
    return getattr(config, name)


def _parse(text: str, kind: type, override: str) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"--override {override}: expected true or false, not {text!r}")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--override {override}: expected {kind.__name__}, not {text!r}") from None
