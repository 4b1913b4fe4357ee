"""`data inspect` shows images of a folder's processor."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.config.flags import parse
from megatron_mimo.data import DataConfig
from megatron_mimo.data.inputs import placeholders
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer
from megatron_mimo.media.processors import read_processor
from megatron_mimo.tools.data.inspect import InspectCommandLine, survey
from megatron_mimo.tools.data.page import spans, write_page
from tests.unit_tests.media.processors.folders import save_folder


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("mistral3", "40 x 32 pixels, 80 tokens of the tower, 20 rows"),
        ("llava_onevision", "16 x 16 pixels, 112 tokens of the tower, 7 tiles, 104 rows"),
    ],
)
def test_the_page_shows_what_the_tower_sees(tmp_path: Path, model_type: str, words: str) -> None:
    folder = tmp_path / "folder"
    kind = read_processor(folder, model_type, save_folder(model_type, folder))
    file = io.BytesIO()
    Image.fromarray(np.full((32, 40, 3), 99, np.uint8)).save(file, "png")
    text = json.dumps({"question": "<image>Which?", "answer": "A cat"}).encode()
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train/0.tar", [("a", {"png": file.getvalue(), "json": text})])
    prepare(tmp_path, ["train/0.tar"])
    config = DataConfig(
        provider="energon", path=str(tmp_path), inputs={"encoder": kind}, seq_length=256
    )
    tokenizer = HuggingFaceTokenizer(str(folder), placeholders(config.inputs))
    out = tmp_path / "page.html"
    line = parse(["--out", str(out)], InspectCommandLine, prog="inspect")
    statistics, shown = survey(config, tokenizer, line)
    (document,) = shown[0].documents
    found = spans(document, config.inputs, tokenizer)
    assert sum(span.number for span in found) == len(document.tokens)
    (image,) = (span for span in found if span.kind == "image")
    # Four lines of rows, with three marks between them and one behind them.
    assert image.number == (23 if model_type == "mistral3" else 104)
    write_page(out, statistics, shown, config, tokenizer, lead="", title="")
    page = out.read_text()
    assert f"image 1: {words}" in page
    assert page.count("data:image/png") == (7 if model_type == "llava_onevision" else 1)
