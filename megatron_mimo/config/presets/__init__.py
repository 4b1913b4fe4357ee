"""Model architectures by name; a new one is one short Python module."""

from megatron_mimo.config.presets.providers import (
    PROVIDERS,
    changed,
    model_config,
    register_provider,
)

__all__ = ["PROVIDERS", "changed", "model_config", "register_provider"]
