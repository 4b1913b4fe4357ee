"""Items as callers give them: paths, contents of files, pictures, arrays."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.inference.sources import read_source, require_several
from megatron_mimo.media.images import decode_image

PIXELS = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "picture", "array"])
def test_every_form_is_the_same_image(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    given: dict[str, Any] = {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "picture": Image.fromarray(PIXELS),
        "array": PIXELS,
    }
    source = read_source(given[kind], "image 1")
    assert source.name == (str(path) if kind in ("path", "text") else "image 1")
    assert np.array_equal(np.asarray(decode_image(source.content)), PIXELS)


def test_transparent_pictures_show_white_as_files_do() -> None:
    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    content = read_source(clear, "image 1").content
    assert np.asarray(decode_image(content)).min() == 255
    assert Image.open(io.BytesIO(content)).size == (3, 2)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(ValueError, match=f"^image 2 cannot be read: .*{path}$"):
            read_source(path, "image 2")


@pytest.mark.parametrize(
    "given",
    ["a.png", b"png", Path("a.png"), PIXELS, Image.fromarray(PIXELS)],
    ids=["text", "bytes", "path", "array", "picture"],
)
def test_one_item_is_no_list(given: Any) -> None:
    with pytest.raises(ValueError, match="^images is one .*: expected a list of items"):
        require_several(given, "images")


def test_several_items_are_a_list() -> None:
    assert require_several(("a", "b"), "images") == ["a", "b"]
    assert require_several((), "images") == []
