"""Groups of a module that lives in one process, without a launcher or a process group."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import utils
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

_AXES = ("tp", "cp", "pp", "dp", "ep", "expt_tp", "tp_ep", "tp_cp", "dp_cp", "tp_dp_cp", "expt_dp")
_NAME = "get_tensor_model_parallel_group_if_none"
_upstream = getattr(utils, _NAME)


class PaperGroup(dist.ProcessGroup):
    """A process group that has a size and a rank in it, and cannot communicate.

    A group of one rank never has to communicate. A larger one serves to build a module, not to run
    it.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]


def solo_groups() -> ProcessGroupCollection:
    """A collection whose every group holds this process alone.

    torch's default process group is neither needed nor made.
    """
    return paper_groups({})


def paper_groups(places: Mapping[str, tuple[int, int]]) -> ProcessGroupCollection:
    """A collection of groups for a rank of a grid that is not running.

    Args:
        places: Rank and size along each axis (tp, cp, pp, dp, ep, expt_tp, expt_dp); axes that are
            missing have size one.
    """
    _keep_given_groups()
    return ProcessGroupCollection(**{axis: PaperGroup(*places.get(axis, (0, 1))) for axis in _AXES})


@contextmanager
def solo_world() -> Iterator[None]:
    """Provide a default process group while a module is built, for builders that need one.

    An existing default group is kept; otherwise a group of this process alone is created and
    removed again. Paper groups, which torch does not know, are handled as well. megatron-core's
    random streams are provided in the same way; those of the caller are restored.
    """
    tracker = get_cuda_rng_tracker()
    seeded = tracker.is_initialized()
    made = not dist.is_initialized()
    if made:
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    rank, size = dist.get_rank, dist.get_world_size

    def get_rank(group: Any = None) -> int:
        return group.rank() if isinstance(group, PaperGroup) else rank(group)

    def get_world_size(group: Any = None) -> int:
        return group.size() if isinstance(group, PaperGroup) else size(group)

    dist.get_rank, dist.get_world_size = get_rank, get_world_size
    try:
        with torch.random.fork_rng():
            if not seeded:
                model_parallel_cuda_manual_seed(
                    0, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True
                )
            yield
    finally:
        if not seeded:
            tracker.reset()
        dist.get_rank, dist.get_world_size = rank, size
        if made:
            dist.destroy_process_group()


def _group_or_default(tp_group: Any, *args: Any, **kwargs: Any) -> Any:
    return _upstream(tp_group, *args, **kwargs) if tp_group is None else tp_group


def _keep_given_groups() -> None:
    """Let megatron-core use the group that it is given when there is no default process group.

    Its lookup of a group returns None in that case, even for a group that was passed. Layers call
    this lookup when they are built and whenever they run.
    """
    for name, module in list(sys.modules.items()):
        found = getattr(module, _NAME, None) if name.startswith("megatron.") else None
        if found is _upstream:
            setattr(module, _NAME, _group_or_default)
