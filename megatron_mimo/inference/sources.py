"""Items of a question, from whatever a caller gives to what a module's input takes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mimo.border import reason_of
from megatron_mimo.data.samples.question import Source


def require_several(given: Any, name: str) -> list[Any]:
    """Items as a list; a text, an array or an image by itself would be taken apart.

    Raises:
        ValueError: It is a single item.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ValueError(f"{name} is one {type(given).__name__}: expected a list of items")
    return list(given)


def read_source(given: Any, name: str) -> Source:
    """An item as a module's input takes it.

    Args:
        given: Path to a file, contents of a file (bytes), a PIL image, or anything else, such as an
            array, which the module's input takes as it is.
        name: Name of the item in messages, where it has no path.

    Raises:
        ValueError: The file cannot be read; the message names it.
    """
    if isinstance(given, str | Path):
        try:
            return Source(str(given), Path(given).read_bytes())
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {reason_of(error)}") from error
    if hasattr(given, "convert") and hasattr(given, "getbands"):
        # A PIL image. Transparent pixels show white, as in files.
        return Source(name, _png(given))
    return Source(name, given)


def _png(picture: Any) -> bytes:
    """The image as a file, so that it is decoded by the rules of files."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
