"""Folders of transformers' vision-language models, as whole models."""

from megatron_mimo.model.hf.folder import HfFolder, read_hf

__all__ = ["HfFolder", "read_hf"]
