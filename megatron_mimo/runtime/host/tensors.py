"""Tensor factories and `Tensor` methods that replace a CUDA device by another.

That is the host, or "meta" in a dry run. Only a CUDA device is rewritten: "cpu", "meta" and no
device at all go through unchanged. Nothing is pinned.
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
_HOST = torch.device("cpu")
_NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _elsewhere(device: Any, place: torch.device) -> Any:
    """`device`, or `place` where it names a GPU; other values come back unchanged."""
    if isinstance(device, str):
        return place.type if device.partition(":")[0] == "cuda" else device
    if isinstance(device, torch.device) and device.type == "cuda":
        return place
    return device


def _with_device(function: Callable[..., Any], place: torch.device) -> Callable[..., Any]:
    """Wrap a function that takes its device by keyword."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _elsewhere(kwargs["device"], place)
        # Memory is pinned for a GPU to copy from.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapped


def _wrap_to(to: Callable[..., Tensor], place: torch.device) -> Callable[..., Tensor]:
    @wraps(to)
    def wrapped(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The first argument is a device (a bare integer counts GPUs), a dtype or a tensor.
        if args:
            first = args[0]
            args = (place if type(first) is int else _elsewhere(first, place), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _elsewhere(kwargs["device"], place)
        return to(self, *args, **kwargs)

    return wrapped


def _wrap_type(type_: Callable[..., Any], place: torch.device) -> Callable[..., Any]:
    """megatron-core tells parameter dtypes apart by the names of CUDA tensor types."""

    @wraps(type_)
    def wrapped(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name: str = type_(self)
            # Elsewhere than on the device: meta tensors of a host, the host's in a dry run.
            if self.device.type != place.type:
                return name
            return f"torch.cuda.{name.rpartition('.')[2]}"
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return type_(self, dtype, *args, **kwargs)

    return wrapped


def _make_cuda(to: Callable[..., Tensor], place: torch.device) -> Callable[..., Tensor]:
    """Replacement for `Tensor.cuda`: on a host the tensor [...] is returned unchanged."""

    def cuda(self: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return to(self, place)

    return cuda


def _pin_memory(self: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """Replacement for `Tensor.pin_memory` of a tensor [...]: there is no GPU to copy from it."""
    return self


def _record_stream(self: Tensor, stream: object) -> None:
    """Replacement for `Tensor.record_stream` of a tensor [...]: no stream uses it later."""


def install(place: torch.device = _HOST) -> None:
    """Wrap the factories and methods.

    Args:
        place: Device that stands for every CUDA device: the host, or "meta".
    """
    # `with torch.device("meta"):` compares called functions with a set that torch builds, once,
    # from the names on its module; the set must hold the functions that wrappers call.
    device_context._device_constructors()
    for name in _FACTORIES:
        factory = getattr(torch, name)
        wrapped = _with_device(factory, place)
        # TorchScript knows builtins by identity; scripted code still calls the original.
        builtin = script_builtins._find_builtin(factory)
        if builtin is not None:
            script_builtins._register_builtin(wrapped, builtin)
        setattr(torch, name, wrapped)
    for name in _NEW_METHODS:
        setattr(Tensor, name, _with_device(getattr(Tensor, name), place))
    for name, method in (
        ("to", _wrap_to(Tensor.to, place)),
        ("type", _wrap_type(Tensor.type, place)),
        ("cuda", _make_cuda(Tensor.to, place)),
        ("pin_memory", _pin_memory),
        ("record_stream", _record_stream),
    ):
        setattr(Tensor, name, method)
