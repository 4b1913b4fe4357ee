"""mamba-ssm with its Triton kernels under the host adaptation, for the life of a process."""

import math
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def install(version: str) -> None:
    """Make megatron-core find mamba-ssm, whose kernels Triton's interpreter runs.

    To be called in a new process, before anything that imports Triton or megatron-core. What is
    replaced is all here: the compiled modules of causal-conv1d and of Mamba-1, the choice among
    sizes of blocks, which would measure them on a GPU, and the number of a GPU's processors.

    Args:
        version: One of `packages.VERSIONS`.

    Raises:
        NotFetched: A package is not there.
    """
    from tests.interpreted import convolution
    from tests.interpreted.packages import folders_of

    # Read where a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = map(str, folders_of(version))
    compiled: Any = ModuleType("causal_conv1d_cuda")
    compiled.causal_conv1d_fwd = convolution.causal_conv1d_fwd
    compiled.causal_conv1d_bwd = convolution.causal_conv1d_bwd
    sys.modules[compiled.__name__] = compiled
    # The package imports it at its top; Mamba-1 alone calls it.
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")

    from megatron_mimo.runtime import prepare_megatron_core, resolve_device

    prepare_megatron_core(resolve_device("cpu"))
    _replace_what_asks_for_a_gpu()


def _replace_what_asks_for_a_gpu() -> None:
    import torch
    from triton.runtime.autotuner import Autotuner

    tuner: Any = Autotuner
    tuner._bench = _size_of_blocks
    cuda: Any = torch.cuda
    card = SimpleNamespace(multi_processor_count=4)
    cuda.get_device_properties = lambda *_args: card


def _size_of_blocks(_tuner: Any, *_args: Any, config: Any, **_kwargs: Any) -> float:
    """Elements of a block, in the place of the time that a kernel takes: the smallest wins."""
    return math.prod(config.kwargs.values())
