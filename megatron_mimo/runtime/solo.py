"""Groups of a module that lives in one process, without a launcher or a process group."""

import sys
from typing import Any

from megatron.core import utils
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

_AXES = ("tp", "cp", "pp", "dp", "ep", "expt_tp", "tp_cp", "tp_ep_pp", "dp_cp", "tp_dp_cp", "mp")
_NAME = "get_tensor_model_parallel_group_if_none"
_upstream = getattr(utils, _NAME)


def solo_groups() -> ProcessGroupCollection:
    """A collection whose every group holds this process alone.

    The groups know their size and rank and cannot communicate: megatron-core does not try where
    there is one rank. torch's default process group is neither needed nor made.
    """
    _keep_given_groups()
    groups = {axis: ProcessGroup(0, 1) for axis in _AXES}  # type: ignore[call-arg]
    return ProcessGroupCollection(**groups)


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
