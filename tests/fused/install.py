"""Transformer Engine under the host adaptation, for the life of a process."""

import os
from importlib import import_module
from types import SimpleNamespace
from typing import Any


def install(version: str) -> None:
    """Make `kernels.specs` give Transformer Engine's layers, on a host.

    To be called in a new process, before anything that imports megatron-core: both bind names when
    they are imported.

    Args:
        version: One of `packages.VERSIONS`.

    Raises:
        NotFetched: The package is not there.
    """
    from tests.fused import cross_entropy
    from tests.fused.extension import install_extension
    from tests.fused.kernels import KERNELS
    from tests.fused.packages import folder_of

    # Otherwise the package loads CUDA's libraries, and asks that its own be installed.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    install_extension(
        folder_of(version),
        KERNELS,
        {"transformer_engine.pytorch.triton.cross_entropy": cross_entropy},
    )
    import torch

    # Read when layers are built: the number of blocks to start, kernels that exist.
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="host")
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *_args: card
    cuda.get_device_capability = lambda *_args: (9, 0)
    from megatron_mimo.runtime import prepare_megatron_core, resolve_device

    prepare_megatron_core(resolve_device("cpu"))
    _replace_what_asks_for_a_gpu()
    from megatron_mimo.kernels import specs

    specs.has_fused_layers = lambda: True


def _replace_what_asks_for_a_gpu() -> None:
    import torch

    from tests.fused import attention, context_parallel

    layers: Any = import_module("transformer_engine.pytorch")
    layers.DotProductAttention.forward = attention.forward
    parts: Any = import_module(attention.CONTEXT_PARALLEL)
    parts.fused_attn_fwd = context_parallel.fused_attn_fwd
    parts.fused_attn_bwd = context_parallel.fused_attn_bwd
    parts.flash_attn_p2p_communicate = context_parallel.waited_for_again(
        parts.flash_attn_p2p_communicate
    )
    # Tens of MiB of scratch memory for each kind of product.
    empty = torch.empty(1, dtype=torch.uint8)
    gemm: Any = import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.get_cublas_workspace = lambda _device, _ub, grouped: [empty] if grouped else empty
