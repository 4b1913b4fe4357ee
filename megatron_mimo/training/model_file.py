"""The architecture that flags ask for: a preset, a file over it, single fields over that."""

from collections.abc import Iterable

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.presets import model_config
from megatron_mimo.training.yaml_file import load_mapping


def read_architecture(provider: str, file: str | None, overrides: Iterable[str]) -> ModelConfig:
    """Of every module.

    Args:
        provider: `--model-provider`.
        file: `--model-config`.
        overrides: Each an `--override`.

    Raises:
        ValueError: A preset, file, section, field or value is wrong; says where.
    """
    if file is None:
        return model_config(provider, overrides)
    flag = "--model-config"
    fields = load_mapping(file, flag=flag)
    return model_config(provider, overrides, fields=fields, where=f"{flag} {file}")
