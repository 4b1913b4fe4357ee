"""The places in megatron-core itself that need a GPU."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

_TRITON_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"


def import_engine() -> None:
    """Import megatron-core so that neither triton nor a compiler is needed, and patch it."""
    if importlib.util.find_spec("triton") is None:
        sys.modules[_TRITON_KERNELS] = _kernels_without_triton()
    # What still asks for compilation later, here or in a child process, runs as written.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with _uncompiled():
        dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _move_tensor_to_cpu  # type: ignore[attr-defined]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Let `torch.compile` return its function for the duration of an import.

    megatron-core takes it as its fuser when imported and decorates about forty small functions.
    Compiling them would cost seconds in each process, and loading the compiler alone one.
    """
    compile_ = torch.compile

    def keep(model: Any = None, **_kwargs: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = keep
    try:
        yield
    finally:
        torch.compile = compile_


def _kernels_without_triton() -> ModuleType:
    """The one module of kernels that megatron-core imports without asking whether it can."""
    module = ModuleType(_TRITON_KERNELS, "Stand-ins for triton kernels that a host never calls.")

    def kernel(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("the paged activation stash of MoE layers needs triton and a GPU")

    module.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
    module.paged_stash_copy_kernel = kernel  # type: ignore[attr-defined]
    module.paged_stash_pop_kernel = kernel  # type: ignore[attr-defined]
    return module


def _move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stand in for the MoE dispatcher's copy of split sizes to the host.

    The original converts to numpy only what lies on a GPU; here everything is on the host already.
    """
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
