"""One save, from what a rank holds to the checkpoint that all may load; in whichever thread."""

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
    """

    root: Path
    iteration: int
    keep_last: int | None


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
        lanes = _merged([share.lanes for share in found])
        loader = stored_bytes({"lanes": lanes, "num_lanes": len(lanes)})
        (staged / folders.LOADER).write_bytes(loader)
        folders.seal(staged, {name: c for share in found for name, c in share.checksums.items()})
        folders.publish(staged, target.root, target.iteration)
        return folders.prune(target.root, target.keep_last)

    removed: list[Path] = on_first_rank(group, publish, failed)
    writer.agreed()
    return removed


def stored_bytes(value: Any) -> bytes:
    """Of a small file. A full disk is then met by a plain write, not within torch's writer."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _stage(target: Target, common: bytes) -> Path:
    folders.prune(target.root, None)
    staged = folders.staging_folder(target.root, target.iteration, uuid.uuid4().hex[:8])
    staged.mkdir()
    (staged / folders.COMMON).write_bytes(common)
    return staged


def _merged(parts: Sequence[bytes]) -> dict[int, Any]:
    merged: dict[int, Any] = {}
    for part in parts:
        merged |= pickle.loads(part)  # noqa: S301 (of our own ranks)
    return merged
