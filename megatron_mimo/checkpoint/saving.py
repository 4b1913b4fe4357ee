"""One save, from what ranks hold to the folder that all may load; in whichever thread."""

import io
import pickle
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.agreement import on_first_rank, outcomes, results
from megatron_mimo.runtime.sharded_files import ShardedWriter, Stored, Written


@dataclass(frozen=True, slots=True)
class Contents:
    """What one rank gives to a checkpoint; nobody changes it while it is written.

    Attributes:
        parts: Tensors, and random states.
        common: Bytes of `common.pt`; of rank 0.
        lanes: Pickled, lane -> state of its reader, of the lanes that this rank answers for.
    """

    parts: Sequence[Stored]
    common: bytes
    lanes: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """Which checkpoint it is.

    Attributes:
        root: Folder of the checkpoints.
        iteration: That it was taken after.
        keep_last: How many checkpoints to keep; None keeps all.
        readers: Folder that the positions of the readers go to as well; None for none.
    """

    root: Path
    iteration: int
    keep_last: int | None
    readers: Path | None = None


@dataclass(frozen=True, slots=True)
class _Share:
    written: Written
    checksums: Mapping[str, folders.Checksum]
    lanes: bytes


def write_checkpoint(
    contents: Contents, target: Target, writer: ShardedWriter, group: dist.ProcessGroup
) -> list[Path]:
    """Write a checkpoint and publish it. Collective over the world.

    Args:
        contents: Of this rank.
        target: The same on all ranks.
        writer: Of this rank.
        group: The world, on the host. Nothing else may use it meanwhile: where this runs beside
            training, the group is not training's.

    Returns:
        On every rank, the older checkpoints that were removed.

    Raises:
        RuntimeError: On every rank: a rank's files could not be written, by name; the checkpoint
            before is untouched.
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
        loader = _positions([share.lanes for share in found])
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


def write_positions(lanes: bytes, target: Target, group: dist.ProcessGroup) -> list[Path]:
    """Write the positions of the readers alone and publish them. Collective over the world.

    Args:
        lanes: As `Contents.lanes`.
        target: The same on all ranks.
        group: The world, on the host.

    Returns:
        On every rank, the older ones that were removed.

    Raises:
        RuntimeError: On every rank: they could not be written; those before are untouched.
    """
    shares = outcomes(group, lambda: lanes)

    def publish() -> list[Path]:
        _publish_positions(_positions(results(shares)), target.root, target.iteration)
        return folders.prune(target.root, target.keep_last)

    removed: list[Path] = on_first_rank(
        group, publish, f"iteration {target.iteration}; what was saved before is whole"
    )
    return removed


def _publish_positions(loader: bytes, root: Path, iteration: int) -> None:
    """Write `loader.pt` of an iteration; on one rank."""
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
    """Of a small file. A full disk is then met by a plain write, not within torch's writer."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def stored_value(path: Path) -> Any:
    """What `stored_bytes` made, from a file whose checksum was compared.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _stage(target: Target, common: bytes) -> Path:
    folders.prune(target.root, None)
    staged = folders.staging_folder(target.root, target.iteration, uuid.uuid4().hex[:8])
    staged.mkdir()
    (staged / folders.COMMON).write_bytes(common)
    return staged


def _positions(parts: Sequence[bytes]) -> bytes:
    """Of all lanes, as `loader.pt` has them."""
    lanes: dict[int, Any] = {}
    for part in parts:
        lanes |= pickle.loads(part)  # noqa: S301 (of our own ranks)
    return stored_bytes({"lanes": lanes, "num_lanes": len(lanes)})
