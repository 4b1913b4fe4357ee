"""What is in the integers of a paper rank's device, where it follows from the data and the sizes.

Models read some of their integers back, or choose elements by them: the sides of images, the places
of image tokens, positions. Such tensors have a twin on the host, with the same content, for as long
as they live. Every operation whose inputs are all known is done on the twins too. What comes from
weights and pixels stays unknown; floating-point numbers are known where they come from integers of
the device, as the weights of averages over positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

_aten = torch.ops.aten
_HOST, _DEVICE = torch.device("cpu"), torch.device("meta")
# Elements of the largest tensor that is known: a mask of 8,192 tokens by as many.
_MOST = 2**26
# Operators that take truth values in the place of numbers of elements.
_CHOOSING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Contents:
    """Twins on the host of tensors of the device."""

    def __init__(self) -> None:
        self._twins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> Tensor | None:
        """The content of a tensor [...]; None where it is not known."""
        return self._twins.get(tensor) if tensor.is_meta else tensor

    def forget(self, tensors: Any) -> None:
        """Say that others have written to tensors."""
        for tensor in _tensors(tensors):
            self._twins.pop(tensor, None)

    def choose(self, func: Any, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments of an operator with numbers in the place of known truth values."""
        if func._opname not in _CHOOSING:
            return args
        indices: list[Tensor | None] = []
        for index in args[1]:
            known = None if index is None else self.of(index)
            if known is not None and known.dtype in (torch.bool, torch.uint8):
                indices += [place.to(_DEVICE) for place in known.nonzero(as_tuple=True)]
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def ahead(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of an operator whose shape follows from content; None where it has another.

        Raises:
            RuntimeError: The content is not known.
        """
        if func is _aten.masked_select.default:
            mask = self.of(args[1])
            if mask is not None and args[0].is_meta:
                shape = torch.broadcast_shapes(args[0].shape, mask.shape)
                return args[0].new_empty(int(mask.expand(shape).sum()))
            return None
        dynamic = torch.Tag.dynamic_output_shape in func.tags
        if not dynamic or func._opname in _CHOOSING or not self._knows(args, kwargs):
            return None
        found = self._on_host(func, args, kwargs)
        return tree_map_only(Tensor, self._made, found)

    def after(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Do on the twins what was done on the device.

        Args:
            func: Operator of torch.
            args: Its arguments.
            kwargs: Its arguments by name.
            result: Its result on the device.
        """
        made = _tensors(result)
        if not made or not all(tensor.is_meta for tensor in made):
            return
        if not self._follows(func, args, kwargs, made):
            if func._schema.is_mutable:
                self.forget(result)
            return
        found = self._on_host(func, args, kwargs)
        for tensor, twin in zip(made, _tensors(found), strict=True):
            self._twins[tensor] = twin

    def _follows(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Sequence[Tensor]
    ) -> bool:
        """Whether what was made is known from here on."""
        if torch.Tag.nondeterministic_seeded in func.tags or not self._knows(args, kwargs):
            return False
        of_device = any(tensor.is_meta for tensor in _tensors((args, kwargs)))
        return all((of_device or _is_whole(tensor)) and tensor.numel() <= _MOST for tensor in made)

    def _made(self, twin: Tensor) -> Tensor:
        tensor = torch.empty_strided(twin.shape, twin.stride(), dtype=twin.dtype, device=_DEVICE)
        self._twins[tensor] = twin
        return tensor

    def _knows(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        return all(self.of(tensor) is not None for tensor in _tensors((args, kwargs)))

    def _on_host(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        ours, named = tree_map_only(Tensor, self.of, (tuple(args), dict(kwargs)))
        if named.get("device") is not None:
            named["device"] = _HOST
        return func(*ours, **named)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _is_whole(tensor: Tensor) -> bool:
    """Whether its elements are integers or truth values."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
