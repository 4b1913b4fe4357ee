"""Sources of `megatron-mimo data prepare`: folders of files with captions, JSONL, JSON files.

`tables.py` has datasets of Hugging Face's, and `shards.py` tar shards.

Sources are read as streams, one sample at a time, and always in the same order.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Literal, TextIO

from megatron_mimo.border import border, reason_of
from megatron_mimo.data.inputs import BrokenItemError, Inputs
from megatron_mimo.data.samples.media import MISSING, MediaFolder, on_one_line, shortened
from megatron_mimo.data.samples.sample import UnusableError
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.conversation import parse_conversation, parse_json
from megatron_mimo.tools.data.endings import names_of_parts
from megatron_mimo.tools.data.forms import wrong_sample
from megatron_mimo.tools.data.hub_folder import TABLES, is_table

_TEXT_ENDINGS = ("txt", "json")
Split = Literal["train", "val"]
# Largest length of a key in bytes: plain tar headers have 155 for folders and 100 for the file.
_LONGEST_KEY, _LONGEST_NAME = 150, 80
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 20  # characters
# A longer item of a JSON array is treated as broken JSON.
_LONGEST_ITEM = 64 * _CHUNK


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A sample of a source whose items have not been read yet.

    Attributes:
        where: Line or file, for messages to the user.
        key: Key under which the sample will be stored.
        identity: Text that decides the split: samples with the same text are in the same split.
        text: Contents of the sample's text file.
        ending: Ending of the text file: "json", or "txt" for a caption.
        items: Kind -> its items in order: the path of a file as the sample names it, or its
            contents; only kinds with items.
        files: Files that samples may name.
        split: Split that the sample belongs to; None where its identity decides.
    """

    where: str
    key: str
    identity: str
    text: bytes
    ending: Literal["json", "txt"]
    items: Mapping[str, tuple[str | bytes, ...]]
    files: MediaFolder
    split: Split | None = None

    def contents(self, inputs: Inputs) -> dict[str, list[tuple[str, bytes]]]:
        """Kind -> name of each of its items, for messages, and its contents.

        The name is the path, or the number.

        Raises:
            UnusableError: A file is missing, or may not be named.
            OSError: A file cannot be read.
        """
        return {
            kind: [
                (str(number), item)
                if isinstance(item, bytes)
                else (item, self.files.read(item, inputs[kind].words.noun))
                for number, item in enumerate(of_kind, 1)
            ]
            for kind, of_kind in self.items.items()
        }

    def parts(self, inputs: Inputs) -> dict[str, bytes]:
        """Contents by file ending, byte for byte: the text, then the items in order.

        Args:
            inputs: Kinds of items that samples may have.

        Raises:
            UnusableError: A file is missing, may not be named, or is of an unknown kind.
            OSError: A file cannot be read.
        """
        parts: dict[str, bytes] = {self.ending: self.text}
        for kind, of_kind in self.contents(inputs).items():
            names = names_of_parts(kind, of_kind, inputs)
            parts |= dict(zip(names, (data for _, data in of_kind), strict=True))
        return parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A sample that cannot be stored.

    Attributes:
        where: Line or file, for messages to the user.
        reason: Description of the problem.
        is_missing: Whether it is that a file which the sample names is not there.
    """

    where: str
    reason: str
    is_missing: bool = False

    @property
    def line(self) -> str:
        """The problem in one line, whatever the names of files are."""
        return on_one_line(f"{self.where}: {self.reason}")


def problem_of(found: Found, inputs: Inputs) -> Problem | None:
    """Problem of a sample, or None; items are read, but not decoded.

    Args:
        found: Sample of a source.
        inputs: Kinds of items that samples may have.
    """
    try:
        parts = found.parts(inputs)
    except UnusableError as error:
        is_missing = error.kind == MISSING
        return Problem(where=found.where, reason=str(error), is_missing=is_missing)
    except OSError as error:
        return Problem(where=found.where, reason=f"cannot be read: {reason_of(error)}")
    reason = wrong_sample(found.key, parts, inputs, found.files)
    if reason is None:
        return None
    return Problem(where=found.where, reason=_blame(found, inputs) or reason)


def read_folder(
    folder: Path, inputs: Inputs, media_roots: Sequence[str] = ()
) -> Iterator[Found | Problem]:
    """Files with a caption file beside each: cat.jpg or cat.mp4 with cat.txt or cat.json.

    Subfolders are read too, all in natural order; hidden files and files of other kinds are
    skipped.

    Args:
        folder: Path to the folder.
        inputs: Kinds of items that samples may have.
        media_roots: Folders that links in it may lead to.
    """
    yield from _read_folder((str(folder), *media_roots), folder, inputs, ())


def _read_folder(
    roots: Sequence[str], folder: Path, inputs: Inputs, above: tuple[tuple[int, int], ...]
) -> Iterator[Found | Problem]:
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return  # A link to a folder around it.
    media = MediaFolder(folder, roots)
    stems: dict[str, list[str]] = {}
    folders = []
    known = {*_TEXT_ENDINGS, *chain.from_iterable(kind.endings for kind in inputs.values())}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                try:
                    media.find(entry.name, "folder")
                    folders.append(entry.name)
                except UnusableError as error:
                    where = str((folder / entry.name).relative_to(roots[0]))
                    yield Problem(where=where, reason=str(error))
                continue
            stem, dot, ending = entry.name.rpartition(".")
            if dot and ending.lower() in known:
                stems.setdefault(stem, []).append(entry.name)
    for stem in sorted(stems, key=_natural):
        yield _pair(Path(roots[0]), media, stem, sorted(stems[stem]), inputs)
    for name in sorted(folders, key=_natural):
        yield from _read_folder(roots, folder / name, inputs, (*above, here))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    # A link that leads nowhere, or round; reading it as a file tells how.
    except OSError:
        return False


def _pair(
    root: Path, media: MediaFolder, stem: str, names: list[str], inputs: Inputs
) -> Found | Problem:
    """Sample of the files that share a stem: a caption, and one item of a kind or of several."""
    folder = media.folder
    texts = [name for name in names if _ending(name) in _TEXT_ENDINGS]
    files = [name for name in names if name not in texts]
    items = {
        kind: tuple(name for name in files if _ending(name) in found.endings)
        for kind, found in inputs.items()
    }
    items = {kind: of_kind for kind, of_kind in items.items() if of_kind}
    if not files or len(texts) != 1 or any(len(of_kind) > 1 for of_kind in items.values()):
        where = str((folder / (files or texts)[0]).relative_to(root))
        if not texts:
            reason = f"no caption: expected {stem}.txt or {stem}.json beside it"
        elif not files:
            reason = f"no image beside it: expected {stem}.jpg or another image"
        else:
            reason = f"{', '.join(names)} share a name: expected one image and one caption"
        return Problem(where=where, reason=reason)
    where = str((folder / files[0]).relative_to(root))
    try:
        contents = media.read(texts[0], "caption")
    except UnusableError as error:
        return Problem(where=where, reason=str(error))
    except OSError as error:
        return Problem(where=where, reason=f"{texts[0]} cannot be read: {reason_of(error)}")
    return Found(
        where=where,
        key=stored_key(str((folder / stem).relative_to(root))),
        identity=where,
        text=contents,
        ending="txt" if _ending(texts[0]) == "txt" else "json",
        items=items,
        files=media,
    )


def read_lines(path: Path, media: MediaFolder, inputs: Inputs) -> Iterator[Found | Problem]:
    """The samples of a JSONL file; empty lines are ignored.

    Args:
        path: Path to the file.
        media: Files that samples may name.
        inputs: Kinds of items that samples may have.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text:
                where = f"{path.name}:{number}"
                yield _item(text, where, number, path, media, inputs)


