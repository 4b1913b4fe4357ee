"""Models of transformers on our grids: the tower on one, the language model on another.

No forward is replaced. Every pipeline stage runs the model's own forward on the real tokens, with
identities in place of the layers that other stages hold (`cut`).
"""

from megatron_mimo.modules.hf.config import HfEncoderConfig, HfLanguageConfig, HfTowerConfig
from megatron_mimo.modules.hf.family import FAMILIES, Family, family_of

__all__ = [
    "FAMILIES",
    "Family",
    "HfEncoderConfig",
    "HfLanguageConfig",
    "HfTowerConfig",
    "family_of",
]
