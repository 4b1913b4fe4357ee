"""The architecture that flags ask for: a preset or a folder, a file over it, fields over that."""

from collections.abc import Iterable

from megatron_mimo.data import Tokenizer
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.omni.config import OmniConfig, read_omni
from megatron_mimo.presets import changed, model_config
from megatron_mimo.training.yaml_file import load_mapping
from megatron_mimo.weights.folder import WeightFolder

HUGGING_FACE = "hf"
"""The provider that reads the architecture from `--load-hf`."""


def read_architecture(
    provider: str, file: str | None, overrides: Iterable[str], base: OmniConfig | None = None
) -> ModelConfig:
    """Of every module.

    Args:
        provider: `--model-provider`.
        file: `--model-config`.
        overrides: Each an `--override`.
        base: What the folder of `--load-hf` says; None without one.

    Raises:
        ValueError: A preset, file, section, field or value is wrong; says where.
    """
    flag = "--model-config"
    fields = {} if file is None else load_mapping(file, flag=flag)
    where = f"{flag} {file}"
    if base is not None:
        return changed(base.model, overrides, fields=fields, where=where)
    return model_config(provider, overrides, fields=fields, where=where)


def read_folder(provider: str, folder: str | None) -> OmniConfig | None:
    """What the folder of `--load-hf` says; None without one.

    Raises:
        ValueError: The folder without the provider or the other way round, or a folder that is no
            `nemotron_h_omni` model.
    """
    if (provider == HUGGING_FACE) != (folder is not None):
        raise ValueError(
            f"--model-provider {provider} with "
            f"{'no --load-hf' if folder is None else f'--load-hf {folder}'}: the architecture "
            f"comes from the folder; give --model-provider {HUGGING_FACE} and --load-hf FOLDER, "
            f"or neither"
        )
    if folder is None:
        return None
    with WeightFolder(folder) as weights:
        return read_omni(weights)


def table_size(tokenizer: Tokenizer, folder: OmniConfig | None) -> int:
    """V, rows of the embedding table: the folder's, if the model comes from one.

    Raises:
        ValueError: The tokenizer has tokens that the folder's model has not.
    """
    if folder is None:
        return tokenizer.vocab_size
    if tokenizer.num_tokens > folder.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.num_tokens} tokens, the model of --load-hf "
            f"{folder.vocab_size}: give the folder's own as --tokenizer-model"
        )
    return folder.vocab_size
