"""A decoder of Mamba-2, MoE, attention and MLP layers (Nemotron-H) over megatron-core."""

from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.hybrid.pretrained import HybridLM

__all__ = ["HybridConfig", "HybridLM"]
