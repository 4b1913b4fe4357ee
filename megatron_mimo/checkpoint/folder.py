"""Checkpoint folders: names, what makes one whole, and how one appears all at once.

    DIR/latest_checkpointed_iteration.txt     "10", last to be written
    DIR/iter_0000010/             as Megatron's: .metadata, metadata.json, common.pt, shards
    DIR/iter_0000010/checksums.json           file -> size and CRC-32
    DIR/.saving-0000010-TOKEN/                while one is written
    DIR/.replaced-0000010/                    while one takes the place of an older one

A folder gets its name by one rename, when every file of it is on disk. Nothing here communicates.
"""

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
COMMON = "common.pt"
LOADER = "loader.pt"
_LOCK = ".lock"
_STAGED = ".saving-"
_REPLACED = ".replaced-"
_FINISHED = re.compile(r"iter_(\d{7,})")
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Checksum:
    """Of a file.

    Attributes:
        size: Bytes.
        crc32: As `zlib.crc32` has it.
    """

    size: int
    crc32: int


def iteration_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return root / f"iter_{iteration:07d}"


def staging_folder(root: Path, iteration: int, token: str) -> Path:
    """Where it is written; the token tells attempts apart."""
    return root / f"{_STAGED}{iteration:07d}-{token}"


def latest_iteration(root: Path, *, flag: str = "--save") -> int | None:
    """What the tracker says; None when nothing has been saved there.

    Args:
        root: Of the checkpoints.
        flag: That writes there, for errors.

    Raises:
        ValueError: The tracker is no number, or names a checkpoint that is not there.
    """
    tracker = root / TRACKER
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{tracker} cannot be read: {error}") from error
    if not text.isdecimal():
        raise ValueError(
            f"{tracker} holds {text!r}: expected the number of an iteration; write the last one of "
            f"{_names(root)} into it"
        )
    if not iteration_folder(root, int(text)).is_dir():
        raise ValueError(
            f"{tracker} names iteration {text}, and {iteration_folder(root, int(text))} is not "
            f"there: write one of {_names(root)} into it, or go on with {flag} {root}, which puts "
            f"back what a run left half replaced"
        )
    return int(text)


def is_iteration(folder: Path) -> bool:
    """Whether a path is that of one iteration's folder, by its name."""
    return _FINISHED.fullmatch(folder.name) is not None


def checksum(path: Path) -> Checksum:
    """Read a file once."""
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
    """The files that a rank reads when all check them together."""
    return [name for index, name in enumerate(sorted(names)) if index % world_size == rank]


def seal(folder: Path, known: Mapping[str, Checksum]) -> None:
    """Bring a staged folder to disk, and write the list that makes it whole.

    Args:
        folder: With every file of a checkpoint.
        known: Files that are on disk already, with their checksums.
    """
    found = dict(known)
    for name in files_of(folder):
        if name not in found:
            sync(folder / name)
            found[name] = checksum(folder / name)
    write_checksums(folder, found)


def write_checksums(folder: Path, found: Mapping[str, Checksum]) -> None:
    """Write the list that makes a folder whole."""
    content = {name: {"size": c.size, "crc32": c.crc32} for name, c in sorted(found.items())}
    _write(folder / CHECKSUMS, json.dumps(content, indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """The list of a folder.

    Raises:
        ValueError: It is missing or damaged.
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
    """What is wrong with some files of a folder, a line each."""
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
    """The error for a checkpoint with faults; nothing has been loaded."""
    return ValueError(f"{'; '.join(wrong)}: the checkpoint is damaged; {_other(folder)}")


def publish(staged: Path, root: Path, iteration: int) -> None:
    """Give a finished folder its name, then let the tracker name it. What was there is replaced."""
    sync(staged)
    final = iteration_folder(root, iteration)
    if final.exists():
        # Saved before, by a run that went on from an earlier one. The tracker may name it: if this
        # run dies between the next two lines, `put_back` finds it.
        old = root / f"{_REPLACED}{iteration:07d}"
        final.rename(old)
        staged.rename(final)
        shutil.rmtree(old)
    else:
        staged.rename(final)
    sync(root)
    _write(root / f"{TRACKER}.new", str(iteration))
    (root / f"{TRACKER}.new").replace(root / TRACKER)
    sync(root)


def prune(root: Path, keep_last: int | None) -> list[Path]:
    """Remove what attempts left behind, and all but the newest checkpoints; returns the latter.

    Args:
        root: Of the checkpoints.
        keep_last: How many to keep; None keeps all. The one that the tracker names always stays.
    """
    for left in (*root.glob(f"{_STAGED}*"), *root.glob(f"{_REPLACED}*")):
        shutil.rmtree(left, ignore_errors=True)
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
    """Bring a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SaveLock:
    """Keeps a second run out of a folder; the system lets go of it when the process ends.

    Args:
        root: Of the checkpoints; made when it is not there.
        flag: That names it, for errors.

    Raises:
        ValueError: The folder cannot be written, or another run saves there.
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
        """Let another run save there."""
        self._close()


def take(root: Path, *, flag: str = "--save") -> SaveLock:
    """Keep other runs out of a folder, and put it in order.

    Raises:
        ValueError: As `SaveLock`.
    """
    lock = SaveLock(root, flag=flag)
    put_back(root)
    return lock


def put_back(root: Path) -> None:
    """Give a checkpoint its name again, if a run died between taking and passing it on.

    Only for who holds the folder's `SaveLock`.
    """
    for old in root.glob(f"{_REPLACED}*"):
        final = iteration_folder(root, int(old.name.removeprefix(_REPLACED)))
        if not final.exists():
            old.rename(final)


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
