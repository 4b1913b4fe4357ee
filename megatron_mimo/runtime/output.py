"""Files and folders that a run writes to for as long as it lasts."""

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PROBE_BYTES = 4096
_SYNC_S = 60.0


def require_folder(flag: str, folder: Path) -> None:
    """Create a folder, and see that files in it can be filled.

    Args:
        flag: Flag that names the folder, for the error message.
        folder: Folder, which may be there already.

    Raises:
        ValueError: It cannot be written to; the message says why and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A full disk lets files be made, not filled.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * _PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise unwritable(f"{flag} {folder}", error) from error


def unwritable(where: str, error: OSError) -> ValueError:
    """The error for a folder in which a run cannot begin its files.

    Args:
        where: Flag and folder.
        error: Failed write.
    """
    return ValueError(
        f"{where} cannot be written to: {error.strerror or error}; "
        f"{_remedy(error)}name another folder"
    )


@contextlib.contextmanager
def named_errors(what: str, *, otherwise: str = "train without it") -> Iterator[None]:
    """Turn a failed write into an error that names what is written and what to do.

    Args:
        what: What is written and where: "metrics to --tensorboard-dir runs/a".
        otherwise: What to do where freeing space does not help.

    Raises:
        RuntimeError: The body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot write {what}: {error.strerror or error}; {_remedy(error)}{otherwise}"
        ) from error


def _remedy(error: OSError) -> str:
    """What to do first about a failed write, for messages that go on with another way."""
    return "free space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


class LastingFile:
    """A file that is appended to during a whole run, and written again where it has vanished.

    A file that somebody removes goes on to take what is written, and nobody ever sees it.

    Args:
        path: Path of the file; its folder exists.
        head: First bytes of a new file.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self.path = path
        self._head = head
        self._open()

    @property
    def has_vanished(self) -> bool:
        """Whether the path names no file, or another one than is written to."""
        mine = os.fstat(self._file.fileno())
        try:
            there = os.stat(self.path)
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino)

    def begin_again(self) -> None:
        """Create the file, and folders above it, again.

        Raises:
            OSError: The file cannot be written.
        """
        self._file.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def append(self, content: bytes) -> None:
        """Write something that others can read when this returns.

        Raises:
            OSError: This, or what was written before, cannot be written.
        """
        self._write(content)
        # Some file systems tell of a full disk only here; each time would be slow on others.
        if time.monotonic() - self._synced > _SYNC_S:
            self._sync()

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: What was written before cannot be written.
        """
        try:
            self._sync()
        finally:
            self._file.close()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)
        if self._head and self._file.tell() == 0:
            self._write(self._head)
        self._synced = time.monotonic()

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            # A disk that fills takes a part, and says why only when it is asked for the rest.
            left = left[self._file.write(left) :]

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()
