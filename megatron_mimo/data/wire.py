"""A step's data as one run of bytes, for ranks that need the same as one that reads.

Tensors travel as they lie in memory, and the rest, a few numbers and names, as JSON. Nothing is
pickled: what may travel is listed here, and anything else is an error.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.batch import Microbatch, StepData, TextBatch
from megatron_mimo.images import PackedImages

_RECORDS = {
    record.__name__: record
    for record in (StepData, Microbatch, TextBatch, PackedImages, ManifestEntry)
}
_DTYPES = {
    name: getattr(torch, name)
    for name in ("uint8", "bool", "int32", "int64", "float16", "bfloat16", "float32", "float64")
}
# Tensors begin where any dtype may, and where copies are fast.
_ALIGNMENT = 64
_HEAD = 8


def encode_step(step: StepData) -> Tensor:
    """Lay a step out in one buffer.

    Args:
        step: Its tensors are on the host.

    Returns:
        uint8 [n]: the header's length, the header in JSON, then the tensors.

    Raises:
        TypeError: A value is of a type that is not known to travel; names its field.
    """
    tensors: list[Tensor] = []
    header = json.dumps(_describe(step, tensors, "step")).encode()
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


def decode_step(buffer: Tensor) -> StepData:
    """The step that `encode_step` laid out; its tensors are views of the buffer.

    Args:
        buffer: uint8 [n].
    """
    length = int.from_bytes(buffer[:_HEAD].numpy().tobytes(), sys.byteorder)
    header = json.loads(buffer[_HEAD : _HEAD + length].numpy().tobytes())
    step, end = _build(header, buffer, _aligned(_HEAD + length))
    assert isinstance(step, StepData), type(step).__name__
    assert end == len(buffer), (end, len(buffer))
    return step


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(tensor: Tensor) -> Tensor:
    # A view of another dtype needs a dimension to widen.
    return tensor.contiguous().flatten().view(torch.uint8)


def _describe(value: Any, tensors: list[Tensor], where: str) -> Any:
    """A value in JSON's terms; tensors are put aside, in the order in which `_build` meets them."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            tensors.append(value)
            return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        case tuple():
            return [_describe(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        case Mapping():
            pairs = value.items()
            return {"map": [[key, _describe(v, tensors, f"{where}[{key}]")] for key, v in pairs]}
        case _ if is_dataclass(value) and _RECORDS.get(type(value).__name__) is type(value):
            values = (
                _describe(getattr(value, field.name), tensors, f"{where}.{field.name}")
                for field in fields(value)
            )
            return {"record": type(value).__name__, "values": list(values)}
        case _:
            raise TypeError(
                f"{where} is a {type(value).__name__}, which cannot be sent to other ranks: "
                f"expected tensors, numbers, texts, or {', '.join(_RECORDS)}"
            )


def _build(described: Any, buffer: Tensor, start: int) -> tuple[Any, int]:
    """The value, and where the next tensor begins."""
    match described:
        case list():
            items = []
            for item in described:
                built, start = _build(item, buffer, start)
                items.append(built)
            return tuple(items), start
        case {"tensor": name, "shape": shape}:
            dtype = _DTYPES[name]
            end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            return buffer[start:end].view(dtype).view(shape), _aligned(end)
        case {"map": pairs}:
            mapping = {}
            for key, item in pairs:
                mapping[key], start = _build(item, buffer, start)
            return mapping, start
        case {"record": name, "values": values}:
            arguments, start = _build(values, buffer, start)
            record = _RECORDS[name]
            names = (field.name for field in fields(record))
            return record(**dict(zip(names, arguments, strict=True))), start
        case _:
            return described, start
