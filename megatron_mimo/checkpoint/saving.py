"""One save, from the objects of each rank to the published folder; in any thread."""

import io
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.collectives import on_first_rank, outcomes, results
from megatron_mimo.checkpoint.loader_file import file_content
from megatron_mimo.checkpoint.sharded_files import ShardedWriter, Stored, Written


@dataclass(frozen=True, slots=True)
class Contents:
    """What one rank contributes to a checkpoint; it does not change while it is written.

    Attributes:
        parts: Tensors, and states of random generators.
        common: Contents of `common.pt`; used on rank 0.
        lanes: States of the readers by lane, for the lanes that this rank reports on, as text.
    """

    parts: Sequence[Stored]
    common: bytes
    lanes: str


@dataclass(frozen=True, slots=True)
class Target:
    """Folder and iteration of the checkpoint that is written.

    Attributes:
        root: Folder of the checkpoints.
        iteration: Iteration after which the save began.
        keep_last: Number of checkpoints to keep; None keeps all.
        readers: Folder that the positions of the readers are written to as well; None for no other
            folder.
    """

    root: Path
    iteration: int
    keep_last: int | None
    readers: Path | None = None


@dataclass(frozen=True, slots=True)
class _Share:
    written: Written
    checksums: Mapping[str, folders.Checksum]
    lanes: str


def write_checkpoint(
    contents: Contents, target: Target, writer: ShardedWriter, group: dist.ProcessGroup
) -> list[Path]:
    """Write a checkpoint and publish it. Collective over the world.

    Args:
        contents: Contents of this rank.
        target: Target, the same on all ranks.
        writer: Writer of this rank.
        group: Group of all ranks on the hosts. Nothing else may use it at the same time: a save in
            the background needs a group of its own.

    Returns:
        Older checkpoints that were removed, on every rank.

    Raises:
        RuntimeError: The files of a rank could not be written (the message names it); raised on
            every rank. The previous checkpoint is unchanged.
    """
    failed = (
        f"--save {target.root}: the checkpoint of iteration {target.iteration} could not be "
        f"written; what was saved before is whole"
    )
    staged: Path = on_first_rank(group, lambda: _stage(target, contents.common), failed)

    def write() -> _Share:
        written = writer.write(contents.parts, staged)
        checksums = {name: folders.checksum(staged / name) for name in written.names}
        return _Share(written, checksums, contents.lanes)

    shares = outcomes(group, write)

    def publish() -> list[Path]:
        found: list[_Share] = results(shares)
        writer.describe([share.written for share in found], staged)
        loader = file_content([share.lanes for share in found])
        (staged / folders.LOADER).write_bytes(loader)
        folders.seal(staged, {name: c for share in found for name, c in share.checksums.items()})
        if target.readers is not None:
            # First, and older ones are kept until the checkpoint is there: whichever checkpoint a
            # run that dies in between leaves behind, the position that belongs to it is there.
            _publish_positions(loader, target.readers, target.iteration)
        folders.publish(staged, target.root, target.iteration)
        if target.readers is not None:
            folders.prune(target.readers, target.keep_last)
        return folders.prune(target.root, target.keep_last)

    removed: list[Path] = on_first_rank(group, publish, failed)
    writer.agreed()
    return removed


def write_positions(lanes: str, target: Target, group: dist.ProcessGroup) -> list[Path]:
    """Write the positions of the readers alone and publish them. Collective over the world.

    Args:
        lanes: States of the readers, as `Contents.lanes`.
        target: Target, the same on all ranks.
        group: Group of all ranks on the hosts.

    Returns:
        Older positions that were removed, on every rank.

    Raises:
        RuntimeError: The positions could not be written; raised on every rank. Earlier positions
            are unchanged.
    """
    shares = outcomes(group, lambda: lanes)

    def publish() -> list[Path]:
        _publish_positions(file_content(results(shares)), target.root, target.iteration)
        return folders.prune(target.root, target.keep_last)

    removed: list[Path] = on_first_rank(
        group, publish, f"iteration {target.iteration}; what was saved before is whole"
    )
    return removed


def _publish_positions(loader: bytes, root: Path, iteration: int) -> None:
    """Write `loader.json` of an iteration; on one rank."""
    try:
        folders.prune(root, None)
        staged = folders.staging_folder(root, iteration, uuid.uuid4().hex[:8])
        staged.mkdir()
        (staged / folders.LOADER).write_bytes(loader)
        folders.seal(staged, {})
        folders.publish(staged, root, iteration)
    except OSError as error:
        raise OSError(f"--dataloader-save {root} could not be written: {error}") from error


def stored_bytes(value: Any) -> bytes:
    """Contents of a small file, so that a plain write, not torch's, meets a full disk."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _stage(target: Target, common: bytes) -> Path:
    folders.prune(target.root, None)
    staged = folders.staging_folder(target.root, target.iteration, uuid.uuid4().hex[:8])
    staged.mkdir()
    (staged / folders.COMMON).write_bytes(common)
    return staged
