"""A folder that gets its name when it is complete."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def building(out: Path, *, in_place: bool = False) -> Iterator[Path]:
    """A temporary folder that gets its final name when it is complete, or is removed.

    Args:
        out: Path that it gets.
        in_place: Whether `out` is a folder of shards, which get what is in the temporary one.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    name = f".{out.name}.partial-{os.getpid()}"
    folder = out / name if in_place else out.with_name(name)
    with _ended_by_sigterm():
        try:
            folder.mkdir()
            yield folder
            if in_place:
                _move_index(folder, out)
            else:
                folder.rename(out)
        finally:
            # It does not exist after renaming; anything left, also after a failure, is useless.
            shutil.rmtree(folder, ignore_errors=True)


def _move_index(folder: Path, out: Path) -> None:
    """Put index files beside their shards and then .nv-meta, which makes them a dataset."""
    for index in folder.rglob("*.tar.idx"):
        index.rename(out / index.relative_to(folder))
    (folder / ".nv-meta").rename(out / ".nv-meta")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an interrupt does, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
