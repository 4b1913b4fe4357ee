"""What the ranks of a group do in their collectives, where each of them can see it.

NCCL does not compare: collectives of different sizes or kinds hang, or mix up memory. Here each
rank writes down what it is about to do before it does it, and compares with those who have written
already. Of two ranks that differ the later one always sees it, so no message is needed.
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_KEPT = 16
"""Collectives of a rank that can be seen; only roots of a broadcast are ahead of others."""
_TEXT = 1016
_SLOT = 8 + _TEXT
_KEY = "notes"


@dataclass(frozen=True, slots=True)
class Note:
    """A collective of one rank.

    Attributes:
        text: What must be the same on all ranks.
        gives: Elements for each rank, where they differ; empty where `text` says it.
        takes: Elements from each rank.
    """

    text: str
    gives: Sequence[int] = ()
    takes: Sequence[int] = ()

    def packed(self) -> bytes:
        """As `read` takes it."""
        lists = (" ".join(map(str, one)) for one in (self.gives, self.takes))
        return "\t".join((self.text, *lists)).encode()[:_TEXT]

    @classmethod
    def read(cls, packed: bytes) -> "Note":
        """The note of `packed`."""
        text, *lists = packed.decode(errors="replace").split("\t")
        gives, takes = ([int(number) for number in one.split()] for one in (*lists, "", "")[:2])
        return cls(text, gives, takes)

    def difference(self, other: "Note", mine: int, theirs: int) -> str | None:
        """How another rank's note does not fit; None where it does."""
        if self.text != other.text:
            return f"{self.text} here, {other.text} there"
        if self.gives and self.gives[theirs] != other.takes[mine]:
            return f"{self.gives[theirs]} elements are given, {other.takes[mine]} taken there"
        if self.takes and self.takes[theirs] != other.gives[mine]:
            return f"{other.gives[mine]} elements are given there, {self.takes[theirs]} taken"
        return None


class Notes:
    """The notes of all ranks of a group, in memory that they share.

    Args:
        store: Store of the group, by which the ranks find the memory.
        rank: Rank in the group.
        size: Number of ranks.
        limit: Longest time that ranks wait for the first.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, limit: timedelta) -> None:
        self._rank, self._size = rank, size
        if rank == 0:
            descriptor, path = tempfile.mkstemp(prefix="strict-")
            os.truncate(descriptor, size * _KEPT * _SLOT)
            store.set(_KEY, path)
        else:
            store.wait([_KEY], limit)
            path = store.get(_KEY).decode()
            descriptor = os.open(path, os.O_RDWR)
        self._path = Path(path) if rank == 0 else None
        self._memory = mmap.mmap(descriptor, size * _KEPT * _SLOT)
        os.close(descriptor)

    def all_have_it(self) -> None:
        """Remove the name of the memory; every rank has opened it."""
        if self._path is not None:
            self._path.unlink()

    def write(self, number: int, note: Note) -> None:
        """Write this rank's note of its collective `number`, counted from 1."""
        place, packed = self._place(self._rank, number), note.packed()
        # The number last: who finds it finds the rest.
        struct.pack_into("q", self._memory, place, 0)
        self._memory[place + 8 : place + _SLOT] = packed.ljust(_TEXT, b"\0")
        struct.pack_into("q", self._memory, place, number)

    def others(self, number: int) -> Iterator[tuple[int, Note]]:
        """Ranks that have written their note of the same number, and the notes."""
        for rank in range(self._size):
            place = self._place(rank, number)
            if rank != self._rank and struct.unpack_from("q", self._memory, place)[0] == number:
                packed = self._memory[place + 8 : place + _SLOT].rstrip(b"\0")
                # Else it was written over meanwhile, by a rank that is far ahead.
                if struct.unpack_from("q", self._memory, place)[0] == number:
                    yield rank, Note.read(packed)

    def _place(self, rank: int, number: int) -> int:
        return (rank * _KEPT + number % _KEPT) * _SLOT
