"""What a checkpoint says of its run. Imports no megatron-core, which has to be prepared first."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.weights.torch_dist import load_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRun:
    """What a checkpoint says of the run that wrote it.

    Attributes:
        iteration: Iteration after which it was saved.
        flags: Value of each flag of the run, by its name with underscores.
    """

    iteration: int
    flags: dict[str, Any]


def saved_run(folder: Path, *, trust: bool = False) -> SavedRun:
    """Read the flags of the run that wrote a checkpoint, after every file has been checked.

    Args:
        folder: Folder of the checkpoint of one iteration.
        trust: Whether files may run code.

    Raises:
        ValueError: Files are missing or have changed (the message names them), or the checkpoint
            was not written by this program.
    """
    expected = folders.read_checksums(folder)
    if wrong := folders.check_files(folder, expected, expected):
        raise folders.damaged(folder, wrong)
    common = read_common(folder, trust=trust)
    match common:
        case {"iteration": int() as iteration, "args": args} if hasattr(args, "__dict__"):
            return SavedRun(iteration=iteration, flags=dict(vars(args)))
    raise ValueError(
        f"{folder / folders.COMMON} does not hold the flags of a run: expected a checkpoint of "
        f"`megatron-mimo train`"
    )


def read_common(folder: Path, *, trust: bool = False) -> dict[str, Any]:
    """Contents of `common.pt`, from a folder whose checksums were compared.

    Args:
        folder: Folder of the checkpoint.
        trust: Whether the file may run code.

    Raises:
        ValueError: The file is damaged, or names code; the message names it.
    """
    path = folder / folders.COMMON
    try:
        with path.open("rb") as file:
            found = load_plain(file, str(path), more=(Namespace,), trust=trust)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}: expected the state of a run")
    return found