def read_array(path: Path, media: MediaFolder, inputs: Inputs) -> Iterator[Found | Problem]:
    """The items of a JSON file that holds one array, without reading it as a whole.

    Nothing can be read after a place where the file is not valid JSON.

    Args:
        path: Path to the file.
        media: Files that samples may name.
        inputs: Kinds of items that samples may have.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, text in enumerate(array_items(file), 1):
                where = f"{path.name} item {number}"
                yield _item(text.encode(), where, number, path, media, inputs)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", None) or reason_of(error)
        reason = f"malformed JSON: {why}; the rest cannot be read"
        yield Problem(where=f"{path.name} item {number + 1}", reason=reason)


def array_items(file: TextIO) -> Iterator[str]:
    """The source text of each item of a JSON array, which is not read as a whole.

    Args:
        file: Opened file, at its beginning.

    Raises:
        json.JSONDecodeError: The file is not an array, or is truncated.
    """
    # Only where an item ends is asked here; numbers of any length are text.
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    buffer, at, step = file.read(_CHUNK), 0, _CHUNK
    expected = "["
    while True:
        at = _space_end(buffer, at)
        if at < len(buffer) and expected:
            if buffer[at] == "]" and expected == ",":
                break
            if buffer[at] != expected:
                raise json.JSONDecodeError(f"{expected!r} is missing", "", 0)
            at, expected = at + 1, ""
            continue
        if buffer[at : at + 1] == "]":
            break  # An empty array.
        try:
            _, end = decoder.raw_decode(buffer, at)
        except json.JSONDecodeError as error:
            more = file.read(step) if len(buffer) - at < _LONGEST_ITEM else ""
            if not more:
                raise json.JSONDecodeError(error.msg, "", 0) from error
            buffer, at, step = buffer[at:] + more, 0, step * 2
            continue
        yield buffer[at:end]
        at, expected, step = end, ",", _CHUNK


def _space_end(buffer: str, at: int) -> int:
    match = _SPACE.match(buffer, at)
    assert match is not None
    return match.end()


def _item(
    text: bytes, where: str, number: int, path: Path, media: MediaFolder, inputs: Inputs
) -> Found | Problem:
    try:
        conversation = parse_conversation(parse_json(text), inputs, {})
        paths = conversation.paths
        identity = "\n".join(chain.from_iterable(paths.values())) or text.decode()
    except (MalformedError, ValueError) as error:
        return Problem(where=where, reason=str(error))
    return Found(
        where=where,
        key=stored_key(f"{path.stem}-{number:08d}"),
        identity=identity,
        text=text,
        ending="json",
        items=paths,
        files=media,
    )


# -- items -----------------------------------------------------------------------------------------


def _blame(found: Found, inputs: Inputs) -> str | None:
    """Message that names the broken item, if an item is the cause."""
    for kind, of_kind in found.contents(inputs).items():
        for name, data in of_kind:
            try:
                inputs[kind].examine(data)
            except BrokenItemError as error:
                return f"{inputs[kind].words.noun} {shortened(name)} is broken: {error}"
    return None


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


# -- names -----------------------------------------------------------------------------------------


def stored_key(name: str) -> str:
    """Key for a name: different for different names, and valid in tar files and energon.

    Letters, digits and most other characters stay; a dot, at which energon splits names, becomes
    %2E.

    Args:
        name: Path without ending.
    """
    raw = re.sub(r"[^\w/ -]", _escape, name)
    # Energon ignores names that begin with this.
    key = "%5F" + raw[1:] if raw.startswith("__") else raw
    last = key.rsplit("/", 1)[-1]
    if len(key.encode()) <= _LONGEST_KEY and len(last.encode()) <= _LONGEST_NAME:
        return key
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    start = last.encode()[: _LONGEST_NAME - 20].decode(errors="ignore")
    return f"{start}-{digest}"


def _escape(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key with which cat2 comes before cat10."""
    pieces = (piece for piece in re.split(r"(\d+)", name) if piece)
    numbers = [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
    return numbers, name


Kind = Literal["folder", "shards", "lines", "array", "table"]
_KINDS: Mapping[str, Kind] = {
    **{".jsonl": "lines", ".ndjson": "lines", ".json": "array"},
    **dict.fromkeys(TABLES, "table"),
}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_EXPECTED = (
    "expected a folder of images, tar shards or parquet files, a .jsonl file or a .json file"
)


def kind_of(source: Path) -> Kind:
    """Kind of a source, from its path.

    Raises:
        ValueError: The path is of no known kind.
    """
    shown = shortened(str(source))
    with border(lambda why: f"{shown} is not a source: {why}; {_EXPECTED}"):
        is_folder, exists, is_file = source.is_dir(), source.exists(), source.is_file()
    if is_folder:
        return _kind_of_folder(source)
    if not exists:
        raise ValueError(f"{shown} does not exist: {_EXPECTED}")
    kind = _KINDS.get(source.suffix.lower())
    if kind is None or not is_file:
        what = "is of an unknown kind" if is_file else "is not a regular file"
        raise ValueError(f"{shown} {what}: {_EXPECTED}")
    if kind == "table":
        return kind
    with source.open("rb") as file:
        start = next((byte for byte in chain.from_iterable(file) if not chr(byte).isspace()), None)
    if kind == "array" and start == ord("{"):
        raise ValueError(
            f"{source} holds one object: expected an array of samples, [...]; a file with one "
            f"object a line is named .jsonl"
        )
    return kind


def _kind_of_folder(source: Path) -> Kind:
    shards = tables = False
    for path in source.rglob("*"):
        name = path.name.lower()
        if name.endswith(_PACKED):
            raise ValueError(
                f"{source} holds {path.relative_to(source)}, which is compressed: expected plain "
                f"tar files, from which samples are read one by one; uncompress it, as with gunzip"
            )
        if name.endswith(".tar") and not path.name.endswith(".tar"):
            raise ValueError(f"{source} holds {path.relative_to(source)}: rename it to end in .tar")
        shards |= name.endswith(".tar")
        tables |= is_table(path, source)
    # Tools that write shards, such as img2dataset, write tables about them too.
    if shards:
        return "shards"
    return "table" if tables else "folder"
