"""Which tensors are of the hosts, on a machine where those of the device look the same.

On a host both lie in the same memory, so this is a question of how a tensor was made. It is of the
hosts when a GPU could not have it:

- its memory is shared with another process;
- it was made without a device, as in `torch.zeros(2)`, or of numpy's or Python's memory, while
  `factories_watched`.

What is computed from such a tensor cannot be told, nor can a view or a copy of it. Nor does its
memory tell: torch marks memory that numpy has seen, and a tensor of the device would have been
copied first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_MARK = "_made_without_device"
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn")
_FACTORIES += ("randperm", "scalar_tensor", "tensor", "zeros", "from_numpy", "frombuffer")
_MOVES = ("to", "cuda")


def reason(tensor: Tensor) -> str | None:
    """Why a tensor is one of the hosts; None where nothing says so."""
    if getattr(tensor, _MARK, False):
        return "was made without a device"
    return "lies in memory that processes share" if tensor.is_shared() else None


@contextmanager
def factories_watched() -> Iterator[None]:
    """Note which tensors are made without a device; for one thread's sake, but seen by all."""
    factories = {name: getattr(torch, name) for name in _FACTORIES}
    moves = {name: getattr(Tensor, name) for name in _MOVES}
    for name, factory in factories.items():
        setattr(torch, name, _noting(factory))
    for name, move in moves.items():
        setattr(Tensor, name, _forgetting(move))
    try:
        yield
    finally:
        for name, factory in factories.items():
            setattr(torch, name, factory)
        for name, move in moves.items():
            setattr(Tensor, name, move)


def _noting(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(factory)
    def noted(*args: Any, **kwargs: Any) -> Tensor:
        made = factory(*args, **kwargs)
        if kwargs.get("device") is None and made.device.type == "cpu":
            setattr(made, _MARK, True)
        return made

    return noted


def _forgetting(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A move to the device, which on a host gives the same tensor."""

    @wraps(move)
    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = move(self, *args, **kwargs)
        if hasattr(result, _MARK):
            delattr(result, _MARK)
        return result

    return moved
