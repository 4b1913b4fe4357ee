"""Whole models as transformers' `NemotronH_Omni_Reasoning_V3` stores them.

Vision encoder, projector and language model are read and written; audio and video parts are carried
from one folder to the next as they are.
"""

from megatron_mimo.model.omni.config import OmniConfig, read_omni
from megatron_mimo.model.omni.model import OmniModel, load_pretrained

__all__ = ["OmniConfig", "OmniModel", "load_pretrained", "read_omni"]
