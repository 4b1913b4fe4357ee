"""The parts of stored tensors that this rank writes, and those that it reads.

Names and global shapes are those of megatron-core (`sharded_state_dict`), with prefixes that the
family of each module defines, so that no two modules' keys collide. Writers differ: each rank
writes the ranges that its optimizer owns, directly from their memory, instead of whole tensors that
one data-parallel rank has gathered.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_mimo.checkpoint.marks import held_tensor, is_marked, marked_tensor
from megatron_mimo.checkpoint.rectangles import rectangles
from megatron_mimo.modules.lora.apply import ADAPTERS, LoraTree, lora_adapters
from megatron_mimo.optim.state import ParamState
from megatron_mimo.weights.shards import full_shape, held_part, shard_spans, sharded_axis

# Prefix and names of the optimizer's tensors, as in megatron-core.
OPTIMIZER_PREFIX = "optimizer.state."


class Groups(Protocol):
    """Groups of a module, such as `topology.groups.ModuleGroups`."""

    @property
    def pg_collection(self) -> ProcessGroupCollection:
        """Groups of the module; every group that megatron-core asks for is set."""


class Replica(Protocol):
    """A module on this rank, such as `model.mimo.ModuleReplica`."""

    @property
    def module(self) -> nn.Module:
        """Stage without the wrapper for data parallelism."""

    @property
    def groups(self) -> Groups:
        """Groups of the module."""

    @property
    def prefixes(self) -> Mapping[str, str]:
        """Beginning of a weight's name in the stage -> its beginning in checkpoints."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Beginnings of the names in the stage of weights that a checkpoint leaves out."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A box of a stored tensor that a contiguous range of a local tensor contains.

    Attributes:
        key: Key of the stored tensor.
        global_shape: Shape of the stored tensor.
        offset: Offset of the box in the stored tensor, in elements of each dimension.
        shape: Shape of the box, with as many dimensions.
        start: Index of the box's first element in the flattened local tensor.
        is_main: Whether no other tensor- or pipeline-parallel rank stores this box.
        replica: Data-parallel rank among those that hold this box.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    is_main: bool
    replica: int

    def within(self, start: int, stop: int) -> "Iterator[Stored]":
        """Boxes of the stored tensor in elements [start, stop) of the flattened local tensor."""
        first = max(start - self.start, 0)
        last = min(stop - self.start, math.prod(self.shape))
        for box in rectangles(self.shape, first, last):
            offset = tuple(a + b for a, b in zip(self.offset, box.offset, strict=True))
            yield replace(self, offset=offset, shape=box.size, start=self.start + box.start)


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A weight or buffer of this rank, and the stored tensors that it is a part of.

    Attributes:
        name: Name in its module.
        data: Tensor of this rank.
        trains: Whether an optimizer updates it, on any data-parallel rank.
        stored: Boxes that it contains, which together are the whole tensor.
    """

    name: str
    data: Tensor
    trains: bool
    stored: tuple[Stored, ...]


def local_tensors(replica: Replica) -> list[LocalTensor]:
    """Every weight and buffer of a module on this rank that a checkpoint has, in module order."""
    found = [
        local for local in base_tensors(replica) if not local.name.startswith(replica.left_out)
    ]
    return found + list(_lora_tensors(replica))


def base_tensors(replica: Replica) -> list[LocalTensor]:
    """Every weight and buffer of a module on this rank but those of adapters, in module order."""
    metadata = {"dp_cp_group": replica.groups.pg_collection.dp_cp}
    for module in replica.module.modules():
        # megatron-core looks for a global group where a module has none.
        if isinstance(module, MegatronModule) and not hasattr(module, "tp_group"):
            module.tp_group = replica.groups.pg_collection.tp
        if isinstance(module, LanguageModule):
            module.tie_embeddings_and_output_weights_state_dict = partial(_tie, module)
    entries = _sharded(replica.module, "", replica.groups.pg_collection, metadata)
    found = []
    tied: set[int] = set()
    for name, entry in entries.items():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # Extra states of fp8, which is not used here.
        data = entry.data
        if id(data) in tied:
            continue  # Two layers of this stage share a weight: it is stored by its first name.
        tied.add(id(data))
        boxes = tuple(_boxes(entry, replica.prefixes))
        found.append(LocalTensor(name, data.detach(), data.requires_grad, boxes))
    return found


def _lora_tensors(replica: Replica) -> Iterator[LocalTensor]:
    """The weights of adapters, each a tensor of its own whatever the layout."""
    groups = replica.groups.pg_collection
    rank, size, replica_number = groups.tp.rank(), groups.tp.size(), groups.dp_cp.rank()
    for path, adapter in lora_adapters(replica.module):
        for name, weight in adapter.named_parameters():
            whole, axis = full_shape(weight, size), sharded_axis(weight)
            spans = [(0, whole[0])]
            if axis is not None:
                spans = shard_spans(whole[axis], weight, tp_rank=rank, tp_size=size)
            boxes, start = [], 0
            for first, last in spans:
                shape, offset = list(weight.shape), [0, 0]
                shape[axis or 0], offset[axis or 0] = last - first, first
                boxes.append(
                    Stored(
                        key=stored_key(f"{ADAPTERS}.{path}.{name}", replica.prefixes),
                        global_shape=tuple(whole),
                        offset=tuple(offset),
                        shape=tuple(shape),
                        start=start,
                        is_main=axis is not None or rank == 0,
                        replica=replica_number,
                    )
                )
                start += math.prod(shape)
            local = f"{ADAPTERS}.{path}.{name}"
            yield LocalTensor(local, weight.detach(), weight.requires_grad, tuple(boxes))


def writes(replica: Replica, states: Mapping[int, ParamState]) -> list[ShardedTensor]:
    """The parts of a module's weights that this rank stores; shapes [...] are those of the boxes.

    Of weights that train, a rank stores the range that its optimizer updates, so that data-parallel
    ranks write in parallel; other weights are stored whole by one rank.

    Args:
        replica: Module on this rank.
        states: States from `optim.state.param_states`; empty without an optimizer.
    """
    stored = []
    for local in local_tensors(replica):
        state = states.get(local.data.data_ptr())
        for box in local.stored:
            if state is not None:
                start, stop = state.start, state.stop
            else:
                # What trains, and is not updated here, another rank writes; without an optimizer
                # there is no such rank.
                elsewhere = (local.trains and bool(states)) or box.replica != 0
                start, stop = 0, 0 if elsewhere else local.data.numel()
            if box.is_main:
                flat = local.data.view(-1)
                stored += [_tensor(part, flat, part.start) for part in box.within(start, stop)]
    return stored


def optimizer_tensors(
    replica: Replica, states: Mapping[int, ParamState], *, reading: bool
) -> list[ShardedTensor]:
    """This rank's part of the optimizer's state of a module, in place, float32 [...] each.

    Args:
        replica: Module on this rank.
        states: States from `optim.state.param_states`, by address of the weight.
        reading: Whether the tensors are read: every rank reads all that it owns, but copies on
            tensor-parallel peers are not written.
    """
    found = []
    for local in local_tensors(replica):
        state = states.get(local.data.data_ptr())
        if state is None:
            continue
        for box in local.stored:
            if not (reading or box.is_main):
                continue
            for part in box.within(state.start, state.stop):
                for kind, values in state.tensors.items():
                    part_of_kind = replace(part, key=f"{OPTIMIZER_PREFIX}{kind}.{part.key}")
                    found.append(_tensor(part_of_kind, values, part.start - state.start))
    return found


def reads(replica: Replica) -> list[ShardedTensor]:
    """All parts of a module's weights [...] that this rank holds, in place."""
    return [
        _tensor(box, local.data.view(-1), box.start)
        for local in local_tensors(replica)
        for box in local.stored
    ]


