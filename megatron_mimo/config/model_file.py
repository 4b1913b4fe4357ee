"""The architecture that flags ask for: a preset or a folder, a file over it, fields over that."""

from collections.abc import Collection, Iterable

from megatron_mimo.config.presets import changed, model_config
from megatron_mimo.config.yaml_file import load_mapping
from megatron_mimo.data import Tokenizer
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.model.hf import HfFolder, read_hf
from megatron_mimo.model.omni.config import OmniConfig, is_omni, read_omni
from megatron_mimo.model.omni.parts import Optional
from megatron_mimo.weights.folder import WeightFolder

Folder = OmniConfig | HfFolder
"""A model as a folder of transformers describes it."""

HUGGING_FACE = "hf"
"""The provider that reads the architecture from `--load-hf`."""


def read_architecture(
    provider: str, file: str | None, overrides: Iterable[str], base: Folder | None = None
) -> ModelConfig:
    """The architecture of every module.

    Args:
        provider: Value of `--model-provider`.
        file: Path of `--model-config`; None without one.
        overrides: Values of `--override`.
        base: Model of the folder of `--load-hf`; None without one.

    Raises:
        ValueError: A preset, file, section, field or value is wrong; the message says where.
    """
    flag = "--model-config"
    fields = {} if file is None else load_mapping(file, flag=flag)
    where = f"{flag} {file}"
    if base is not None:
        return changed(base.model, overrides, fields=fields, where=where)
    return model_config(provider, overrides, fields=fields, where=where)


def read_folder(
    provider: str, folder: str | None, without: Collection[Optional] = ()
) -> Folder | None:
    """The model of the folder of `--load-hf`; None without one.

    Args:
        provider: Value of --model-provider.
        folder: Value of --load-hf.
        without: Values of --load-hf-without.

    Raises:
        ValueError: The folder is given without the provider or the other way round, or has no
            model of a supported family.
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
        if is_omni(weights):
            return read_omni(weights, without)
        if without:
            raise ValueError(
                f"--load-hf-without {' '.join(without)} with --load-hf {folder}, which holds no "
                f"nemotron_h_omni model: leave it out"
            )
        return read_hf(weights)


def table_size(tokenizer: Tokenizer, folder: Folder | None) -> int:
    """Number of rows of the embedding table, V: the folder's, if the model comes from one.

    Raises:
        ValueError: The tokenizer has tokens that the folder's model does not have.
    """
    if folder is None:
        return tokenizer.vocab_size
    if tokenizer.num_tokens > folder.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.num_tokens} tokens, the model of --load-hf "
            f"{folder.vocab_size}: give the folder's own as --tokenizer-model"
        )
    return folder.vocab_size
