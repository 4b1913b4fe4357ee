"""`loader.json`: where the readers of all lanes stood; and `loader.pt` of earlier versions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.data.reading import plain
from megatron_mimo.weights.torch_dist import load_plain


def lanes_text(lanes: Mapping[int, Any]) -> str:
    """States of some lanes as text, for the rank that writes the file."""
    return plain.encode(dict(lanes))


def file_content(parts: Sequence[str]) -> bytes:
    """Contents of the file with the states of all lanes, from those of each rank."""
    lanes: dict[int, Any] = {}
    for part in parts:
        lanes |= plain.decode(part)
    return (plain.encode({"lanes": lanes, "num_lanes": len(lanes)}) + "\n").encode()


def file_in(names: Mapping[str, Any]) -> str | None:
    """The file among those of a folder; None where there is none."""
    return next((name for name in (folders.LOADER, folders.OLDER_LOADER) if name in names), None)


def read_lanes(folder: Path, *, trust: bool = False) -> Mapping[int, Any]:
    """States of all lanes, from a folder whose checksums were compared.

    Args:
        folder: Folder of a checkpoint, or of a position.
        trust: Whether a file of an earlier version may run code.

    Raises:
        ValueError: The file is damaged, or names code; the message names it.
    """
    path = folder / folders.LOADER
    try:
        if path.exists():
            found = _read_json(path)
        else:
            path = folder / folders.OLDER_LOADER
            with path.open("rb") as file:
                found = load_plain(file, str(path), trust=trust)
            found = _with_texts(found, str(path), trust=trust)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    lanes = found.get("lanes") if isinstance(found, dict) else None
    if not isinstance(lanes, dict) or any(type(lane) is not int for lane in lanes):
        raise ValueError(f"{path} cannot be read: it holds no positions of lanes")
    return lanes


def _read_json(path: Path) -> Any:
    try:
        return plain.decode(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _with_texts(found: Any, where: str, *, trust: bool) -> Any:
    """The same, with the pickled states of energon's workers as texts."""
    if not isinstance(found, dict):
        return found
    return {
        key: _text(item, where, trust=trust)
        if key == "snapshot" and isinstance(item, bytes)
        else _with_texts(item, where, trust=trust)
        for key, item in found.items()
    }


def _text(snapshot: bytes, where: str, *, trust: bool) -> str:
    # energon takes a second to import; only its states need it.
    from megatron_mimo.data.reading.snapshot import from_pickle

    return from_pickle(snapshot, where, trust=trust)
