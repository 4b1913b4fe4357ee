"""The places in megatron-core itself that need a GPU."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TRITON_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"


def import_megatron_core() -> None:
    """Import megatron-core so that neither triton nor a compiler is needed, and patch it."""
    if importlib.util.find_spec("triton") is None:
        sys.modules[_TRITON_KERNELS] = _kernels_without_triton()
    # What still asks for compilation later, here or in a child process, runs as written.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with _uncompiled():
        dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _move_tensor_to_cpu  # type: ignore[attr-defined]
    _let_pieces_differ(importlib.import_module("megatron.core.tensor_parallel.mappings"))


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


def _let_pieces_differ(mappings: Any) -> None:
    """Let gather and scatter take pieces of different lengths, which gloo refuses.

    NCCL accepts them. Experts with both expert and tensor parallelism need them: the router decides
    how many tokens each rank has. Pieces are sent padded to the longest one.
    """
    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather_pieces(
        input_: Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or len(set(output_split_sizes)) == 1:
            whole: Tensor = gather(input_, group, output_split_sizes, use_global_buffer)
            return whole
        longest = max(output_split_sizes)
        padded = _padded(input_, longest)
        received = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(received, padded, group=group)
        pieces = zip(received, output_split_sizes, strict=True)
        return torch.cat([piece[:length] for piece, length in pieces])

    def reduce_scatter_pieces(
        input_: Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or len(set(input_split_sizes)) == 1:
            part: Tensor = reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
            return part
        longest = max(input_split_sizes)
        pieces = torch.split(input_, list(input_split_sizes))
        padded = [_padded(piece, longest) for piece in pieces]
        summed = torch.empty_like(padded[0])
        dist.reduce_scatter(summed, padded, group=group)
        return summed[: input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim = gather_pieces
    mappings._reduce_scatter_along_first_dim = reduce_scatter_pieces


def _padded(piece: Tensor, length: int) -> Tensor:
    """Pad [n, ...] with zeros at the end to [length, ...]; the dtype stays."""
    padded = piece.new_zeros(length, *piece.shape[1:])
    padded[: len(piece)] = piece
    return padded


def _kernels_without_triton() -> ModuleType:
    """Replacement for the one kernel module that megatron-core imports without a check."""
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
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor
