"""Collective functions on checkpoints, over a process group of the hosts."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.runtime.gather import gather_to_first
from megatron_mimo.weights.torch_dist import StoredTensor

# Names that an error or a warning spells out.
_SHOWN = 20


def gather(value: Any, control: dist.ProcessGroup) -> list[Any]:
    """Values of every rank, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=control)
    return found


def broadcast(value: Any, control: dist.ProcessGroup) -> Any:
    """The value of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]


def on_first_rank(control: dist.ProcessGroup, work: Any, what: str = "") -> Any:
    """Run a function on rank 0; every rank returns its result, or raises its error.

    Raises:
        ValueError: Rank 0 raised it.
        RuntimeError: Rank 0 could not read or write a file.
    """
    result = error = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except (OSError, ValueError) as raised:
            error = raised
    result, error = broadcast((result, error), control)
    if isinstance(error, ValueError):
        raise error
    if error is not None:
        raise RuntimeError(f"{what or 'rank 0 failed'}: {error}")
    return result


def outcomes(control: dist.ProcessGroup, work: Any) -> list[tuple[Any, str | None]]:
    """Run a function on every rank.

    Returns:
        On rank 0, the result of each rank, or the description of its error; on other ranks an empty
        list.
    """
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = f"rank {dist.get_rank()}: {raised}"
    return gather_to_first((result, error), control)


def results(found: Sequence[tuple[Any, str | None]]) -> list[Any]:
    """Results of all ranks.

    Raises:
        OSError: A rank failed; the message names the first one and its error.
    """
    failed = [error for _, error in found if error is not None]
    if failed:
        raise OSError(failed[0])
    return [result for result, _ in found]


def check_whole(folder: Path, control: dist.ProcessGroup) -> None:
    """Compare every file with its checksum; the ranks share the reading.

    Raises:
        ValueError: Files are missing or have changed; the message names them.
    """
    expected = on_first_rank(control, lambda: folders.read_checksums(folder))
    mine = folders.share(expected, dist.get_rank(), dist.get_world_size())
    wrong = folders.check_files(folder, mine, expected)
    all_wrong = [line for part in gather(wrong, control) for line in part]
    if all_wrong:
        raise folders.damaged(folder, all_wrong)


def compare(
    wanted: Sequence[ShardedTensor],
    stored: Mapping[str, StoredTensor],
    control: dist.ProcessGroup,
) -> tuple[list[str], set[str]]:
    """Compare the names and shapes that the ranks request with those in a folder.

    Returns:
        One line for each tensor that is missing or has another shape, and every key that a rank
        requests.
    """
    gathered = gather(differences(wanted, stored), control)
    everything = sorted(set().union(*(found for found, _ in gathered)))
    return everything, set().union(*(keys for _, keys in gathered))


def differences(
    wanted: Iterable[ShardedTensor], stored: Mapping[str, StoredTensor]
) -> tuple[set[str], set[str]]:
    """Compare the names and shapes that one rank requests with those in a folder; not collective.

    Returns:
        One line for each tensor that is missing or has another shape, and every key requested.
    """
    faults, asked = set(), set()
    for part in wanted:
        asked.add(part.key)
        if part.key not in stored:
            faults.add(f"{part.key} is missing")
        elif stored[part.key].shape != tuple(part.global_shape):
            faults.add(
                f"{part.key} is {list(stored[part.key].shape)}, the model's is "
                f"{list(part.global_shape)}"
            )
    return faults, asked


def listed(lines: Sequence[str], separator: str) -> str:
    """The first lines, and the number of further ones."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return separator.join([*lines[:_SHOWN], *more])
