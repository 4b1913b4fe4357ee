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
    """A group that knows its size and this rank's place in it, and cannot communicate.

    Nobody asks a group of one to. A larger one serves to build a module, not to run it.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]


def solo_groups() -> ProcessGroupCollection:
    """A collection whose every group holds this process alone.

    torch's default process group is neither needed nor made.
    """
    return paper_groups({})


def paper_groups(places: Mapping[str, tuple[int, int]]) -> ProcessGroupCollection:
    """A collection for a rank of a grid that does not run.

    Args:
        places: Axis (tp, cp, pp, dp, ep, expt_tp, expt_dp) -> this rank's place and the size;
            others have size one.
    """
    _keep_given_groups()
    return ProcessGroupCollection(**{axis: PaperGroup(*places.get(axis, (0, 1))) for axis in _AXES})


@contextmanager
def solo_world() -> Iterator[None]:
    """A world for as long as a module is built, as some of megatron-core's builders ask torch.

    Where there is a default process group it stays; otherwise one of this process alone comes and
    goes. Paper groups, which torch does not know, answer for themselves. The same goes for
    megatron-core's random streams; the caller's are left as they were.
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
    """Let megatron-core use the group it is given although torch has no default process group.

    Its lookup of a group returns None then, even for one that was passed; layers ask it when they
    are built and whenever they run.
    """
    for name, module in list(sys.modules.items()):
        found = getattr(module, _NAME, None) if name.startswith("megatron.") else None
        if found is _upstream:
            setattr(module, _NAME, _group_or_default)
