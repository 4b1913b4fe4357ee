"""The part that language models of all families share."""

from megatron_mimo.modules.language.config import ExecutionConfig

__all__ = ["ExecutionConfig"]
