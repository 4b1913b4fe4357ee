"""Copies of a step's inputs to the device: ahead of their use, and without waiting for it.

A blocking copy behind posted receives and queued kernels makes the host wait for all of them, so
that it cannot prepare what follows. Therefore inputs are page-locked while the step before runs
(`Staging.pin`, in the loader's thread), and copied one microbatch ahead of their use on a stream of
their own (`Staging.ahead`). On a host inputs are used where they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def needs_copies(device: torch.device) -> bool:
    """Whether inputs have to be copied to a device: it is not the host."""
    return device.type != "cpu"


class Staging:
    """Moves inputs of a rank from the host to its device.

    Args:
        device: Device on which the rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if needs_copies(device) else None

    def pin[T](self, value: T) -> T:
        """A copy with tensors in page-locked memory; the value itself on a host.

        Any thread may call it.

        Args:
            value: Tensors of any shape on the host, in dataclasses, mappings and tuples.
        """
        if self._stream is None:
            return value
        # A new thread has the first GPU for its own, and would claim memory there.
        with torch.cuda.device(self._device):
            return map_tensors(value, Tensor.pin_memory)

    def ahead[T](self, values: Sequence[T | None]) -> "CopiedAhead[T]":
        """Begin to copy the inputs of a stage's microbatches, which it takes in order.

        Args:
            values: Inputs of each microbatch from `pin`; None where the stage has none.
        """
        return CopiedAhead(values, self._device, self._stream)


@dataclass(frozen=True, slots=True)
class _Copy[T]:
    """Inputs on the device, and the event after which they may be read."""

    value: T
    done: torch.cuda.Event


class CopiedAhead[T]:
    """The inputs of a stage in a step, of which the next ones are being copied.

    Only the next microbatch is copied ahead, so the device holds no more than it needs.

    Args:
        values: Inputs of each microbatch; None where the stage has none.
        device: Device to copy to.
        stream: Stream of the copies; None where inputs are used where they are.
    """

    def __init__(
        self, values: Sequence[T | None], device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self._values = values
        self._device = device
        self._stream = stream
        self._copies: dict[int, _Copy[T]] = {}
        self._begin_from(0)

    def take(self, microbatch: int) -> T:
        """The inputs of a microbatch, for the current stream; begins to copy the next ones.

        Args:
            microbatch: Index within the step; each is taken once at most, in ascending order.
        """
        value = self._values[microbatch]
        assert value is not None, f"microbatch {microbatch} has no inputs"
        if self._stream is None:
            return value
        if microbatch not in self._copies:
            # The one that was expected has been left out.
            self._copies.clear()
            self._begin_from(microbatch)
        copied = self._copies.pop(microbatch)
        self._begin_from(microbatch + 1)
        current = torch.cuda.current_stream()
        current.wait_event(copied.done)
        # Their memory belongs to the stream of the copies, and must not be used again before this
        # stream is done with it.
        map_tensors(copied.value, lambda tensor: _recorded(tensor, current))
        return copied.value

    def _begin_from(self, microbatch: int) -> None:
        """Begin to copy the first inputs from a microbatch on."""
        if self._stream is None:
            return
        for index in range(microbatch, len(self._values)):
            value = self._values[index]
            if value is not None:
                with torch.cuda.stream(self._stream):
                    copy = map_tensors(
                        value, lambda tensor: tensor.to(self._device, non_blocking=True)
                    )
                    self._copies[index] = _Copy(copy, self._stream.record_event())
                return


def map_tensors[T](value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A value with every tensor in it replaced by the function's result.

    Args:
        value: A tensor [...] of any shape, or dataclasses, mappings and tuples of tensors and of
            anything else, which is kept. What has no tensor in it is kept as it is.
        function: Function of one tensor.
    """
    return _mapped(value, function)  # type: ignore[no-any-return]


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    match value:
        case Tensor():
            return function(value)
        case tuple():
            items = tuple(_mapped(item, function) for item in value)
            return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
        case Mapping():
            return {key: _mapped(item, function) for key, item in value.items()}
        case _ if is_dataclass(value) and not isinstance(value, type):
            present = {field.name: getattr(value, field.name) for field in fields(value)}
            mapped = {name: _mapped(each, function) for name, each in present.items()}
            kept = all(mapped[name] is present[name] for name in present)
            return value if kept else replace(value, **mapped)
        case _:
            return value


def _recorded(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor
