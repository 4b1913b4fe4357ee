"""What `megatron-mimo data prepare` reads: folders of images with captions, JSONL and JSON files.

Sources are read as streams, one sample at a time, and always in the same order.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Literal, TextIO

from PIL import Image

from megatron_mimo.data.conversation import MalformedError, parse_conversation, parse_json
from megatron_mimo.data.task_encoder import IMAGE_PARTS
from megatron_mimo.images import BrokenImageError, examine_image
from megatron_mimo.tools.data.forms import wrong_sample

# PIL's name of a format -> file ending.
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm"}
_TEXT_ENDINGS = ("txt", "json")
# Of a key, in bytes: tar headers of the plain kind have 155 for folders and 100 for the file.
_LONGEST_KEY, _LONGEST_NAME = 150, 80
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 20  # characters
# An item of a JSON array beyond this is taken for broken JSON.
_LONGEST_ITEM = 64 * _CHUNK


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A sample of a source; its images are not read yet.

    Attributes:
        where: Line or file, for the user.
        key: Of the sample, as it will be stored.
        identity: What the val split goes by: samples with the same are in the same split.
        text: Contents of its text file.
        ending: "json", or "txt" for a caption.
        images: Files, in order.
        images_in: Folder that paths in its text are relative to.
    """

    where: str
    key: str
    identity: str
    text: bytes
    ending: Literal["json", "txt"]
    images: tuple[Path, ...]
    images_in: Path

    def size(self) -> int:
        """Bytes of its files."""
        return len(self.text) + sum(path.stat().st_size for path in self.images)

    def parts(self) -> dict[str, bytes]:
        """File ending -> contents, byte for byte."""
        parts: dict[str, bytes] = {self.ending: self.text}
        for name, path in zip(self.image_names(), self.images, strict=True):
            parts[name] = path.read_bytes()
        return parts

    def image_names(self) -> list[str]:
        """File endings under which the images are stored."""
        endings = [_image_ending(path) for path in self.images]
        if len(endings) == 1:
            return endings
        return [f"{number}.{ending}" for number, ending in enumerate(endings, 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A sample that cannot be stored.

    Attributes:
        where: Line or file, for the user.
        reason: What is wrong with it.
    """

    where: str
    reason: str


def problem_of(found: Found, image_token: str) -> Problem | None:
    """What is wrong with a sample; images are read, but not decoded.

    Args:
        found: The sample.
        image_token: Placeholder of an image in texts.
    """
    reason = next(filter(None, map(_wrong_file, found.images)), None)
    if reason is None:
        try:
            parts = found.parts()
        except OSError as error:
            reason = f"cannot be read: {error}"
        else:
            reason = wrong_sample(found.key, parts, image_token, found.images_in)
            reason = _blame(found, parts) or reason if reason else None
    return None if reason is None else Problem(where=found.where, reason=reason)


def read_folder(folder: Path) -> Iterator[Found | Problem]:
    """Images with a caption file beside each: cat.jpg with cat.txt or cat.json.

    Subfolders are read too, all in natural order; hidden files and other kinds of files are passed
    over.

    Args:
        folder: Outermost one.
    """
    yield from _read_folder(folder, folder, ())


def _read_folder(
    root: Path, folder: Path, above: tuple[tuple[int, int], ...]
) -> Iterator[Found | Problem]:
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return  # A link to a folder around it.
    stems: dict[str, list[str]] = {}
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
                continue
            stem, dot, ending = entry.name.rpartition(".")
            if dot and ending.lower() in (*IMAGE_PARTS, *_TEXT_ENDINGS):
                stems.setdefault(stem, []).append(entry.name)
    for stem in sorted(stems, key=_natural):
        yield _pair(root, folder, stem, sorted(stems[stem]))
    for name in sorted(folders, key=_natural):
        yield from _read_folder(root, folder / name, (*above, here))


def _pair(root: Path, folder: Path, stem: str, names: list[str]) -> Found | Problem:
    """The sample of the files that share a stem."""
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
    image, text = folder / images[0], folder / texts[0]
    where = str(image.relative_to(root))
    try:
        contents = text.read_bytes()
    except OSError as error:
        return Problem(where=where, reason=f"{text.name} cannot be read: {error.strerror}")
    return Found(
        where=where,
        key=stored_key(str((folder / stem).relative_to(root))),
        identity=where,
        text=contents,
        ending="txt" if _ending(text.name) == "txt" else "json",
        images=(image,),
        images_in=folder,
    )


def read_lines(path: Path, image_root: Path, image_token: str) -> Iterator[Found | Problem]:
    """The samples of a JSONL file; empty lines are passed over.

    Args:
        path: Of the file.
        image_root: What relative paths of images are relative to.
        image_token: Placeholder of an image in texts.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text:
                where = f"{path.name}:{number}"
                yield _item(text, where, number, path, image_root, image_token)


def read_array(path: Path, image_root: Path, image_token: str) -> Iterator[Found | Problem]:
    """The items of a JSON file that holds one array, without reading it as a whole.

    Behind a place where it is no JSON nothing can be read.

    Args:
        path: Of the file.
        image_root: What relative paths of images are relative to.
        image_token: Placeholder of an image in texts.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, text in enumerate(_array_items(file), 1):
                where = f"{path.name} item {number}"
                yield _item(text.encode(), where, number, path, image_root, image_token)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = f"malformed JSON: {getattr(error, 'msg', error)}; the rest cannot be read"
        yield Problem(where=f"{path.name} item {number + 1}", reason=reason)


def _array_items(file: TextIO) -> Iterator[str]:
    """The source text of each item.

    Raises:
        json.JSONDecodeError: The file is no array, or is cut short.
    """
    decoder = json.JSONDecoder()
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
    text: bytes, where: str, number: int, path: Path, image_root: Path, image_token: str
) -> Found | Problem:
    try:
        conversation = parse_conversation(parse_json(text), image_token, 0)
        identity = "\n".join(conversation.image_paths) or text.decode()
    except (MalformedError, ValueError) as error:
        return Problem(where=where, reason=str(error))
    return Found(
        where=where,
        key=stored_key(f"{path.stem}-{number:08d}"),
        identity=identity,
        text=text,
        ending="json",
        images=tuple(image_root / image for image in conversation.image_paths),
        images_in=image_root,
    )


# -- images ----------------------------------------------------------------------------------------


def _wrong_file(path: Path) -> str | None:
    """What is wrong with an image file, before its contents are looked at."""
    if not path.exists():
        return f"image {path} is missing"
    if not path.is_file():
        return f"image {path} is a folder"
    if not path.stat().st_size:
        return f"image {path} is empty"
    if _ending(path.name) in IMAGE_PARTS:
        return None
    try:
        _image_ending(path)
    # PIL raises nearly anything on broken bytes; a format that has no ending here is unknown too.
    except Exception:
        return f"image {path} is of an unknown kind: expected {', '.join(IMAGE_PARTS)}"
    return None


def _blame(found: Found, parts: Mapping[str, bytes]) -> str | None:
    """The broken image, if it is one."""
    for name, path in zip(found.image_names(), found.images, strict=True):
        try:
            examine_image(parts[name])
        except BrokenImageError as error:
            return f"image {path} is broken: {error}"
    return None


def _image_ending(path: Path) -> str:
    """The file's own ending, or that of what it holds."""
    ending = _ending(path.name)
    if ending in IMAGE_PARTS:
        return ending
    with Image.open(path) as opened:
        return _ENDINGS[str(opened.format)]


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


# -- names -----------------------------------------------------------------------------------------


def stored_key(name: str) -> str:
    """A key for a name, different for different names, that tar files and energon can hold.

    Letters, digits and most others stay; a dot, at which energon cuts names, becomes %2E.

    Args:
        name: Path without ending.
    """
    raw = re.sub(r"[^\w/ -]", _escape, name)
    # Energon passes over names that begin like this.
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
    """Order in which cat2 comes before cat10."""
    pieces = (piece for piece in re.split(r"(\d+)", name) if piece)
    numbers = [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
    return numbers, name


def kind_of(source: Path) -> Literal["folder", "shards", "lines", "array"]:
    """Which kind of source a path is.

    Raises:
        ValueError: None that is known.
    """
    if source.is_dir():
        if next(source.rglob("*.tar"), None) is not None:
            return "shards"
        return "folder"
    if not source.exists():
        raise ValueError(
            f"{source} does not exist: expected a folder of images or tar shards, a .jsonl file or "
            f"a .json file"
        )
    with source.open("rb") as file:
        start = next((byte for byte in chain.from_iterable(file) if not chr(byte).isspace()), None)
    if source.suffix == ".json" and start == ord("{"):
        raise ValueError(
            f"{source} holds one object: expected an array of samples, [...]; a file with one "
            f"object a line is named .jsonl"
        )
    kinds: dict[str, Literal["lines", "array"]] = {
        ".jsonl": "lines",
        ".ndjson": "lines",
        ".json": "array",
    }
    if source.suffix.lower() not in kinds:
        raise ValueError(
            f"{source} is of an unknown kind: expected a folder of images or tar shards, a .jsonl "
            f"file or a .json file"
        )
    return kinds[source.suffix.lower()]
