"""Stored tensors of weights that say themselves which part of a whole one they are.

megatron-core describes the weights of its own layers. Those of other modules that are divided over
ranks, such as modules of transformers, carry marks: megatron-core's of tensor parallelism and of
experts, `expert_axis` and `copy_of`. Those that data-parallel ranks divide say what is held.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mimo.weights.shards import Held, shard_spans, sharded_axis


def is_marked(tensor: Tensor) -> bool:
    """Whether a tensor [...] is a part of a whole one, or a copy of another stage's."""
    return (
        sharded_axis(tensor) is not None
        or expert_axis(tensor) is not None
        or copy_of(tensor) is not None
    )


def expert_axis(tensor: Tensor) -> int | None:
    """Axis of a weight [...] along which experts are distributed over ranks; None without any."""
    axis: int | None = getattr(tensor, "expert_axis", None)
    return axis


def copy_of(tensor: Tensor) -> str | None:
    """Name in its module of the weight of another stage that a weight [...] is a copy of."""
    name: str | None = getattr(tensor, "copy_of", None)
    return name


def marked_tensor(name: str, tensor: Tensor, pg: ProcessGroupCollection) -> ShardedTensorFactory:
    """The boxes of the stored tensor that a marked tensor of this rank consists of.

    Args:
        name: Name of the tensor in its module.
        tensor: Tensor [...] of this rank.
        pg: Groups of the module.
    """
    is_expert = expert_axis(tensor) is not None
    copied = copy_of(tensor)
    replicated = sharded_axis(tensor) is None and pg.tp.rank() > 0
    replica = (
        int(copied is not None),
        int(replicated),
        pg.expt_dp.rank() if is_expert else pg.dp_cp.rank(),
    )

    def build(key: str, data: Tensor, *_: Any) -> list[ShardedTensor]:
        return list(_boxes(copied or key, data, tensor, pg, replica))

    return ShardedTensorFactory(name, tensor, build, lambda _: None, replica_id=replica)


def held_tensor(name: str, whole: Tensor, part: Held) -> ShardedTensor:
    """The box of the stored tensor that a data-parallel rank holds, in place.

    Args:
        name: Name of the tensor in its module.
        whole: Parameter whose shape [...] is that of the stored tensor.
        part: What this rank holds of it.
    """
    offset = [0] * whole.dim()
    offset[part.axis] = part.first
    return _box(name, part.values, offset, list(whole.shape), (0, 0, 0))


def _boxes(
    key: str, data: Tensor, marks: Tensor, pg: ProcessGroupCollection, replica: tuple[int, ...]
) -> Iterator[ShardedTensor]:
    """Boxes of the stored tensor, each of which lies together in the tensor of this rank."""
    axis, experts = sharded_axis(marks), expert_axis(marks)
    whole, origin = list(data.shape), [0] * data.dim()
    if experts is not None:
        origin[experts] = pg.ep.rank() * whole[experts]
        whole[experts] *= pg.ep.size()
    if axis is None:
        yield _box(key, data, origin, whole, replica)
        return
    whole[axis] *= pg.tp.size()
    spans = shard_spans(whole[axis], marks, tp_rank=pg.tp.rank(), tp_size=pg.tp.size())
    if len(spans) == 1:
        origin[axis] = spans[0][0]
        yield _box(key, data, origin, whole, replica)
        return
    # Several weights end to end: in the whole one, shards of other ranks lie between their parts.
    for place in product(*map(range, data.shape[:axis])):
        at = [first + index for first, index in zip(origin[:axis], place, strict=True)]
        parts = data[place].split([last - first for first, last in spans])
        for (first, _), part in zip(spans, parts, strict=True):
            offset = [*at, first, *origin[axis + 1 :]]
            yield _box(key, part[(None,) * axis], offset, whole, replica)


def _box(
    key: str, data: Tensor, offset: list[int], whole: list[int], replica: tuple[int, ...]
) -> ShardedTensor:
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=tuple(whole),
        global_offset=tuple(offset),
        # Boxes of several sizes: no regular grid.
        axis_fragmentations=None,
        replica_id=replica,
    )
