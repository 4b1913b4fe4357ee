"""Checkpoint folders: names, what makes one complete, and how one is published atomically.

    DIR/latest_checkpointed_iteration.txt     "10", last to be written
    DIR/iter_0000010/             as Megatron's: .metadata, metadata.json, common.pt, shards
    DIR/iter_0000010/loader.json              where the readers stood
    DIR/iter_0000010/checksums.json           file -> size and CRC-32
    DIR/.saving-0000010-TOKEN/                while one is written
    DIR/.replaced-0000010/                    while one takes the place of an older one

A folder gets its name by one rename, when every file of it is on disk. Nothing here communicates.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
METADATA = ".metadata"
COMMON = "common.pt"
LOADER = "loader.json"
OLDER_LOADER = "loader.pt"
RELEASE = "release"
"""Megatron's name for weights that no iteration led to, in a tracker and as a folder."""
_NEXT_TRACKER = f"{TRACKER}.new"
_LOCK = ".lock"
_STAGED = ".saving-"
_REPLACED = ".replaced-"
_FINISHED = re.compile(r"iter_(\d{7,})")
_NUMBER = re.compile(r"[0-9]{1,15}")
# Names in a folder that has held checkpoints, of this program or another.
_SIGNS = re.compile(
    r"iter_\d{7,}|\.replaced-.*|release|\.metadata|.*\.distcp|.*\.safetensors|mp_rank_.*|"
    r"global_step\d+|checkpoint-\d+"
)
_BLOCK = 1 << 22
# More than any tracker holds.
_TRACKER_BYTES = 200


@dataclass(frozen=True, slots=True)
class Checksum:
    """Size and checksum of a file.

    Attributes:
        size: Size in bytes.
        crc32: CRC-32 as computed by `zlib.crc32`.
    """

    size: int
    crc32: int


def iteration_folder(root: Path, iteration: int) -> Path:
    """Path to the checkpoint of an iteration."""
    return root / f"iter_{iteration:07d}"


def staging_folder(root: Path, iteration: int, token: str) -> Path:
    """Path at which a checkpoint is written; the token distinguishes attempts."""
    return root / f"{_STAGED}{iteration:07d}-{token}"


class HalfReplacedError(ValueError):
    """A tracker names a checkpoint of which a run that was killed has left the older one aside."""


def find(path: Path, *, flag: str = "--load", release: bool = False) -> Path | None:
    """Folder of the checkpoint that a path names: the path itself, or the newest in it.

    Args:
        path: Path to a folder of checkpoints, or to the folder of one.
        flag: Flag that names the path, for error messages.
        release: Whether the weights that Megatron calls a release are accepted.

    Returns:
        The folder; None where there is nothing yet: no folder, or none that has held a checkpoint.

    Raises:
        ValueError: The path is a file, names one checkpoint that is not there, or holds checkpoints
            without saying which one to take.
    """
    try:
        if path.is_dir():
            if is_iteration(path) or (path / CHECKSUMS).is_file():
                return path
            if release and _tracked(path, flag) == RELEASE:
                return path / RELEASE
            iteration = latest_iteration(path, flag=flag)
            return None if iteration is None else iteration_folder(path, iteration)
        if path.exists():
            raise ValueError(
                f"{flag} {path} is not a folder: expected a folder of checkpoints, or the folder "
                f"of one, iter_…"
            )
        if path.is_symlink():
            raise ValueError(
                f"{flag} {path} is a link to {path.readlink()}, which is not there: correct the "
                f"link, or remove it"
            )
        if is_iteration(path):
            there = _names(path.parent) if path.parent.is_dir() else "(none is there)"
            raise ValueError(
                f"{flag} {path} is not there: expected one of the iterations of {path.parent}, "
                f"which are {there}"
            )
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror or error}") from error
    return None


def latest_iteration(root: Path, *, flag: str = "--save") -> int | None:
    """Iteration that the tracker names; None when the folder has no checkpoint yet.

    Args:
        root: Folder of the checkpoints.
        flag: Flag that names the folder, for error messages.

    Raises:
        ValueError: The tracker does not hold a number, names a checkpoint that does not exist, or
            is gone from a folder that has held checkpoints.
    """
    text = _tracked(root, flag)
    if text is None:
        return _untracked(root, flag)
    if not _NUMBER.fullmatch(text):
        raise ValueError(
            f"{root / TRACKER} holds {text!r}: expected the number of an iteration; write the last "
            f"one of {_names(root)} into it"
        )
    iteration = int(text)
    if not iteration_folder(root, iteration).is_dir():
        half = root / f"{_REPLACED}{iteration:07d}"
        raise (HalfReplacedError if half.is_dir() else ValueError)(
            f"{root / TRACKER} names iteration {text}, and {iteration_folder(root, iteration)} is "
            f"not there: write one of {_names(root)} into it, or go on with --save {root}, which "
            f"puts back what a run left half replaced"
        )
    return iteration


