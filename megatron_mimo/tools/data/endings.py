"""Names under which the items of a sample are stored: their endings say what they are."""

import io
from collections.abc import Sequence

from PIL import Image

from megatron_mimo.data.inputs import Inputs, ItemInput
from megatron_mimo.data.samples.media import shortened
from megatron_mimo.data.samples.sample import UnusableError
from megatron_mimo.media.container import format_of
from megatron_mimo.media.images import IMAGE_ENDINGS
from megatron_mimo.media.items import BrokenItemError

# PIL's name of a format -> file ending.
_PICTURES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm"}
# FFmpeg's name of a format -> file ending.
_RECORDINGS = {
    "wav": "wav", "flac": "flac", "mp3": "mp3", "aac": "aac", "ogg": "ogg",
    "mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "mkv", "avi": "avi",
}  # fmt: skip


def names_of_parts(name: str, items: Sequence[tuple[str, bytes]], inputs: Inputs) -> list[str]:
    """Endings under which the items of a kind are stored beside the sample's text.

    One item has its ending, several have numbers before it. Where another kind of items has such an
    ending, the noun is before it: "audio.mp4".

    Args:
        name: Name of the kind.
        items: Name of each item, for messages, and its contents.
        inputs: Kinds of items that samples may have.

    Raises:
        UnusableError: An item is empty, or of an unknown kind.
    """
    kind = inputs[name]
    endings = [_ending_of(path, data, kind, inputs) for path, data in items]
    taken = {
        ending: next(other for other, of in inputs.items() if ending in of.endings)
        for ending in endings
    }
    noun = "" if all(taker == name for taker in taken.values()) else f"{kind.words.noun}."
    if len(endings) > 1:
        return [f"{noun}{number}.{ending}" for number, ending in enumerate(endings, 1)]
    return [f"{noun}{ending}" for ending in endings]


def _ending_of(path: str, data: bytes, kind: ItemInput, inputs: Inputs) -> str:
    """Ending of the file, or the ending that fits its contents.

    Raises:
        UnusableError: Neither is of the kind.
    """
    noun = kind.words.noun
    if not data:
        raise UnusableError(f"empty {noun}", f"{noun} {shortened(path)} is empty")
    ending = path.rpartition(".")[2].lower()
    # The sound of a video is a clip.
    is_picture = kind.endings == IMAGE_ENDINGS
    known = {
        known
        for other in inputs.values()
        if (other.endings == IMAGE_ENDINGS) == is_picture
        for known in other.endings
    }
    if ending in known:
        return ending
    try:
        found = _PICTURES[_format(data)] if is_picture else _RECORDINGS[format_of(data, noun)]
    # A format that has no ending here is unknown too.
    except (BrokenItemError, KeyError) as error:
        raise UnusableError(
            f"unknown kind of {noun}",
            f"{noun} {shortened(path)} is of an unknown kind: expected {', '.join(kind.endings)}",
        ) from error
    return found


def _format(data: bytes) -> str:
    """PIL's name of the format of an image; empty if it knows none."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return str(opened.format)
    # PIL raises nearly anything on broken bytes.
    except Exception:
        return ""
