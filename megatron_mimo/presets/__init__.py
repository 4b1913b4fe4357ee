"""Model architectures by name; adding one is one short module."""

from megatron_mimo.presets.providers import PROVIDERS, changed, model_config

__all__ = ["PROVIDERS", "changed", "model_config"]
