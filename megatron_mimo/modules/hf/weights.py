"""Weights of models of transformers: a rank reads its shards, one process writes whole tensors.

Names and forms on disk may differ from those in memory: old names, experts in tensors of their own,
transposed ones. transformers has tables of these (`conversion_mapping`), which are read here, so
that each rank can still read no more than its part.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.modules.hf.cut import EMBEDDING_WEIGHT, HEAD_WEIGHT, is_tied, meta_model
from megatron_mimo.weights.folder import WeightFolder, require_names
from megatron_mimo.weights.load import Place
from megatron_mimo.weights.shards import Held, held_part, is_expert, shard_spans, sharded_axis

PIECE = 16 * 2**20
"""Bytes of memory of the pieces in which a weight is read."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How a folder holds a weight.

    Attributes:
        names: Names of the tensors that are the weight: one; or, where experts have tensors of
            their own, those of each expert, which lie end to end in its first axis.
        stacked: Whether there is a list of names for each expert.
        transposed: Whether the last two axes are exchanged.
    """

    names: tuple[tuple[str, ...], ...]
    stacked: bool = False
    transposed: bool = False

    @property
    def flat(self) -> tuple[str, ...]:
        """Every name."""
        return tuple(name for names in self.names for name in names)


def stored_weights(folder: WeightFolder, model: Any) -> dict[str, Stored]:
    """How a folder holds every weight and buffer of a model, by its name in the model.

    Args:
        folder: Folder with the weights.
        model: The whole model, without memory.

    Raises:
        ValueError: Weights are missing or unexpected, or stored in a form that is not supported.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    wanted = dict(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(folder.names, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        found[target][pattern].append(name)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    optional = {name for name in found if any(re.search(one, name) for one in ignored)}
    if is_tied(model):
        wanted.pop(HEAD_WEIGHT, None)
        optional.add(HEAD_WEIGHT)
    require_names(folder.path, wanted, found, optional)
    result = {}
    for target, weight in wanted.items():
        held = found[target]
        if len(held) == 1 and None in held:
            name, *others = held[None]
            if others:
                raise ValueError(
                    f"{folder.path}: {name} and {others[0]} are the same weight, {target}, by an "
                    f"old and a new name: expected one of them; remove the other"
                )
            result[target] = Stored(((name,),))
        else:
            pattern = next(pattern for pattern in held if pattern is not None)
            result[target] = _converted(folder, target, of_pattern[pattern], held, weight)
        _require_shape(folder, target, result[target], list(weight.shape))
    return result


def _converted(
    folder: WeightFolder,
    target: str,
    converter: Any,
    held: Mapping[str | None, list[str]],
    weight: Tensor,
) -> Stored:
    """A weight that transformers makes of stored ones, whose names are given by pattern."""
    kinds = [type(operation).__name__ for operation in converter.operations]
    parts = [held[pattern] for pattern in converter.source_patterns if pattern in held]
    if kinds == ["Transpose"] and len(parts) == 1 and len(parts[0]) == 1:
        (name,) = parts[0]
        # As transformers does: a weight is exchanged where it would not fit otherwise.
        return Stored(((name,),), transposed=folder.shape(name) != list(weight.shape))
    if kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        if len(parts) < len(converter.source_patterns) or any(
            len(names) != weight.size(0) for names in parts
        ):
            raise ValueError(
                f"{folder.path}: {target} is stored as "
                f"{' and '.join(str(len(names)) for names in parts)} tensors: expected "
                f"{weight.size(0)}, one for each expert, of each of "
                f"{' and '.join(converter.source_patterns)}; copy the folder again"
            )
        return Stored(tuple(zip(*parts, strict=True)), stacked=True)
    raise ValueError(
        f"{folder.path}: {target} is stored in a form that transformers converts by "
        f"{', '.join(kinds)}, which is not supported: load the folder in transformers and save it "
        f"again"
    )


def _require_shape(folder: WeightFolder, target: str, stored: Stored, wanted: list[int]) -> None:
    """Refuse a stored weight of another shape; only headers are read.

    Raises:
        ValueError: It is; the message has both shapes.
    """
    for names in stored.names:
        shapes = [folder.shape(name) for name in names]
        found = list(shapes[0])
        if stored.transposed and len(found) == 3:
            found[1], found[2] = found[2], found[1]
        if stored.stacked:
            same = len({tuple(shape) for shape in shapes}) == 1
            found = [wanted[0], found[0] * len(names), *found[1:]] if same and found else []
        if found != wanted:
            of_each = f", in {len(names)} tensors of each expert" if stored.stacked else ""
            raise ValueError(
                f"{folder.path}: {names[0]} has the shape {shapes[0]}, but its config.json gives "
                f"{target} the shape {wanted}{of_each}: take both from one model"
            )


@torch.no_grad()
def fill(
    module: nn.Module, folder: WeightFolder, description: str, *, tp: Place, ep: Place
) -> None:
    """Copy this rank's shard of each weight of a stage from a folder.

    Nothing else is read, and a large weight is read in pieces, so that a rank needs hardly more
    memory than its shards.

    Args:
        module: Stage of the model, whose names are those of the whole.
        folder: Folder with the weights.
        description: Contents of the folder's config.json.
        tp: Rank and size of the tensor-parallel group.
        ep: Rank and size of the group that experts are distributed over.

    Raises:
        ValueError: A weight is missing, unexpected, in an unknown form or of another shape.
    """
    stored = stored_weights(folder, meta_model(description))
    for name, tensor in stage_tensors(module):
        # A tied head on a stage of its own is the embedding.
        source = EMBEDDING_WEIGHT if name == HEAD_WEIGHT and name not in stored else name
        _fill_one(folder, stored[source], tensor, tp, ep)


def stage_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and stored buffers [...] of a stage by their names; a tied weight once."""
    yield from module.named_parameters()
    stored = set(module.state_dict())
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in stored)


Spans = list[tuple[int, int]]
"""Half-open intervals of an axis, which lie one after the other in what they are copied to."""


def _fill_one(folder: WeightFolder, stored: Stored, tensor: Tensor, tp: Place, ep: Place) -> None:
    """Copy this rank's part of a weight."""
    if (part := held_part(tensor)) is not None:
        _fill_held(folder, stored, part)
        return
    axis = sharded_axis(tensor) if tp[1] > 1 else None
    expert = ep[1] > 1 and isinstance(tensor, nn.Parameter) and is_expert(tensor)
    rank, ranks = ep if expert else (0, 1)
    if not stored.stacked:
        (name,) = stored.flat
        spans = _whole(folder.shape(name), stored.transposed)
        if expert:
            own = spans[0][0][1] // ranks
            spans[0] = [(rank * own, (rank + 1) * own)]
        if axis is not None:
            length = spans[axis][0][1]
            spans[axis] = shard_spans(length, tensor, tp_rank=tp[0], tp_size=tp[1])
        _copy(folder, name, tensor, spans, transposed=stored.transposed)
        return
    own = len(stored.names) // ranks
    for held, names in zip(tensor, stored.names[rank * own : (rank + 1) * own], strict=True):
        for name, part in zip(names, held.chunk(len(names)), strict=True):
            spans = _whole(folder.shape(name))
            if axis is not None:
                # The axis of experts is not there.
                own_length = spans[axis - 1][0][1] // tp[1]
                spans[axis - 1] = [(tp[0] * own_length, (tp[0] + 1) * own_length)]
            _copy(folder, name, part, spans)


def _fill_held(folder: WeightFolder, stored: Stored, part: Held) -> None:
    """Copy what this data-parallel rank holds of a weight."""
    own = (part.first, part.last)
    if not stored.stacked:
        (name,) = stored.flat
        spans = _whole(folder.shape(name), stored.transposed)
        spans[part.axis] = [own]
        _copy(folder, name, part.values, spans, transposed=stored.transposed)
        return
    experts = stored.names if part.axis else stored.names[slice(*own)]
    for expert, names in zip(part.values, experts, strict=True):
        for name, into in zip(names, expert.chunk(len(names)), strict=True):
            spans = _whole(folder.shape(name))
            if part.axis:
                # Not the axis along which tensors of an expert lie end to end.
                spans[-1] = [own]
            _copy(folder, name, into, spans)


def _whole(shape: list[int], transposed: bool = False) -> list[Spans]:
    """Spans of everything, in the order of axes that the weight has in the model."""
    spans = [[(0, length)] for length in shape]
    if transposed:
        spans[1], spans[2] = spans[2], spans[1]
    return spans


def _copy(
    folder: WeightFolder,
    name: str,
    target: Tensor,
    spans: list[Spans],
    *,
    transposed: bool = False,
) -> None:
    """Copy the boxes of a stored tensor that spans of its axes make, a few megabytes at a time."""
    if not spans:
        target.copy_(folder.tensor(name))
        return
    row = target.element_size() * target.numel() // max(target.size(0), 1)
    pieces = [list(_placed(spans[0], max(PIECE // max(row, 1), 1))), *map(_placed, spans[1:])]
    for box in product(*pieces):
        slices = [slice(first, last) for _, first, last in box]
        into = target[tuple(slice(at, at + last - first) for at, first, last in box)]
        if transposed:
            slices[1], slices[2] = slices[2], slices[1]
        piece = folder.box(name, slices)
        into.copy_(piece.transpose(1, 2) if transposed else piece)


def _placed(spans: Spans, most: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Where each span begins in the target, and the span; long ones in several pieces."""
    at = 0
    for start, stop in spans:
        length = most or max(stop - start, 1)
        for first in range(start, stop, length):
            last = min(first + length, stop)
            yield at, first, last
            at += last - first


def stored_dtype(description: Mapping[str, Any]) -> str | None:
    """Name of the dtype of weights that a config.json says, maybe of its text alone, or None."""
    for section in (description, description.get("text_config") or {}):
        said = section.get("dtype") or section.get("torch_dtype")
        if said is not None:
            return str(said)
    return None


def wide_weights(
    folder: WeightFolder, description: Mapping[str, Any], model: Any
) -> tuple[str, ...]:
    """Names of the weights that a folder stores in float32 although it is in another dtype."""
    if stored_dtype(description) in (None, "float32"):
        return ()
    return tuple(
        name
        for name, stored in stored_weights(folder, model).items()
        if folder.dtype(stored.flat[0]) == torch.float32
    )


def exported(
    modules: Iterable[nn.Module], folder: WeightFolder, description: str
) -> Iterator[tuple[str, Tensor]]:
    """Whole weights in the form of the folder that they were read from.

    A weight that has not changed since it was read comes out bit for bit as it is stored, even
    where a module holds it in a shorter dtype.

    Args:
        modules: The stages of the model in one process, whole; a module that was not trained may
            be missing.
        folder: Folder that training began from.
        description: Contents of its config.json.

    Yields:
        Name and tensor [...], in the dtype of the folder.
    """
    stored = stored_weights(folder, meta_model(description))
    held = {name: tensor for module in modules for name, tensor in stage_tensors(module)}
    named = set()
    for name, form in stored.items():
        if name not in held:
            continue
        for stored_name, tensor in _written(form, held[name].detach().cpu()):
            named.add(stored_name)
            yield stored_name, _as_stored(folder, stored_name, tensor)
    for name in sorted(folder.names - named):
        # A head that is tied, what no module holds, and what the model does not read: such as
        # layers that predict further tokens.
        tied = stored.get(EMBEDDING_WEIGHT) if name.endswith(HEAD_WEIGHT) else None
        if tied is None:
            yield name, folder.tensor(name)
        else:
            # A copy: files do not hold the same memory twice.
            yield name, _as_stored(folder, name, held[EMBEDDING_WEIGHT].detach().cpu()).clone()


def _written(form: Stored, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not form.stacked:
        yield form.flat[0], tensor.transpose(1, 2).contiguous() if form.transposed else tensor
        return
    for names, expert in zip(form.names, tensor, strict=True):
        yield from zip(names, expert.chunk(len(names)), strict=True)


def _as_stored(folder: WeightFolder, name: str, tensor: Tensor) -> Tensor:
    before = folder.tensor(name)
    same = before.to(tensor.dtype).equal(tensor)
    return before if same else tensor.to(before.dtype)