def _tracked(root: Path, flag: str) -> str | None:
    """Text of the tracker; None where there is no tracker."""
    tracker = root / TRACKER
    if not os.path.lexists(tracker):
        return None
    try:
        if not tracker.is_file():
            raise ValueError(f"{tracker} is not a file: expected one with an iteration's number")
        with tracker.open(encoding="utf-8") as file:
            return file.read(_TRACKER_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {root}: {tracker} cannot be read: {error}") from error


def _untracked(root: Path, flag: str) -> int | None:
    """Iteration of a folder without a tracker: the first, if a run died while it published it.

    Logs, curves, a lock and what an interrupted save has left are not signs of a checkpoint.

    Raises:
        ValueError: The folder has held checkpoints, and which one to take is not known.
    """
    if not root.is_dir():
        return None
    signs = sorted(path.name for path in root.iterdir() if _SIGNS.fullmatch(path.name))
    if not signs:
        return None
    iterations = _iterations(root)
    with contextlib.suppress(OSError, ValueError):
        if iterations == [int((root / _NEXT_TRACKER).read_text(encoding="ascii"))]:
            return iterations[0]
    shown = ", ".join(signs[:5]) + (f" and {len(signs) - 5} more" if len(signs) > 5 else "")
    if not iterations:
        raise ValueError(
            f"{flag} {root} holds {shown}, and no {TRACKER}: expected a folder of checkpoints of "
            f"this program, the folder of one, iter_…, or one that has nothing yet"
        )
    raise ValueError(
        f"{flag} {root} holds {shown}, and no {TRACKER}, which says where to go on: write one of "
        f"{_names(root)} into it, or name {iteration_folder(root, iterations[-1])}; to begin "
        f"again, name another folder"
    )


def is_iteration(folder: Path) -> bool:
    """Whether a path has the name of a folder of one iteration."""
    return _FINISHED.fullmatch(folder.name) is not None


def checksum(path: Path) -> Checksum:
    """Size and CRC-32 of a file, which is read once."""
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return Checksum(size, crc)


def files_of(folder: Path) -> list[str]:
    """Names of the files of a checkpoint, sorted, without the list of their checksums."""
    return sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)


