"""Answers operations of a paper rank that need content or peers, and records what it does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_mimo.runtime.paper.contents import Contents
from megatron_mimo.runtime.paper.memory import DeviceBytes
from megatron_mimo.runtime.paper.traffic import Traffic

_aten = torch.ops.aten
_HOST = torch.device("cpu")


class PaperMode(TorchDispatchMode):
    """Sees every operation of a paper rank, in forward, in backward and in the optimizer.

    Numbers that are read back from the device are ones: finite, positive, and true; but integers
    that follow from the data and from sizes are what they are.

    Attributes:
        traffic: What was exchanged; replace it to begin anew.
        memory: What is held on the device.
        contents: What is in its integers, where it is known.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic()
        self.memory = DeviceBytes()
        self.contents = Contents()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self.traffic.record(func._opname, args)
            self.contents.forget(args)
            return _send_nothing(func, args, kwargs)
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            known = self.contents.of(args[0])
            return _one(args[0].dtype) if known is None else known.item()
        if func is _aten._to_copy.default and _leaves(args[0], kwargs.get("device")):
            known = self.contents.of(args[0])
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.ones(args[0].shape, dtype=dtype) if known is None else known.to(dtype)
        if func is _aten.copy_.default and _leaves(args[1], args[0].device):
            known = self.contents.of(args[1])
            return args[0].fill_(1) if known is None else args[0].copy_(known)
        result = self.contents.ahead(func, args, kwargs)
        if result is None:
            result = func(*self.contents.choose(func, args), **kwargs)
            self.contents.after(func, args, kwargs, result)
        self.memory.see(result)
        return result


def _send_nothing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a collective with empty host tensors in the place of device tensors.

    Not every version of torch lets all of its collectives take tensors of the device "meta".
    """
    if not _any_meta(args):
        return func(*args, **kwargs)
    result = func(*tree_map_only(Tensor, _blank, list(args)), **kwargs)
    # Operators that return tensors return their first argument.
    return (args[0], *result[1:]) if isinstance(result, tuple) else result


def _any_meta(argument: Any) -> bool:
    if isinstance(argument, Tensor):
        return argument.is_meta
    return isinstance(argument, list | tuple) and any(_any_meta(part) for part in argument)


def _blank(tensor: Tensor) -> Tensor:
    """A host tensor without elements, with as many rows: pieces of an exchange must sum to them."""
    rows = tensor.shape[:1]
    return torch.empty(*rows, 0, dtype=tensor.dtype, device=_HOST)


def _leaves(source: Tensor, target: torch.device | None) -> bool:
    """Whether a copy goes from the device to the host."""
    return source.is_meta and target is not None and torch.device(target) == _HOST


def _one(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
