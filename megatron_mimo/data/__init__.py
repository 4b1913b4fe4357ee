"""Samples, tokens and packed items: the data of a step, and its sources."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mimo.data.config import DataConfig
    from megatron_mimo.data.inputs import (
        BrokenItemError,
        Inputs,
        Item,
        ItemInput,
        ItemWords,
        MockItems,
        OneRunItems,
        PackedInput,
    )
    from megatron_mimo.data.loader.batch import (
        Microbatch,
        StepData,
        StepLoader,
        TextBatch,
    )
    from megatron_mimo.data.loader.stream_loader import (
        StreamLoader,
        build_eval_loader,
        build_list_loader,
        build_train_loader,
    )
    from megatron_mimo.data.loader.trace import SampleTrace
    from megatron_mimo.data.role import DataRole, SourceRole, data_role
    from megatron_mimo.data.samples.sample import RawSample
    from megatron_mimo.data.text.conversation import Turn
    from megatron_mimo.data.text.prompt import tokenizer_for
    from megatron_mimo.data.text.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "BrokenItemError",
    "ByteTokenizer",
    "DataConfig",
    "DataRole",
    "Inputs",
    "Item",
    "ItemInput",
    "ItemWords",
    "Microbatch",
    "MockItems",
    "OneRunItems",
    "PackedInput",
    "RawSample",
    "SampleTrace",
    "SourceRole",
    "StepData",
    "StepLoader",
    "StreamLoader",
    "TextBatch",
    "Tokenizer",
    "Turn",
    "build_eval_loader",
    "build_list_loader",
    "build_train_loader",
    "data_role",
    "tokenizer_for",
]

_HOMES = {
    "config": ("DataConfig",),
    "inputs": (
        "BrokenItemError",
        "Inputs",
        "Item",
        "ItemInput",
        "ItemWords",
        "MockItems",
        "OneRunItems",
        "PackedInput",
    ),
    "role": ("DataRole", "SourceRole", "data_role"),
    "loader.batch": ("Microbatch", "StepData", "StepLoader", "TextBatch"),
    "loader.stream_loader": (
        "StreamLoader",
        "build_eval_loader",
        "build_list_loader",
        "build_train_loader",
    ),
    "loader.trace": ("SampleTrace",),
    "samples.sample": ("RawSample",),
    "text.conversation": ("Turn",),
    "text.prompt": ("tokenizer_for",),
    "text.tokenizer": ("ByteTokenizer", "Tokenizer"),
}


def __getattr__(name: str) -> Any:
    """Import a name on demand: the command line reads the flags of data without torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
