"""Methods of tensors that move or read them, some of which no operator shows on a host."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.waits.places import DEVICE, Places, names_device

_to, _numpy, _tolist, _device = Tensor.to, Tensor.numpy, Tensor.tolist, Tensor.device


def host_copy(tensor: Tensor) -> Tensor:
    """A copy [...] that belongs to the host; no operator is seen to make it."""
    with _disable_current_modes():
        return tensor.detach().clone()


class Methods:
    """Replacements that know where tensors are.

    Args:
        places: Where tensors are.
        note: Function that is called with the kind and the name of what would wait.
    """

    def __init__(self, places: Places, note: Callable[[str, str], None]) -> None:
        self._places, self._note = places, note

    def replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """Owner, name and new value of each."""
        yield Tensor, "device", property(lambda tensor: self._device(tensor))
        yield Tensor, "to", lambda tensor, *args, **kwargs: self._to(tensor, *args, **kwargs)
        yield Tensor, "cuda", lambda tensor, *_, **kwargs: self._cuda(tensor, **kwargs)
        yield Tensor, "cpu", lambda tensor, *_, **_kw: self._cpu(tensor)
        yield Tensor, "pin_memory", lambda tensor, *_: self._pin_memory(tensor)
        yield Tensor, "numpy", self._reader("numpy", _numpy)
        yield Tensor, "tolist", self._reader("tolist", _tolist)

    def _device(self, tensor: Tensor) -> torch.device:
        if self._places.on_device(tensor):
            return DEVICE
        device: torch.device = _device.__get__(tensor)  # type: ignore[attr-defined]
        return device

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first argument is a device, a dtype or another tensor."""
        if args and isinstance(args[0], Tensor):
            args = (self._device(args[0]), args[0].dtype, *args[1:])
        target = args[0] if args else kwargs.get("device")
        if names_device(target) or type(target) is int:
            return self._to_device(tensor, args[1:], kwargs)
        if isinstance(target, (torch.device, str)) and self._places.on_device(tensor):
            return self._to_host(_to(tensor, *args, **kwargs), "to")
        return _to(tensor, *args, **kwargs)

    def _to_device(self, tensor: Tensor, rest: Any, kwargs: Any) -> Tensor:
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        if not self._places.on_device(tensor):
            return _to(tensor, DEVICE, *rest, **kwargs)
        # Nothing moves; the dtype may change.
        return _to(tensor, torch.device("cpu"), *rest, **kwargs)

    def _cuda(self, tensor: Tensor, *, non_blocking: bool = False, **_kwargs: Any) -> Tensor:
        return self._to(tensor, DEVICE, non_blocking=non_blocking)

    def _cpu(self, tensor: Tensor) -> Tensor:
        return self._to_host(tensor, "cpu") if self._places.on_device(tensor) else tensor

    def _to_host(self, tensor: Tensor, name: str) -> Tensor:
        self._note("copy to host", name)
        return host_copy(tensor)

    def _pin_memory(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self._places.pinned.add(copy)
        return copy

    def _reader(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._places.on_device(tensor):
                self._note("read", name)
            return method(tensor, *args, **kwargs)

        return read
