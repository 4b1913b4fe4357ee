"""Weights of models of transformers: a rank reads its shards, one process writes whole tensors.

Names and forms on disk may differ from those in memory: old names, experts in tensors of their own,
transposed ones. transformers has tables of these (`conversion_mapping`), which are read here, so
that each rank can still read no more than its part.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.modules.hf.cut import EMBEDDING_WEIGHT, HEAD_WEIGHT, is_tied, meta_model
from megatron_mimo.weights.folder import WeightFolder, require_names
from megatron_mimo.weights.load import Place
from megatron_mimo.weights.shards import is_expert, shard_spans, sharded_axis


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
    for target in wanted:
        (pattern, names), *others = found[target].items()
        if pattern is None:
            result[target] = Stored((tuple(names[:1]),))
        else:
            parts = [names, *(more for _, more in others)]
            result[target] = _converted(folder, target, of_pattern[pattern], parts, wanted[target])
    return result


def _converted(
    folder: WeightFolder, target: str, converter: Any, parts: list[list[str]], weight: Tensor
) -> Stored:
    """A weight that transformers makes of stored ones."""
    kinds = [type(operation).__name__ for operation in converter.operations]
    if kinds == ["Transpose"]:
        (name,) = parts[0]
        return Stored(((name,),), transposed=folder.shape(name) != list(weight.shape))
    if kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        if (
            len(parts) == 1
            and len(parts[0]) == 1
            and folder.shape(parts[0][0]) == list(weight.shape)
        ):
            return Stored((tuple(parts[0]),))
        return Stored(tuple(zip(*parts, strict=True)), stacked=True)
    raise ValueError(
        f"{folder.path}: {target} is stored in a form that transformers converts by "
        f"{', '.join(kinds)}, which is not supported: load the folder in transformers and save it "
        f"again"
    )


@torch.no_grad()
def fill(
    module: nn.Module, folder: WeightFolder, description: str, *, tp: Place, ep: Place
) -> None:
    """Copy this rank's shard of each weight of a stage from a folder; nothing else is read.

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
        # A tied head that stands alone on its stage, of a folder that has the embedding alone.
        source = stored.get(name) or stored[EMBEDDING_WEIGHT]
        found = _read(folder, source, tensor, tp, ep)
        if found.shape != tensor.shape:
            raise ValueError(
                f"{folder.path}: {source.flat[0]} has the shape {folder.shape(source.flat[0])}, "
                f"which does not fit {name} {list(tensor.shape)} of its config.json"
            )
        tensor.copy_(found)


def stage_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and stored buffers [...] of a stage by their names; a tied weight once."""
    yield from module.named_parameters()
    stored = set(module.state_dict())
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in stored)


def _read(folder: WeightFolder, stored: Stored, tensor: Tensor, tp: Place, ep: Place) -> Tensor:
    """This rank's part [...] of a weight."""
    axis = sharded_axis(tensor) if tp[1] > 1 else None
    expert = ep[1] > 1 and isinstance(tensor, nn.Parameter) and is_expert(tensor)
    if not stored.stacked:
        (name,) = stored.flat
        return _slice(folder, name, tensor, axis, tp, ep if expert else (0, 1), stored.transposed)
    own = len(stored.names) // ep[1] if expert else len(stored.names)
    first = ep[0] * own if expert else 0
    experts = []
    for names in stored.names[first : first + own]:
        pieces = []
        for name in names:
            length = folder.shape(name)[axis - 1] // tp[1] if axis is not None else 0
            piece = (
                folder.tensor(name)
                if axis is None
                else folder.span(name, axis - 1, tp[0] * length, (tp[0] + 1) * length)
            )
            pieces.append(piece)
        experts.append(torch.cat(pieces))
    return torch.stack(experts)


def _slice(
    folder: WeightFolder,
    name: str,
    tensor: Tensor,
    axis: int | None,
    tp: Place,
    ep: Place,
    transposed: bool,
) -> Tensor:
    shape = folder.shape(name)
    if axis is None and ep[1] == 1:
        whole = folder.tensor(name)
        return whole.transpose(1, 2) if transposed else whole
    own = shape[0] // ep[1]
    first = [slice(ep[0] * own, (ep[0] + 1) * own)] if ep[1] > 1 else []
    if axis is None:
        piece = folder.box(name, first)
        return piece.transpose(1, 2) if transposed else piece
    at = {1: 2, 2: 1}[axis] if transposed else axis
    spans = shard_spans(shape[at], tensor, tp_rank=tp[0], tp_size=tp[1])
    box = [*first, *[slice(None)] * (at - len(first))]
    pieces = [folder.box(name, [*box, slice(*span)]) for span in spans]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, at)
    return whole.transpose(1, 2) if transposed else whole


def wide_weights(
    folder: WeightFolder, description: Mapping[str, Any], model: Any
) -> tuple[str, ...]:
    """Names of the weights that a folder stores in float32 although it is in another dtype."""
    said = description.get("dtype") or description.get("torch_dtype")
    if said in (None, "float32"):
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
        modules: The stages of the model in one process, which together hold every weight whole.
        folder: Folder that training began from.
        description: Contents of its config.json.

    Yields:
        Name and tensor [...], in the dtype of the folder.
    """
    stored = stored_weights(folder, meta_model(description))
    held = {name: tensor for module in modules for name, tensor in stage_tensors(module)}
    named = set()
    for name, form in stored.items():
        for stored_name, tensor in _written(form, held[name].detach().cpu()):
            named.add(stored_name)
            yield stored_name, _as_stored(folder, stored_name, tensor)
    for name in sorted(folder.names - named):
        # A head that is tied, and what the model does not read: such as layers that predict
        # further tokens.
        tied = stored.get(EMBEDDING_WEIGHT) if name.endswith(HEAD_WEIGHT) else None
        if tied is None:
            yield name, folder.tensor(name)
        else:
            yield name, _as_stored(folder, name, held[EMBEDDING_WEIGHT].detach().cpu())


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
