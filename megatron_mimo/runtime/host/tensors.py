"""Tensor factories and `Tensor` methods that read a CUDA device as the host.

Only a CUDA device is rewritten: "cpu", "meta" and no device at all go through unchanged. Nothing is
pinned.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.jit import _builtins as script_builtins
from torch.utils import _device as device_context

_FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)
_NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _host(device: Any) -> Any:
    """`device`, or the host where it names a GPU; other values come back unchanged."""
    if isinstance(device, str):
        return "cpu" if device.partition(":")[0] == "cuda" else device
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _with_host_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that takes its device by keyword."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _host(kwargs["device"])
        # Memory is pinned for a GPU to copy from.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapped


def _wrap_to(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(to)
    def wrapped(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The first argument is a device (a bare integer counts GPUs), a dtype or a tensor.
        if args:
            first = args[0]
            args = ("cpu" if type(first) is int else _host(first), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _host(kwargs["device"])
        return to(self, *args, **kwargs)

    return wrapped


def _wrap_type(type_: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core tells parameter dtypes apart by the names of CUDA tensor types."""

    @wraps(type_)
    def wrapped(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name: str = type_(self)
            return name.replace("torch.", "torch.cuda.", 1) if self.device.type == "cpu" else name
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return type_(self, dtype, *args, **kwargs)

    return wrapped


def _cuda(self: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """Stand in for `Tensor.cuda`: the tensor is where it should be."""
    return self


def _record_stream(self: Tensor, stream: object) -> None:
    """Stand in for `Tensor.record_stream`: no stream uses the tensor later."""


def install() -> None:
    """Wrap the factories and methods."""
    # `with torch.device("meta"):` compares called functions with a set that torch builds, once,
    # from the names on its module; the set must hold the functions that wrappers call.
    device_context._device_constructors()
    for name in _FACTORIES:
        factory = getattr(torch, name)
        wrapped = _with_host_device(factory)
        # TorchScript knows builtins by identity; scripted code goes on calling the original.
        builtin = script_builtins._find_builtin(factory)
        if builtin is not None:
            script_builtins._register_builtin(wrapped, builtin)
        setattr(torch, name, wrapped)
    for name in _NEW_METHODS:
        setattr(Tensor, name, _with_host_device(getattr(Tensor, name)))
    for name, method in (
        ("to", _wrap_to(Tensor.to)),
        ("type", _wrap_type(Tensor.type)),
        ("cuda", _cuda),
        ("record_stream", _record_stream),
    ):
        setattr(Tensor, name, method)
