"""The families of modules: type of a config -> its adapter."""

from dataclasses import is_dataclass
from typing import Any

from megatron_mimo.modules.adapter import ModuleAdapter, ModuleConfig, SourceAdapter
from megatron_mimo.modules.gpt.adapter import GptAdapter
from megatron_mimo.modules.hf.adapter import HfEncoderAdapter, HfLanguageAdapter
from megatron_mimo.modules.hybrid.adapter import HybridAdapter
from megatron_mimo.modules.language.adapter import LanguageAdapter
from megatron_mimo.modules.parakeet.adapter import ParakeetAdapter
from megatron_mimo.modules.radio.adapter import RadioAdapter

_FAMILIES: dict[type, ModuleAdapter[Any, Any]] = {
    adapter.config_type: adapter
    for adapter in (
        RadioAdapter(),
        ParakeetAdapter(),
        GptAdapter(),
        HybridAdapter(),
        HfEncoderAdapter(),
        HfLanguageAdapter(),
    )
}


def register(adapter: ModuleAdapter[Any, Any]) -> None:
    """Add a family from outside of the package, in every process that uses its config.

    Args:
        adapter: Adapter of the family; registering an equal one again has no effect.

    Raises:
        ValueError: Another family has the same type of config, or the type is not a frozen
            dataclass.
    """
    kind = adapter.config_type
    if not (is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise ValueError(
            f"{type(adapter).__name__} is for {kind.__name__}: expected a frozen dataclass, whose "
            f"fields are the parts of the module"
        )
    known = _FAMILIES.setdefault(adapter.config_type, adapter)
    if type(known) is not type(adapter):
        raise ValueError(
            f"{type(adapter).__name__} is for {adapter.config_type.__name__}, as is "
            f"{type(known).__name__}: expected a type of config for each family"
        )


def adapter_of(config: ModuleConfig) -> ModuleAdapter[Any, Any]:
    """The adapter of a module's family.

    Args:
        config: Architecture of the module.

    Raises:
        ValueError: No family has configs of this type; the message names it and the known types.
    """
    for kind in type(config).__mro__:
        if kind in _FAMILIES:
            return _FAMILIES[kind]
    known = ", ".join(kind.__name__ for kind in _FAMILIES)
    raise ValueError(
        f"no family of modules has a config of type {type(config).__name__}: expected one of "
        f"{known}; `megatron_mimo.modules.families.register` adds a family"
    )


def source_adapter(config: ModuleConfig) -> SourceAdapter[Any, Any]:
    """The adapter of a module that feeds the language model.

    Raises:
        ValueError: The module is of no known family, or a language model.
    """
    adapter = adapter_of(config)
    if not isinstance(adapter, SourceAdapter):
        raise ValueError(
            f"a {type(config).__name__} feeds no rows to a language model: expected a module of a "
            f"family that does"
        )
    return adapter


def language_adapter(config: ModuleConfig) -> LanguageAdapter[Any]:
    """The adapter of a language model.

    Raises:
        ValueError: The module is of no known family, or is not a language model.
    """
    adapter = adapter_of(config)
    if not isinstance(adapter, LanguageAdapter):
        raise ValueError(
            f"a {type(config).__name__} is not a language model: expected one as the last module"
        )
    return adapter