def base_reads(replica: Replica) -> list[ShardedTensor]:
    """As `reads`, of all weights [...] but those of adapters."""
    return [
        _tensor(box, local.data.view(-1), box.start)
        for local in base_tensors(replica)
        for box in local.stored
    ]


def stored_key(name: str, prefixes: Mapping[str, str]) -> str:
    """The key of a name in one of our modules.

    Args:
        name: Name of a weight in the module.
        prefixes: Beginning of a name in the module -> its beginning in checkpoints.

    Raises:
        ValueError: The name belongs to a part of the module without a prefix.
    """
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name!r} belongs to none of {', '.join(prefixes)}")


def _sharded(
    module: nn.Module, prefix: str, pg: ProcessGroupCollection, metadata: dict[str, Any]
) -> dict[str, Any]:
    """megatron-core's description of every weight; part by part for modules of this package."""
    describe: Any = getattr(module, "sharded_state_dict", None)
    if describe is not None and type(module).__module__.startswith("megatron.core."):
        found: dict[str, Any] = describe(prefix=prefix, metadata=metadata)
        return found
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    marked = {name: tensor for name, tensor in own.items() if is_marked(tensor)}
    parts = {name: part for name, tensor in own.items() if (part := held_part(tensor)) is not None}
    result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        {name: one for name, one in own.items() if name not in marked and name not in parts},
        prefix,
        tp_group=pg.tp,
        dp_cp_group=metadata["dp_cp_group"],
    )
    for name, tensor in marked.items():
        result[f"{prefix}{name}"] = marked_tensor(f"{prefix}{name}", tensor, pg)
    for name, part in parts.items():
        if part.values.numel():
            result[f"{prefix}{name}"] = held_tensor(f"{prefix}{name}", own[name], part)
    for name, child in module.named_children():
        if isinstance(child, LoraTree):
            continue
        result |= _sharded(child, f"{prefix}{name}.", pg, metadata)
    return result


