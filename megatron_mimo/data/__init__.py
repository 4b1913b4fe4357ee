"""Samples, tokens and patches: what a step reads, and from where."""

from megatron_mimo.data.batch import (
    Microbatch,
    StepData,
    StepLoader,
    TextBatch,
)
from megatron_mimo.data.config import DataConfig, DataRole
from megatron_mimo.data.conversation import Turn
from megatron_mimo.data.loader import (
    StreamLoader,
    build_eval_loader,
    build_list_loader,
    build_train_loader,
)
from megatron_mimo.data.prompt import check_prompt_format
from megatron_mimo.data.sample import RawSample
from megatron_mimo.data.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer
from megatron_mimo.data.trace import SampleTrace

__all__ = [
    "ByteTokenizer",
    "DataConfig",
    "DataRole",
    "Microbatch",
    "RawSample",
    "SampleTrace",
    "StepData",
    "StepLoader",
    "StreamLoader",
    "TextBatch",
    "Tokenizer",
    "Turn",
    "build_eval_loader",
    "build_list_loader",
    "build_tokenizer",
    "build_train_loader",
    "check_prompt_format",
]
