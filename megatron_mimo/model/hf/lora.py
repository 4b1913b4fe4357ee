"""Adapters of models of transformers' own forward, by the names that the models have."""

from megatron_mimo.modules.hf.config import HfLanguageConfig
from megatron_mimo.modules.hf.costs import linear_shapes
from megatron_mimo.modules.language.adapter import PART
from megatron_mimo.weights.table import Entry, Tables


def hf_tables(language: HfLanguageConfig) -> Tables:
    """Names of the weights that may have adapters: ours are transformers' own."""
    names = [f"{path}.weight" for path in linear_shapes(language.description)]
    return {PART: [Entry(name, (name,)) for name in names]}