def share(names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """Files that a rank reads when all ranks check them together."""
    return [name for index, name in enumerate(sorted(names)) if index % world_size == rank]


def seal(folder: Path, known: Mapping[str, Checksum]) -> None:
    """Flush a staged folder to disk, and write the list of checksums that makes it complete.

    Args:
        folder: Folder with every file of a checkpoint.
        known: Checksums of files that are on disk already.
    """
    found = dict(known)
    for name in files_of(folder):
        if name not in found:
            sync(folder / name)
            found[name] = checksum(folder / name)
    write_checksums(folder, found)


def write_checksums(folder: Path, found: Mapping[str, Checksum]) -> None:
    """Write the list of checksums that makes a folder complete."""
    content = {name: {"size": c.size, "crc32": c.crc32} for name, c in sorted(found.items())}
    _write(folder / CHECKSUMS, json.dumps(content, indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """Read the list of checksums of a folder.

    Raises:
        ValueError: The list is missing or damaged.
    """
    path = folder / CHECKSUMS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Checksum(int(e["size"]), int(e["crc32"])) for name, e in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): the checkpoint is damaged "
            f"or incomplete; {_other(folder)}"
        ) from error


def check_files(folder: Path, names: Iterable[str], expected: Mapping[str, Checksum]) -> list[str]:
    """Problems with some files of a folder, one line each."""
    wrong = []
    for name in names:
        want = expected[name]
        try:
            got = checksum(folder / name)
        except FileNotFoundError:
            wrong.append(f"{folder / name} is missing")
        except OSError as error:
            wrong.append(f"{folder / name} cannot be read: {error}")
        else:
            if got.size != want.size:
                wrong.append(f"{folder / name} has {got.size} bytes, {want.size} were saved")
            elif got != want:
                wrong.append(f"{folder / name} is not what was saved: its bytes have changed")
    return wrong


def damaged(folder: Path, wrong: Iterable[str]) -> ValueError:
    """Error for a damaged checkpoint, of which nothing has been loaded."""
    return ValueError(f"{'; '.join(wrong)}: the checkpoint is damaged; {_other(folder)}")


def publish(staged: Path, root: Path, iteration: int) -> None:
    """Give a finished folder its final name, then update the tracker; an old one is replaced."""
    sync(staged)
    # Before the folder has its name: if this run dies in between, the first checkpoint of a folder
    # is told from one whose tracker was lost.
    _write(root / _NEXT_TRACKER, str(iteration))
    final = iteration_folder(root, iteration)
    if final.exists():
        # Saved before by a run that continued from an earlier one. The tracker may name it: if this
        # run dies between the next two lines, `put_back` finds it.
        old = root / f"{_REPLACED}{iteration:07d}"
        final.rename(old)
        staged.rename(final)
        shutil.rmtree(old)
    else:
        staged.rename(final)
    sync(root)
    (root / _NEXT_TRACKER).replace(root / TRACKER)
    sync(root)


def prune(root: Path, keep_last: int | None) -> list[Path]:
    """Remove leftovers of attempts, and all but the newest checkpoints; returns the latter.

    Args:
        root: Folder of the checkpoints.
        keep_last: Number of checkpoints to keep; None keeps all. The one that the tracker names is
            always kept.
    """
    for left in (*root.glob(f"{_STAGED}*"), *root.glob(f"{_REPLACED}*")):
        shutil.rmtree(left, ignore_errors=True)
    if (root / TRACKER).exists():
        (root / _NEXT_TRACKER).unlink(missing_ok=True)
    if keep_last is None:
        return []
    latest = latest_iteration(root)
    old = [i for i in _iterations(root)[:-keep_last] if i != latest]
    for iteration in old:
        folder = iteration_folder(root, iteration)
        # By another name first: half a checkpoint must not look like one.
        doomed = root / f"{_STAGED}pruned-{iteration:07d}"
        folder.rename(doomed)
        shutil.rmtree(doomed)
    return [iteration_folder(root, iteration) for iteration in old]


def sync(path: Path) -> None:
    """Flush the contents of a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SaveLock:
    """Excludes a second run from a folder; the system releases it when the process ends.

    Args:
        root: Folder of the checkpoints; created where it does not exist.
        flag: Flag that names the folder, for error messages.

    Raises:
        ValueError: The folder cannot be written to, or another run saves in it.
    """

    def __init__(self, root: Path, *, flag: str = "--save") -> None:
        path = root / _LOCK
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(
                f"{flag} {root} cannot be written ({error.strerror}): choose another folder, or "
                f"make this one writable"
            ) from error
        # A process forked from this one, such as a data reader, must not hold the folder after it.
        os.register_at_fork(after_in_child=self._close)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip()
            self._close()
            raise ValueError(
                f"{flag} {root}: another run saves there ({holder}): end it, or choose another "
                f"folder"
            ) from None
        except OSError:
            # A file system without locks; Megatron has none either.
            return
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def release(self) -> None:
        """Release the folder, so that another run may save in it."""
        self._close()


def take(root: Path, *, flag: str = "--save") -> SaveLock:
    """Lock a folder, and repair what an interrupted save has left in it.

    Raises:
        ValueError: The folder cannot be written to, or another run saves in it.
    """
    lock = SaveLock(root, flag=flag)
    put_back(root)
    return lock


def put_back(root: Path) -> None:
    """Restore the name of a checkpoint whose replacement was interrupted, and a first tracker.

    Only the holder of the folder's `SaveLock` may call it.
    """
    for old in root.glob(f"{_REPLACED}*"):
        final = iteration_folder(root, int(old.name.removeprefix(_REPLACED)))
        if not final.exists():
            old.rename(final)
    with contextlib.suppress(ValueError):
        # To name a checkpoint that is not known is not for this function.
        if not (root / TRACKER).exists() and latest_iteration(root) is not None:
            (root / _NEXT_TRACKER).replace(root / TRACKER)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _iterations(root: Path) -> list[int]:
    found = (_FINISHED.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _names(root: Path) -> str:
    return ", ".join(str(iteration) for iteration in _iterations(root)) or "(none is there)"


def _other(folder: Path) -> str:
    others = [i for i in _iterations(folder.parent) if folder != iteration_folder(folder.parent, i)]
    if not others:
        return "no other is there"
    return (
        f"iterations {', '.join(map(str, others))} are there too; write one into "
        f"{folder.parent / TRACKER} to go back to it"
    )
