"""Folders of small datasets: written beside their place, and put there when they are complete."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from megatron_mimo.data.reading.webdataset import prepare, write_shard

_SHARD_SIZE = 1000

Stored = tuple[str, Mapping[str, bytes]]
"""Key of a sample, and file ending -> contents."""


def write_whole(
    out: str | Path, write: Callable[[Path], Sequence[str]], *, overwrite: bool
) -> Path:
    """Write a dataset, ready for megatron-energon.

    It is written beside `out` and renamed when complete.

    Args:
        out: Path to the folder to create.
        write: Function that writes shards into a folder, and returns their paths within it.
        overwrite: Whether to replace an existing folder.

    Returns:
        The path to the folder.

    Raises:
        ValueError: `out` is a file, or a folder that is not empty and `overwrite` is off.
    """
    target = Path(out)
    _refuse_to_clobber(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        prepare(building, write(building))
        _replace(target, building)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return target


def write_split(folder: Path, split: str, samples: Iterable[Stored]) -> list[str]:
    """Write the shards of a split.

    Args:
        folder: Path to the folder of the dataset.
        split: Name of the split.
        samples: The samples in order.

    Returns:
        Paths of the shards within the folder.
    """
    (folder / split).mkdir()
    names: list[str] = []
    chunk: list[Stored] = []

    def flush() -> None:
        names.append(f"{split}/{len(names):06d}.tar")
        write_shard(folder / names[-1], chunk)
        chunk.clear()

    for sample in samples:
        chunk.append(sample)
        if len(chunk) == _SHARD_SIZE:
            flush()
    if chunk:
        flush()
    return names


def _refuse_to_clobber(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"--out {target} is a file: expected a folder to make")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(
            f"--out {target} is not empty: name another folder, or pass --overwrite to replace it"
        )


def _replace(target: Path, building: Path) -> None:
    """Replace the target by the finished folder, so that it is never incomplete."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    building.rename(target)
    shutil.rmtree(old, ignore_errors=True)
