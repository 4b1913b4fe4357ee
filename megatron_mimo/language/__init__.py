"""Language models over megatron-core."""

from megatron_mimo.language.config import GptConfig, HybridConfig
from megatron_mimo.language.model import HybridLM

__all__ = ["GptConfig", "HybridConfig", "HybridLM"]
