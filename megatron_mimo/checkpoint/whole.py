"""Modules that one process holds whole, without a launcher, and their weights in checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_mimo.checkpoint.collectives import differences, listed
from megatron_mimo.checkpoint.sharded_files import read
from megatron_mimo.checkpoint.tensors import OPTIMIZER_PREFIX, reads
from megatron_mimo.weights.torch_dist import describe


@dataclass(frozen=True, slots=True)
class SoloGroups:
    """Groups of a module that one process holds whole.

    Attributes:
        pg_collection: Groups of this process alone, from `runtime.solo.solo_groups`.
    """

    pg_collection: ProcessGroupCollection


@dataclass(frozen=True, slots=True)
class WholeModule:
    """A module, or a model, that one process holds whole: a `checkpoint.tensors.Replica`.

    Attributes:
        module: The module.
        groups: Its groups.
        prefixes: Beginning of a weight's name in the module -> its beginning in checkpoints.
        left_out: Beginnings of the names of weights that the checkpoint does not have.
    """

    module: nn.Module
    groups: SoloGroups
    prefixes: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def load_whole(folder: Path, modules: Sequence[WholeModule], *, trust: bool = False) -> None:
    """Fill modules with the weights of a checkpoint, whatever layout has written it.

    Call it inside `runtime.solo.solo_world`. Nothing changes before all names and shapes are known
    to fit.

    Args:
        folder: Folder of the checkpoint of one iteration.
        modules: Every module of the run, each whole in this process.
        trust: Whether files may run code.

    Raises:
        ValueError: The checkpoint lacks weights of the modules, or has more; the message lists
            them.
    """
    stored = describe(folder, trust=trust)
    wanted = [part for module in modules for part in reads(module)]
    faults, asked = differences(wanted, stored.tensors)
    faults |= {
        f"{key} has no place in the model"
        for key in stored.tensors.keys() - asked
        if not key.startswith(OPTIMIZER_PREFIX)
    }
    if faults:
        raise ValueError(
            f"{folder} does not hold the model that its flags describe: "
            f"{listed(sorted(faults), '; ')}"
        )
    read(wanted, stored, trust=trust)
