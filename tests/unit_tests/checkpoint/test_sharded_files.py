"""Folders that several writers fill, and what each need not say again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def box(key: str, data: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """A part of a tensor, in no regular grid."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=shape,
        global_offset=offset,
        axis_fragmentations=None,
        replica_id=0,
    )


def written_by_two(root: str) -> None:
    """Two folders, one after the other, each by two writers, read back by other cuts."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_mimo.checkpoint.sharded_files import ShardedWriter, read
    from megatron_mimo.weights.torch_dist import describe

    weight = torch.arange(20.0).view(5, 4).bfloat16()
    parts = [
        [box("w", weight[:2], (0, 0), (5, 4)), ShardedObject("rng", {"s": 1}, (2,), (0,))],
        [box("w", weight[2:], (2, 0), (5, 4)), ShardedObject("rng", {"s": 2}, (2,), (1,))],
    ]
    writers = [ShardedWriter(rank) for rank in range(2)]
    for number in range(3):
        folder = Path(root) / str(number)
        folder.mkdir()
        weight += 1
        written = [w.write(own, folder) for w, own in zip(writers, parts, strict=True)]
        # What nobody has agreed to is told again.
        assert [rank.plan is None for rank in written] == [number == 2] * 2
        assert {name for rank in written for name in rank.names} == {
            path.name for path in folder.iterdir()
        }
        writers[0].describe(written, folder)
        if number == 1:
            for writer in writers:
                writer.agreed()
        stored = describe(folder)
        assert {key: (t.shape, t.dtype) for key, t in stored.tensors.items()} == {
            "w": ((5, 4), torch.bfloat16)
        }
        assert len(stored.objects) == 2
        wanted = box("w", torch.zeros(3, 2).bfloat16(), (1, 1), (5, 4))
        _, second = read([wanted, ShardedObject("rng", None, (2,), (1,))], stored)
        assert torch.equal(wanted.data, weight[1:4, 1:3])
        assert second == {"s": 2}


def test_what_two_writers_store_is_read_by_other_cuts(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    run_ranks(1, written_by_two, str(tmp_path))


def faulty(root: str) -> list[str]:
    """What is said of parts that overlap, of parts that are missing, and of a file that cannot be.

    What a writer was told before does not matter.
    """
    from megatron_mimo.checkpoint.sharded_files import ShardedWriter

    folder, said = Path(root), []
    rows = torch.ones(3, 2)
    for offsets in (0, 1), (0, 4):
        writers = [ShardedWriter(rank) for rank in range(2)]
        written = [
            writer.write([box("w", rows, (offset, 0), (7, 2))], folder)
            for writer, offset in zip(writers, offsets, strict=True)
        ]
        try:
            writers[0].describe(written, folder)
        except ValueError as error:
            said.append(str(error))
    (name,) = written[1].names
    (folder / name).unlink()
    (folder / name).mkdir()
    try:
        writers[1].write([box("w", rows, (0, 0), (3, 2))], folder)
    except OSError as error:
        assert error.__context__ is None
        said.append(str(error))
    return said


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_faults_are_errors(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    ((overlap, missing, directory),) = run_ranks(1, faulty, str(tmp_path))
    assert "w has overlapping chunks" in overlap
    assert "w invalid fill" in missing
    assert "Is a directory" in directory


def nothing(root: str) -> None:
    """A rank that stores nothing."""
    from megatron_mimo.checkpoint.sharded_files import ShardedWriter

    copy = box("w", torch.ones(2), (0,), (2,))
    copy.replica_id = 1
    written = ShardedWriter(0).write([copy], Path(root))
    assert written.names == ()
    assert not list(Path(root).iterdir())


def test_copies_are_left_out(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    run_ranks(1, nothing, str(tmp_path))