def _tie(
    model: LanguageModule,
    described: dict[str, Any],
    output_key: str,
    embedding_key: str,
    metadata: dict[str, Any],
) -> None:
    """Describe the last stage's output layer as a copy of the first stage's embeddings.

    It replaces the method of megatron-core, which asks a global group for its rank.
    """
    if model.post_process and not model.pre_process:
        output = described[output_key]
        output.key = embedding_key
        output.replica_id = (1, 0, metadata["dp_cp_group"].rank())


def _boxes(
    entry: ShardedTensor | ShardedTensorFactory, prefixes: Mapping[str, str]
) -> Iterator[Stored]:
    whole = entry.data
    parts = [entry] if isinstance(entry, ShardedTensor) else _flat(entry.build())
    for part in parts:
        ours = part.data
        if ours.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            raise AssertionError(f"{part.key} is stored as a copy; it cannot be read in place")
        if not ours.is_contiguous():
            raise AssertionError(f"{part.key} does not lie together; it cannot be read in place")
        *others, replica = part.replica_id if isinstance(part.replica_id, tuple) else (0, 0)
        yield Stored(
            key=stored_key(part.key, prefixes),
            global_shape=tuple(part.global_shape),
            offset=tuple(part.global_offset),
            shape=(1,) * part.prepend_axis_num + tuple(part.local_shape),
            start=ours.storage_offset() - whole.storage_offset(),
            is_main=not any(others),
            replica=replica,
        )


def _flat(built: Any) -> list[ShardedTensor]:
    if isinstance(built, ShardedTensor):
        return [built]
    values = built.values() if isinstance(built, dict) else built
    return [tensor for value in values for tensor in _flat(value)]


def _tensor(box: Stored, flat: Tensor, start: int) -> ShardedTensor:
    """A box as megatron-core's writer and reader need it; its memory is that of `flat`."""
    data = flat[start : start + math.prod(box.shape)].view(box.shape)
    return ShardedTensor(
        key=box.key,
        data=data,
        dtype=data.dtype,
        local_shape=box.shape,
        global_shape=box.global_shape,
        global_offset=box.offset,
        # Boxes of several sizes: no regular grid.
        axis_fragmentations=None,
        replica_id=0,
    )
