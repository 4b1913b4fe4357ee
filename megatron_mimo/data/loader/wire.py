"""Serialisation of a step's data to one buffer of bytes, for the peers of the rank that reads.

Tensors are sent as their bytes in memory, and the rest, a few numbers and names, as JSON. Nothing
is pickled, and no name is imported: the registered types are those of a step and the packed inputs
that the run's settings name, which both sides know, and any other type is an error.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.inputs import PLAIN, Inputs, is_plain
from megatron_mimo.data.loader.batch import Microbatch, StepData, TextBatch

_STEP_TYPES = (StepData, Microbatch, TextBatch, ManifestEntry)
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("uint8", "bool", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}
# Alignment of tensors in bytes: suitable for any dtype, and for fast copies.
_ALIGNMENT = 64
_HEAD = 8


@dataclass(frozen=True, slots=True)
class WireTypes:
    """The registered types, which may be sent.

    Attributes:
        by_name: Qualified name -> frozen dataclass.
    """

    by_name: Mapping[str, type[Any]]

    @classmethod
    def of(cls, inputs: Inputs) -> Self:
        """The types of a step, and the packed type of every module.

        Raises:
            TypeError: A packed type cannot be rebuilt from its fields alone, or two types have the
                same qualified name.
        """
        by_name: dict[str, type[Any]] = {}
        for kind in (*_STEP_TYPES, *(each.packed_type for each in inputs.values())):
            name = name_of(kind)
            if not is_plain(kind):
                raise TypeError(f"packed input {name} cannot travel: {PLAIN}")
            if by_name.setdefault(name, kind) is not kind:
                raise TypeError(f"two packed inputs are named {name}: expected a name for each")
        return cls(by_name)

    def known(self, value: object) -> bool:
        """Whether a value is of one of the types; subtypes do not count."""
        return self.by_name.get(name_of(type(value))) is type(value)

    def named(self, name: str) -> type[Any]:
        """A type by its qualified name.

        Raises:
            TypeError: The settings name no such type.
        """
        if name not in self.by_name:
            raise TypeError(
                f"a step from another rank holds a {name}: expected {', '.join(self.by_name)}; "
                f"all ranks need the same inputs in their settings"
            )
        return self.by_name[name]


def name_of(kind: type[Any]) -> str:
    """A type's qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def require_sendable(packed: object, kind: type[Any], module: str, types: WireTypes) -> None:
    """Refuse a packed input that could not be sent, also on a rank that sends nothing.

    Args:
        packed: Result of a module's `ItemInput.pack`.
        kind: Its type, as the settings say.
        module: Name of the module.
        types: Types that may be sent.

    Raises:
        TypeError: It is of another type, or a field holds something that cannot be sent.
    """
    if type(packed) is not kind:
        raise TypeError(
            f"packed input of {module} is a {name_of(type(packed))}: expected its packed_type, "
            f"{name_of(kind)}"
        )
    _describe(packed, types, [], f"packed input of {module}")


def encode_step(step: StepData, types: WireTypes) -> Tensor:
    """Serialise a step into one buffer.

    Args:
        step: Data of a step, with tensors on the host.
        types: Types that may be sent.

    Returns:
        The buffer, uint8 [n]: the header's length, the header in JSON, then the tensors.

    Raises:
        TypeError: A value has a type that is not registered; the message names its field.
    """
    tensors: list[Tensor] = []
    header = json.dumps(_describe(step, types, tensors, "step")).encode()
    starts, end = [], _aligned(_HEAD + len(header))
    for tensor in tensors:
        starts.append(end)
        end = _aligned(end + tensor.nbytes)
    buffer = torch.zeros(end, dtype=torch.uint8)
    buffer[:_HEAD] = torch.frombuffer(
        bytearray(len(header).to_bytes(_HEAD, sys.byteorder)), dtype=torch.uint8
    )
    buffer[_HEAD : _HEAD + len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for start, tensor in zip(starts, tensors, strict=True):
        buffer[start : start + tensor.nbytes] = _bytes_of(tensor)
    return buffer


def decode_step(buffer: Tensor, types: WireTypes) -> StepData:
    """The step that `encode_step` serialised; its tensors are views of the buffer.

    Args:
        buffer: Buffer of `encode_step`, uint8 [n].
        types: Types that may be built; the buffer must not name others.

    Raises:
        TypeError: The buffer names another type.
    """
    length = int.from_bytes(buffer[:_HEAD].numpy().tobytes(), sys.byteorder)
    header = json.loads(buffer[_HEAD : _HEAD + length].numpy().tobytes())
    step, end = _build(header, types, buffer, _aligned(_HEAD + length))
    assert isinstance(step, StepData), type(step).__name__
    assert end == len(buffer), (end, len(buffer))
    return step


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(tensor: Tensor) -> Tensor:
    # A view of another dtype needs a dimension to widen.
    return tensor.contiguous().flatten().view(torch.uint8)


def _describe(value: Any, types: WireTypes, tensors: list[Tensor], where: str) -> Any:
    """A value as JSON; tensors are collected in the order in which `_build` needs them."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor() if str(value.dtype).removeprefix("torch.") in _DTYPES:
            tensors.append(value)
            return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        case tuple():
            return [
                _describe(item, types, tensors, f"{where}[{i}]") for i, item in enumerate(value)
            ]
        case Mapping():
            return {
                "map": [
                    [key, _describe(item, types, tensors, f"{where}[{key}]")]
                    for key, item in value.items()
                ]
            }
        case _ if types.known(value):
            values = (
                _describe(getattr(value, field.name), types, tensors, f"{where}.{field.name}")
                for field in fields(value)
            )
            return {"record": name_of(type(value)), "values": list(values)}
        case _:
            what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"{where} is a {what}, which cannot be sent to other ranks: expected tensors of "
                f"{', '.join(_DTYPES)}, numbers, texts, tuples, or {', '.join(types.by_name)}"
            )


def _build(described: Any, types: WireTypes, buffer: Tensor, start: int) -> tuple[Any, int]:
    """The value, and the offset of the next tensor in bytes."""
    match described:
        case list():
            items = []
            for item in described:
                built, start = _build(item, types, buffer, start)
                items.append(built)
            return tuple(items), start
        case {"tensor": name, "shape": shape}:
            dtype = _DTYPES[name]
            end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            return buffer[start:end].view(dtype).view(shape), _aligned(end)
        case {"map": pairs}:
            mapping = {}
            for key, item in pairs:
                mapping[key], start = _build(item, types, buffer, start)
            return mapping, start
        case {"record": name, "values": values}:
            record = types.named(name)
            arguments, start = _build(values, types, buffer, start)
            names = (field.name for field in fields(record))
            return record(**dict(zip(names, arguments, strict=True))), start
        case _:
            return described, start
