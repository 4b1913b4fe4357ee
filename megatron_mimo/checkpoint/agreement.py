"""What the ranks of a world find out together about a checkpoint, over a group of the host."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.runtime.sharded_files import StoredTensor

# Names that an error or a warning spells out.
_SHOWN = 20


def gather(value: Any, control: dist.ProcessGroup) -> list[Any]:
    """Of every rank, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=control)
    return found


def broadcast(value: Any, control: dist.ProcessGroup) -> Any:
    """Rank 0's."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]


def on_first_rank(control: dist.ProcessGroup, work: Any, what: str = "") -> Any:
    """Run something on rank 0 and give its result to every rank; what it raises, every rank raises.

    Raises:
        ValueError: As rank 0 raised it.
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
    """Run something on every rank.

    Returns:
        On rank 0, for each rank its result, or what went wrong; on other ranks nothing.
    """
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = f"rank {dist.get_rank()}: {raised}"
    found: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object((result, error), found or None, dst=0, group=control)
    return found


def results(found: Sequence[tuple[Any, str | None]]) -> list[Any]:
    """Of all ranks.

    Raises:
        OSError: Names the first rank that failed, and how.
    """
    failed = [error for _, error in found if error is not None]
    if failed:
        raise OSError(failed[0])
    return [result for result, _ in found]


def check_whole(folder: Path, control: dist.ProcessGroup) -> None:
    """Compare every file with its checksum, all ranks sharing the reading.

    Raises:
        ValueError: Names the files that are missing or have changed.
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
    """Names and shapes that the ranks ask for against those of a folder.

    Returns:
        What is missing or has another shape, a line each, and every key that a rank asks for.
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
    gathered = gather((faults, asked), control)
    everything = sorted(set().union(*(found for found, _ in gathered)))
    return everything, set().union(*(keys for _, keys in gathered))


def listed(lines: Sequence[str], separator: str) -> str:
    """The first lines, and how many more there are."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return separator.join([*lines[:_SHOWN], *more])
