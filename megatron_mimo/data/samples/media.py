"""Files that samples name by path: which of them may be read, and reading them.

Samples come from strangers more often than not. A path leads into the dataset's folder, wherever
its links lead, or it is not followed; `--media-root` names further folders.
"""

import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_mimo.border import reason_of
from megatron_mimo.data.samples.sample import UnusableError

MEDIA_ROOT = "--media-root"
MISSING = "missing file"
_REFUSED = "path outside of the dataset"
_NO_FILE = "path of no file"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:[^/]*/[^/]*,")
# Errors that follow from the path alone, the same on every host.
_OF_THE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO)
_LONGEST = 80  # characters


class MediaFolder:
    """The files that samples may name by path.

    Args:
        folder: Path to the folder that relative paths begin in.
        roots: Paths of further folders whose files samples may name.
    """

    def __init__(self, folder: Path | str, roots: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        self._inside = [f"{os.path.realpath(root).rstrip('/')}/" for root in (folder, *roots)]

    def find(self, path: str, what: str) -> Path:
        """Where a file really is.

        Args:
            path: Path as the sample has it.
            what: Name of its contents in messages, such as "image".

        Raises:
            UnusableError: It leads out of the folders, or is not a path.
            OSError: This host cannot follow it.
        """
        _require_path(path, what)
        try:
            real = os.path.realpath(self.folder / path)
        except (OSError, ValueError) as error:
            raise _unusable(error, path, what, self.folder) from error
        if not any(f"{real}/".startswith(root) for root in self._inside):
            raise UnusableError(
                _REFUSED,
                f"its {what} {shortened(path)} is outside of {self.folder}: samples name files "
                f"below it; {MEDIA_ROOT} {shortened(os.path.dirname(real))} allows others",
            )
        return Path(real)

    def read(self, path: str, what: str) -> bytes:
        """Contents of a file.

        Raises:
            UnusableError: It is none that samples may name, is missing, or is not a regular file.
            OSError: This host cannot read it.
        """
        found = self.find(path, what)
        try:
            return read_regular(found)
        except (OSError, ValueError) as error:
            raise _unusable(error, path, what, self.folder) from error


class IrregularFileError(ValueError):
    """Something else than a regular file: reading it might never end."""


def read_regular(path: Path) -> bytes:
    """Contents of a regular file; nothing else is opened for long.

    Raises:
        IrregularFileError: It is a folder, a device, a pipe or a socket.
        OSError: It cannot be read.
    """
    # A pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise IrregularFileError(f"is {_kind(mode)}, not a file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def require_below(path: str, what: str, folder: object) -> None:
    """Refuse a path that leads out of the folder that it begins in, links apart.

    Raises:
        UnusableError: It is absolute, goes up, is a URL, or is not a path.
    """
    _require_path(path, what)
    if path.startswith("/") or ".." in path.split("/"):
        raise UnusableError(_REFUSED, f"its {what} {shortened(path)} is outside of {folder}")


def check_roots(roots: Sequence[str]) -> None:
    """Refuse folders of `--media-root` that are none.

    Raises:
        ValueError: One is no folder on this host.
    """
    for root in roots:
        if not os.path.isdir(root):
            raise ValueError(f"{MEDIA_ROOT} {shortened(root)} is not a folder here")


def on_one_line(text: str) -> str:
    """A text with escapes for line ends, halves of characters and all that is not printed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(path: str) -> str:
    """A path as a part of one line of a message, cut where it is too long to be read."""
    shown = on_one_line(path)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."


def _require_path(path: str, what: str) -> None:
    if _URL.match(path):
        raise UnusableError(
            _REFUSED,
            f"its {what} {shortened(path)} is a URL: nothing is fetched; store the file in the "
            f"dataset",
        )
    if "\0" in path:
        raise UnusableError(_NO_FILE, f"its {what} {shortened(path)} is not a path: it has a NUL")


def _unusable(error: OSError | ValueError, path: str, what: str, folder: Path) -> Exception:
    """The error to raise in place of another; the same where only this host may be concerned."""
    named = f"its {what} {shortened(path)}"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnusableError(MISSING, f"{named} is not in {folder}")
    if isinstance(error, IrregularFileError):
        return UnusableError(_NO_FILE, f"{named} {error}")
    if isinstance(error, ValueError):
        return UnusableError(_NO_FILE, f"{named} is not a path: {reason_of(error)}")
    if error.errno in _OF_THE_PATH:
        return UnusableError(_NO_FILE, f"{named} is not a path: {error.strerror}")
    return error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
