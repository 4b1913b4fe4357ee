"""Sources of `megatron-mimo data prepare`: folders of images with captions, JSONL, JSON files.

`tables.py` has datasets of Hugging Face's, and `shards.py` tar shards.

Sources are read as streams, one sample at a time, and always in the same order.
"""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Literal, TextIO

from PIL import Image

from megatron_mimo.border import border, reason_of
from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.samples.media import MISSING, MediaFolder, on_one_line, shortened
from megatron_mimo.data.samples.sample import UnusableError
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.conversation import parse_conversation, parse_json
from megatron_mimo.media.images import IMAGE_ENDINGS, BrokenImageError, examine_image
from megatron_mimo.tools.data.forms import wrong_sample
from megatron_mimo.tools.data.hub_folder import TABLES, is_table

# PIL's name of a format -> file ending.
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm"}
_TEXT_ENDINGS = ("txt", "json")
_IMAGE = "image"  # in messages
Split = Literal["train", "val"]
# Largest length of a key in bytes: plain tar headers have 155 for folders and 100 for the file.
_LONGEST_KEY, _LONGEST_NAME = 150, 80
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 20  # characters
# A longer item of a JSON array is treated as broken JSON.
_LONGEST_ITEM = 64 * _CHUNK


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A sample of a source whose images have not been read yet.

    Attributes:
        where: Line or file, for messages to the user.
        key: Key under which the sample will be stored.
        identity: Text that decides the split: samples with the same text are in the same split.
        text: Contents of the sample's text file.
        ending: Ending of the text file: "json", or "txt" for a caption.
        images: Images in order: the path of a file as the sample names it, or its contents.
        images_in: Files that samples may name.
        split: Split that the sample belongs to; None where its identity decides.
    """

    where: str
    key: str
    identity: str
    text: bytes
    ending: Literal["json", "txt"]
    images: tuple[str | bytes, ...]
    images_in: MediaFolder
    split: Split | None = None

    @property
    def named_images(self) -> list[str]:
        """A name for each image, for messages: its path, or its number."""
        return [
            image if isinstance(image, str) else str(number)
            for number, image in enumerate(self.images, 1)
        ]

    def parts(self) -> dict[str, bytes]:
        """Contents by file ending, byte for byte: the text, then the images in order.

        Raises:
            UnusableError: An image is missing, may not be named, or is of an unknown kind.
            OSError: An image cannot be read.
        """
        contents = [
            image if isinstance(image, bytes) else self.images_in.read(image, _IMAGE)
            for image in self.images
        ]
        endings = list(map(_image_ending, self.named_images, contents))
        if len(endings) > 1:
            endings = [f"{number}.{ending}" for number, ending in enumerate(endings, 1)]
        return {self.ending: self.text, **dict(zip(endings, contents, strict=True))}


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
    """Problem of a sample, or None; images are read, but not decoded.

    Args:
        found: Sample of a source.
        inputs: Kinds of items that samples may have.
    """
    try:
        parts = found.parts()
    except UnusableError as error:
        is_missing = error.kind == MISSING
        return Problem(where=found.where, reason=str(error), is_missing=is_missing)
    except OSError as error:
        return Problem(where=found.where, reason=f"cannot be read: {reason_of(error)}")
    reason = wrong_sample(found.key, parts, inputs, found.images_in)
    if reason is None:
        return None
    return Problem(where=found.where, reason=_blame(found, parts) or reason)


def read_folder(folder: Path, media_roots: Sequence[str] = ()) -> Iterator[Found | Problem]:
    """Images with a caption file beside each: cat.jpg with cat.txt or cat.json.

    Subfolders are read too, all in natural order; hidden files and files of other kinds are
    skipped.

    Args:
        folder: Path to the folder.
        media_roots: Folders that links in it may lead to.
    """
    yield from _read_folder((str(folder), *media_roots), folder, ())


def _read_folder(
    roots: Sequence[str], folder: Path, above: tuple[tuple[int, int], ...]
) -> Iterator[Found | Problem]:
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return  # A link to a folder around it.
    media = MediaFolder(folder, roots)
    stems: dict[str, list[str]] = {}
    folders = []
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
            if dot and ending.lower() in (*IMAGE_ENDINGS, *_TEXT_ENDINGS):
                stems.setdefault(stem, []).append(entry.name)
    for stem in sorted(stems, key=_natural):
        yield _pair(Path(roots[0]), media, stem, sorted(stems[stem]))
    for name in sorted(folders, key=_natural):
        yield from _read_folder(roots, folder / name, (*above, here))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    # A link that leads nowhere, or round; reading it as a file tells how.
    except OSError:
        return False


def _pair(root: Path, media: MediaFolder, stem: str, names: list[str]) -> Found | Problem:
    """Sample of the files that share a stem."""
    folder = media.folder
    texts = [name for name in names if _ending(name) in _TEXT_ENDINGS]
    images = [name for name in names if name not in texts]
    if len(images) != 1 or len(texts) != 1:
        where = str((folder / (images or texts)[0]).relative_to(root))
        if not texts:
            reason = f"no caption: expected {stem}.txt or {stem}.json beside it"
        elif not images:
            reason = f"no image beside it: expected {stem}.jpg or another image"
        else:
            reason = f"{', '.join(names)} share a name: expected one image and one caption"
        return Problem(where=where, reason=reason)
    where = str((folder / images[0]).relative_to(root))
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
        images=(images[0],),
        images_in=media,
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
        paths = conversation.paths.get(ENCODER, ())
        identity = "\n".join(paths) or text.decode()
    except (MalformedError, ValueError) as error:
        return Problem(where=where, reason=str(error))
    return Found(
        where=where,
        key=stored_key(f"{path.stem}-{number:08d}"),
        identity=identity,
        text=text,
        ending="json",
        images=paths,
        images_in=media,
    )


# -- images ----------------------------------------------------------------------------------------


def _blame(found: Found, parts: Mapping[str, bytes]) -> str | None:
    """Message that names the broken image, if an image is the cause."""
    for path, data in zip(found.named_images, list(parts.values())[1:], strict=True):
        try:
            examine_image(data)
        except BrokenImageError as error:
            return f"image {shortened(path)} is broken: {error}"
    return None


def _image_ending(path: str, data: bytes) -> str:
    """Ending of the file, or the ending that fits its contents.

    Raises:
        UnusableError: Neither is of an image.
    """
    if not data:
        raise UnusableError("empty image", f"image {shortened(path)} is empty")
    ending = _ending(path)
    if ending in IMAGE_ENDINGS:
        return ending
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return _ENDINGS[str(opened.format)]
    # PIL raises nearly anything on broken bytes; a format that has no ending here is unknown too.
    except Exception as error:
        raise UnusableError(
            "unknown kind of image",
            f"image {shortened(path)} is of an unknown kind: expected {', '.join(IMAGE_ENDINGS)}",
        ) from error


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
