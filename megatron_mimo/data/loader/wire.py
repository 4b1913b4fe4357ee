"""Serialisation of values to one buffer of bytes, for other ranks: of a step, and of items.

Tensors and arrays are sent as their bytes in memory, and the rest, a few numbers and names, as
JSON. Nothing is pickled, and no name is imported: the registered types are those of a step, and
the items and packed inputs that the run's settings name, which both sides know, and any other type
is an error.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.inputs import PLAIN, Inputs, is_plain
from megatron_mimo.data.loader.batch import (
    Microbatch,
    ModuleDispatch,
    StepData,
    StepDispatch,
    TextBatch,
)

_STEP_TYPES = (StepData, StepDispatch, ModuleDispatch, Microbatch, TextBatch, ManifestEntry)
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("uint8", "bool", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}
# Kinds of arrays that are bytes alone: numbers and truth values.
_ARRAY_KINDS = "biufc"
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

    @classmethod
    def of_items(cls, inputs: Inputs, *others: type[Any]) -> Self:
        """The types of items of every kind and of their fields, and others.

        Args:
            inputs: Kinds of items of the run.
            others: Further frozen dataclasses.
        """
        by_name: dict[str, type[Any]] = {name_of(kind): kind for kind in others}
        for kind in inputs.values():
            _collect_dataclasses(kind.item_type, by_name)
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


def _collect_dataclasses(kind: Any, found: dict[str, type[Any]]) -> None:
    """Add the dataclasses that a type's annotations name, itself among them, by their names."""
    if isinstance(kind, type) and is_dataclass(kind):
        if name_of(kind) in found:
            return
        found[name_of(kind)] = kind
        try:
            hints = get_type_hints(kind)
        except NameError:  # Of names that are imported for type checkers alone.
            return
        for field in fields(kind):
            _collect_dataclasses(hints[field.name], found)
    for argument in get_args(kind):
        _collect_dataclasses(argument, found)


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
    """Serialise a step into one buffer, uint8 [n]; see `encode`."""
    return encode(step, types, "step")


def decode_step(buffer: Tensor, types: WireTypes) -> StepData:
    """The step that `encode_step` serialised to uint8 [n]; its tensors are views of the buffer."""
    step = decode(buffer, types)
    assert isinstance(step, StepData), type(step).__name__
    return step


@dataclass(frozen=True, slots=True)
class Parcel:
    """A value whose description is made, and whose contents are yet to be copied.

    Attributes:
        header: Description in JSON.
        contents: Bytes of each tensor and array, uint8 [n].
    """

    header: bytes
    contents: tuple[Tensor | NDArray[np.uint8], ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes of the buffer."""
        end = _aligned(_HEAD + len(self.header))
        for content in self.contents:
            end = _aligned(end + content.nbytes)
        return end

    def write(self, buffer: Tensor) -> None:
        """Write the header's length, the header and the contents.

        Args:
            buffer: Zeros, uint8 [nbytes].
        """
        here = buffer.numpy()
        here[:_HEAD] = np.frombuffer(len(self.header).to_bytes(_HEAD, sys.byteorder), np.uint8)
        here[_HEAD : _HEAD + len(self.header)] = np.frombuffer(self.header, np.uint8)
        start = _aligned(_HEAD + len(self.header))
        for content in self.contents:
            if isinstance(content, Tensor):
                buffer[start : start + content.nbytes] = content
            else:
                here[start : start + content.nbytes] = content
            start = _aligned(start + content.nbytes)


def parcel(value: Any, types: WireTypes, where: str) -> Parcel:
    """Describe a value that is to be sent.

    Args:
        value: Value of registered types, with tensors on the host.
        types: Types that may be sent.
        where: Name of the value for error messages.

    Raises:
        TypeError: A value has a type that is not registered; the message names its field.
    """
    contents: list[Tensor | NDArray[np.uint8]] = []
    header = json.dumps(_describe(value, types, contents, where)).encode()
    return Parcel(header, tuple(contents))


def encode(value: Any, types: WireTypes, where: str) -> Tensor:
    """Serialise a value into one buffer.

    Args:
        value: Value of registered types, with tensors on the host.
        types: Types that may be sent.
        where: Name of the value for error messages.

    Returns:
        The buffer, uint8 [n]: the header's length, the header in JSON, then the contents.

    Raises:
        TypeError: A value has a type that is not registered; the message names its field.
    """
    described = parcel(value, types, where)
    buffer = torch.zeros(described.nbytes, dtype=torch.uint8)
    described.write(buffer)
    return buffer


def decode(buffer: Tensor, types: WireTypes) -> Any:
    """The value that `encode` serialised; its tensors and arrays are views of the buffer.

    Args:
        buffer: Buffer of `encode`, uint8 [n].
        types: Types that may be built; the buffer must not name others.

    Raises:
        TypeError: The buffer names another type.
    """
    length = int.from_bytes(buffer[:_HEAD].numpy().tobytes(), sys.byteorder)
    header = json.loads(buffer[_HEAD : _HEAD + length].numpy().tobytes())
    value, end = _build(header, types, buffer, _aligned(_HEAD + length))
    assert end == len(buffer), (end, len(buffer))
    return value


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(tensor: Tensor) -> Tensor:
    # A view of another dtype needs a dimension to widen.
    return tensor.contiguous().flatten().view(torch.uint8)


def _describe(
    value: Any, types: WireTypes, contents: list[Tensor | NDArray[np.uint8]], where: str
) -> Any:
    """A value as JSON; contents are collected in the order in which `_build` needs them."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.integer() | np.floating() | np.bool_():
            return value.item()
        case np.ndarray() if value.dtype.kind in _ARRAY_KINDS:
            contents.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            return {"array": value.dtype.str, "shape": list(value.shape)}
        case Tensor() if str(value.dtype).removeprefix("torch.") in _DTYPES:
            contents.append(_bytes_of(value))
            return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        case tuple():
            return [
                _describe(item, types, contents, f"{where}[{i}]") for i, item in enumerate(value)
            ]
        case Mapping():
            return {
                "map": [
                    [key, _describe(item, types, contents, f"{where}[{key}]")]
                    for key, item in value.items()
                ]
            }
        case _ if types.known(value):
            values = (
                _describe(getattr(value, field.name), types, contents, f"{where}.{field.name}")
                for field in fields(value)
            )
            return {"record": name_of(type(value)), "values": list(values)}
        case _:
            what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"{where} is a {what}, which cannot be sent to other ranks: expected tensors of "
                f"{', '.join(_DTYPES)}, arrays, numbers, texts, tuples, or "
                f"{', '.join(types.by_name)}"
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
        case {"array": name, "shape": shape}:
            kind = np.dtype(name)
            end = start + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            return buffer[start:end].numpy().view(kind).reshape(shape), _aligned(end)
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
