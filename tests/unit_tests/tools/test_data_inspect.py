"""`megatron-mimo data inspect`: what it counts, and what its page shows."""

import base64
import io
import json
import re
import shlex
import struct
import zlib
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.config.flags import parse
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.samples.sample import RawSample, encode_sample
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import EncodedImage, ImageConfig, ImageInput
from megatron_mimo.tools.data.figures import unpatchify
from megatron_mimo.tools.data.inspect import (
    InspectCommandLine,
    describe,
    settings,
    survey,
)
from megatron_mimo.tools.data.page import spans
from megatron_mimo.tools.data.statistics import Distribution, Observation, Statistics, draw_bars
from megatron_mimo.tools.even_choice import EvenChoice
from tests.unit_tests.data.toy import ToneInput, tone

PATCH = 8


def picture(columns: int, rows: int, seed: int = 0) -> bytes:
    """A PNG that has `columns` x `rows` rows with pixel shuffle."""
    shape = (rows * 2 * PATCH, columns * 2 * PATCH, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def text(**fields: object) -> bytes:
    return json.dumps(fields).encode()


Samples = Mapping[str, Mapping[str, bytes]]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a dataset of shards, train/0.tar and so on; each of its samples by key."""

    def write(*shards: Samples, name: str = "dataset") -> Path:
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        names = [f"train/{number}.tar" for number in range(len(shards))]
        for shard, samples in zip(names, shards, strict=True):
            write_shard(folder / shard, samples.items())
        prepare(folder, names)
        return folder

    return write


# Positions: rows, a line break, the answer and the end of sequence, of which the last token is a
# target only. Texts are bytes.
ONE = {"png": picture(2, 3), "json": text(question="<image>", answer="abc")}  # 6 + 1 + 3
TWO = {
    "1.png": picture(1, 1),
    "2.png": picture(2, 2),
    "json": text(question="<image>and<image>", answer="xy"),
}  # 1 + 3 + 4 + 1 + 2
NONE = {"json": text(question="Hm?", answer="no")}  # 3 + 1 + 2
LONG = {"json": text(question="Hm?", answer="n" * 200)}  # 3 + 1 + 200
BROKEN = {"png": picture(2, 2)[:60], "json": text(question="<image>", answer="abc")}
MALFORMED = {"json": b'{"question": '}
CONTRADICTION = {"json": text(question="<image>", answer="abc")}
GOOD = {"one": ONE, "two": TWO, "none": NONE}
BAD = {"long": LONG, "broken": BROKEN, "malformed": MALFORMED, "contradiction": CONTRADICTION}


def look(path: Path, *flags: str) -> tuple[Statistics, DataConfig]:
    line = parse(["--seq-length", "64", *flags], InspectCommandLine, prog="inspect")
    config, tokenizer = settings(str(path), line.train)
    return survey(config, tokenizer, line)[0], config


def test_counts_are_those_of_the_samples(write: Write) -> None:
    path = write({**GOOD, **BAD}, {"last": ONE})
    seen, config = look(path)
    assert seen.samples == 8
    assert seen.num_bad == 4
    assert seen.images.counts == {0: 1, 1: 2, 2: 1}
    assert seen.text_only == 1 / 4
    assert seen.rows_of_images.counts == {6: 2, 1: 1, 4: 1}
    assert seen.rows_of_samples.counts == {6: 2, 5: 1}
    # The long one counts, though no sequence takes it.
    assert seen.positions.counts == {10: 2, 11: 1, 6: 1, 204: 1}
    assert seen.targets.counts == {4: 2, 3: 2}
    source = seen.sources[str(path)]
    assert (source.samples, source.bad, source.text_only) == (8, 4, 1)
    assert (source.images, source.tokens, source.targets) == (4, 37, 14)
    assert {shard: s.samples for (_, shard), s in seen.shards.items()} == {
        "train/0.tar": 7,
        "train/1.tar": 1,
    }
    assert seen.filled.counts == {10: 2, 11: 1, 6: 1}
    assert seen.fill_rate(config.seq_length) == pytest.approx(37 / (4 * 64))


def test_bad_samples_are_told_apart_with_an_example(write: Write) -> None:
    path = write({**BAD, "longer": LONG}, GOOD)
    seen, config = look(path)
    found = {kind: (bad.count, bad.example, bad.detail) for kind, bad in seen.bad.items()}
    assert set(found) == {
        "too long",
        "broken image",
        "malformed text",
        "stops training: N <image> placeholders and N images: expected one placeholder for each "
        "image",
    }
    assert found["too long"][:2] == (2, f"'long' of {path}, shard train/0.tar")
    assert "needs 204 positions" in found["too long"][2]
    report = "\n".join(describe(seen, config, "train"))
    assert "training leaves out 5 of 8 samples (62.50%)" in report
    assert "2  too long; such as 'long' of" in report
    assert "1  stops training: N <image> placeholders" in report
    assert ": 1 <image> placeholders and 0 images" in report


def test_packing_is_that_of_training(write: Write) -> None:
    # 10 + 10 + 10 + 2 x 6 = 42 positions, in sequences of 22: two of them hold all.
    path = write({"a": ONE, "b": ONE, "c": ONE, "d": NONE, "e": NONE, **BAD})
    seen, config = look(path, "--seq-length", "22", "--packing-buffer-size", "20")
    assert seen.filled.counts == {20: 1, 22: 1}
    assert seen.documents.counts == {2: 1, 3: 1}
    assert seen.fill_rate(22) == pytest.approx(42 / 44)
    assert seen.num_bad == 4
    report = "\n".join(describe(seen, config, "train"))
    assert "2 sequences of --seq-length 22 packed with --packing-buffer-size 20" in report
    assert "fill rate 0.9545, 2.5 samples in each" in report


def test_limit_reads_no_further_whatever_the_packing(write: Write) -> None:
    path = write({f"{i:02d}": NONE for i in range(30)})
    for flags in ([], ["--packing-buffer-size", "20"]):
        seen, _ = look(path, "--limit", "7", *flags)
        assert seen.samples == seen.documents.total == 7


@pytest.mark.parametrize("packing", [(), ("--packing-buffer-size", "10")])
def test_pixels_are_decoded_on_request(write: Write, packing: tuple[str, ...]) -> None:
    # Every chunk has its right checksum; what is in them is no picture.
    whole = picture(2, 3)
    start = whole.index(b"IDAT")
    (length,) = struct.unpack(">I", whole[start - 4 : start])
    chunk = b"IDAT" + bytes(length)
    checksum = struct.pack(">I", zlib.crc32(chunk))
    hollow = whole[:start] + chunk + checksum + whole[start + 8 + length :]
    path = write({"fine": ONE, "hollow": {"png": hollow, "json": ONE["json"]}})
    seen, config = look(path, *packing)
    assert (seen.num_bad, seen.blanks) == (0, {})
    seen, config = look(path, "--decode", *packing)
    assert seen.num_bad == 0
    blanks = seen.blanks["blank for an image"]
    assert (blanks.count, blanks.example[:8]) == (1, "'hollow'")
    report = "\n".join(describe(seen, config, "train"))
    assert "a blank stands for an image in 1 samples; such as 'hollow' of" in report


def test_blends_are_counted_by_dataset(write: Write, tmp_path: Path) -> None:
    paths = [write(GOOD, name="left"), write({"a": NONE, "b": LONG}, name="right")]
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        "      - {weight: 1, path: left}\n      - {weight: 3, path: right}\n"
    )
    seen, _ = look(blend)
    assert {name: (s.samples, s.bad) for name, s in seen.sources.items()} == {
        str(paths[0]): (3, 0),
        str(paths[1]): (2, 1),
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{gone}"], "does not exist"),
        (["{path}", "--split", "val"], "the val split cannot be opened"),
        (["{path}", "--seq-length", "1"], "--seq-length is 1: expected 2 to 16,777,216"),
        (["{path}", "--samples", "-1"], "--samples is -1: expected 0 to"),
        (["{path}", "--limit", "0"], "--limit is 0: expected 1 to"),
        (["{path}", "--out", "{gone}/a.html"], "its folder does not exist"),
        (["{path}", "--sample", "3"], "unknown flag --sample: the nearest is --samples"),
        (["--seq-length", "64"], "expected one PATH, got 0"),
        (["{path}", "{path}"], "expected one PATH, got 2"),
    ],
)
def test_wrong_usage(
    argv: list[str],
    message: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(GOOD)
    named = [token.format(path=path, gone=tmp_path / "gone") for token in argv]
    assert main(["data", "inspect", *named]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_the_flags_are_shown_on_request(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({"a": {"json": text(text="A note.")}})
    assert main(["data", "inspect", str(path), "--seq-length", "32", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seq-length"] == 32


def test_a_dataset_without_a_good_sample_is_a_failure(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "inspect", str(write(BAD)), "--seq-length", "64"]) == 1
    assert "no sample can be used" in capsys.readouterr().out


def test_flags_of_the_run_are_taken_whatever_its_grids(write: Write, tmp_path: Path) -> None:
    path = write(GOOD)
    file = tmp_path / "run.yaml"
    file.write_text(
        "seq-length: 77\nllm-dp: 4\nencoder-dp: 2\nllm-pp: 2\ndata-path: elsewhere\nsave: ckpt\n"
        "model-provider: nemotron-moe-vlm-tiny\noverride: [language.pattern=M*E|M*E]\n"
    )
    line = parse(["--config", str(file)], InspectCommandLine, prog="inspect")
    config, _ = settings(str(path), line.train)
    assert (config.seq_length, config.path, config.provider) == (77, str(path), "energon")


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page says: its text, its tags, and the tokens with their classes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[bytes] = []
        self.spans: list[tuple[str, str]] = []
        self.words = ""
        self._class: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        if tag == "img":
            self.images.append(base64.b64decode((named["src"] or "").split(",", 1)[1]))
        if tag == "span" and "title" in named:
            self._class = named.get("class") or ""

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._class is not None:
            self.spans.append((self._class, data))
            self._class = None


def test_the_page_shows_what_the_model_sees(write: Write, tmp_path: Path) -> None:
    path, out = write(GOOD), tmp_path / "page.html"
    assert main(["data", "inspect", str(path), "--seq-length", "64", "--out", str(out)]) == 0
    page = Page(out)
    # Sizes fit the patches, so that nothing was resized.
    stored = [ONE["png"], TWO["1.png"], TWO["2.png"]]
    assert len(page.images) == 3
    for shown, file in zip(page.images, stored, strict=True):
        pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in (shown, file)]
        assert np.array_equal(*pixels)
    assert page.spans == [
        ("image", "image 1: 6 rows"),
        ("", "\n"),
        ("target", "abc"),
        ("special target", "end of sequence"),
        ("image", "image 1: 1 rows"),
        ("", "and"),
        ("image", "image 2: 4 rows"),
        ("", "\n"),
        ("target", "xy"),
        ("special target", "end of sequence"),
        ("", "Hm?\n"),
        ("target", "no"),
        ("special target", "end of sequence"),
    ]
    assert "10 of 64 positions, 4 targets, 1 document" in page.words
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', out.read_text())


def test_the_page_shows_the_documents_of_a_packed_sequence(write: Write, tmp_path: Path) -> None:
    path, out = write(GOOD), tmp_path / "page.html"
    flags = ["--seq-length", "30", "--packing-buffer-size", "10", "--out", str(out)]
    assert main(["data", "inspect", str(path), *flags]) == 0
    page = Page(out)
    assert "27 of 30 positions, 10 targets, 3 documents" in page.words
    bounds = re.findall(r"positions (\d+) to (\d+), (\d+) rows, (\d+) targets", page.words)
    assert bounds == [("0", "9", "6", "4"), ("10", "20", "5", "3"), ("21", "26", "0", "3")]
    widths = re.findall(
        r'<div style="width: ([\d.]+)%"></div>', out.read_text().split('class="strip"')[1]
    )
    assert [float(width) for width in widths[:3]] == [33.33, 36.67, 20.0]


def test_text_is_escaped_everywhere(write: Write, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&amp;'
    samples = {
        f"k{evil.replace('/', '')}": {"json": text(question=evil, answer=evil)},
        f"bad{evil.replace('/', '')}": {"json": text(conversations=[{"from": evil, "value": "a"}])},
    }
    path, out = write(samples, name="<b>data"), tmp_path / "page.html"
    assert main(["data", "inspect", str(path), "--seq-length", "200", "--out", str(out)]) == 0
    page = Page(out)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert (("", f"{evil}\n") in page.spans) and (("target", evil) in page.spans)
    assert page.words.count("<script>") > 3


def test_the_number_of_shown_sequences(write: Write, tmp_path: Path) -> None:
    path, out = write({f"{i:02d}": NONE for i in range(50)}), tmp_path / "page.html"
    for number in (0, 3, 80):
        flags = ["--seq-length", "64", "--samples", str(number), "--out", str(out)]
        assert main(["data", "inspect", str(path), *flags]) == 0
        assert Page(out).tags.count("section") == min(number, 50)


def test_tiles_are_put_together_again() -> None:
    config = DataConfig(
        seq_length=512,
        inputs={
            "encoder": ImageInput(
                config=ImageConfig(
                    dynamic_resolution=False,
                    img_h=32,
                    img_w=32,
                    use_tiling=True,
                    max_num_tiles=4,
                    use_thumbnail=True,
                )
            )
        },
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    raw = RawSample.asking(key="k", question="<image>", answer="a", items={"encoder": (pixels,)})
    encoded = encode_sample(raw, config, ByteTokenizer(), content=("encoder",))
    (image,) = encoded.items["encoder"]
    assert isinstance(image, EncodedImage)
    pieces = list(unpatchify(image))
    assert len(pieces) == 5
    assert np.array_equal(
        np.concatenate([np.concatenate(pieces[:2], 1), np.concatenate(pieces[2:4], 1)]), pixels
    )
    (first, *_) = spans(encoded, config.inputs, ByteTokenizer())
    assert (first.kind, first.number) == ("image", image.rows)


def test_rows_of_every_module_are_counted_and_shown() -> None:
    inputs = {"encoder": ImageInput(), "audio": ToneInput()}
    config, tokenizer = DataConfig(inputs=inputs), ByteTokenizer(tuple(inputs))
    pixels = np.zeros((16, 16, 3), np.uint8)
    raw = RawSample.asking(
        key="k",
        question="<tone><image><tone>",
        answer="a",
        items={"encoder": (pixels,), "audio": (tone(2), tone(3))},
    )
    sample = encode_sample(raw, config, tokenizer, content=())
    shown = [(span.kind, span.text) for span in spans(sample, inputs, tokenizer)][:3]
    assert shown == [
        ("image", "tone 1: 2 rows"), ("image", "image 1: 1 rows"), ("image", "tone 2: 3 rows")
    ]  # fmt: skip
    statistics = Statistics()
    seen = {"key": "k", "source": "d", "shard": "s", "kind": "", "reason": ""}
    statistics.add(Observation(number=0, **seen, sample=sample, positions=9))
    heard = encode_sample(
        RawSample.asking(key="l", question="<tone>", answer="a", items={"audio": (tone(4),)}),
        config,
        tokenizer,
        content=(),
    )
    statistics.add(Observation(number=1, **seen, sample=heard, positions=6))
    assert statistics.text_only == 0
    assert statistics.rows_of_images.counts == {1: 1}
    assert statistics.rows_of_others["audio"].counts == {2: 1, 3: 1, 4: 1}
    assert "rows of a tone: mean 3.0" in "\n".join(describe(statistics, config, "train"))


# -- numbers ---------------------------------------------------------------------------------------

VALUES = st.lists(st.integers(0, 5000), min_size=1, max_size=60)


@given(VALUES, st.integers(1, 100))
def test_percentiles_are_those_of_numpy(values: list[int], percent: int) -> None:
    found = Distribution()
    for value in values:
        found.add(value)
    assert found.percentile(percent) == np.percentile(values, percent, method="inverted_cdf")
    assert found.mean == pytest.approx(np.mean(values))
    assert found.largest == max(values)


@given(VALUES)
def test_bars_hold_every_value_once(values: list[int]) -> None:
    found = Distribution()
    for value in values:
        found.add(value)
    bars = found.bars()
    assert sum(count for _, _, count in bars) == len(values)
    for first, last, count in bars:
        assert count == sum(first <= value <= last for value in values)
    assert all(after[0] == before[1] + 1 for before, after in pairwise(bars))
    assert len(bars) <= 14
    drawn = list(draw_bars(found))
    assert all(
        ("█" in line) == bool(count) for line, (_, _, count) in zip(drawn, bars, strict=True)
    )


@given(st.integers(0, 300), st.integers(0, 12))
def test_choices_are_spread_evenly(offered: int, number: int) -> None:
    choice = EvenChoice[int](number)
    for item in range(offered):
        choice.offer(item)
    taken = choice.taken()
    assert len(taken) == min(offered, number)
    assert taken == sorted(set(taken))
    if 1 < number <= offered:
        gaps = np.diff([*taken, offered])
        assert gaps.max() <= 4 * max(1, offered // number)


# -- the how-to ------------------------------------------------------------------------------------


def test_the_how_to_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[3] / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = 0
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(body, "data.md", "exec"), {})
        elif language == "yaml":
            Path("data/blend.yaml").write_text(body, encoding="utf-8")
        elif body.startswith("megatron-mimo"):
            for line in body.replace("\\\n", "").splitlines():
                _, *argv = shlex.split(line)
                if "digits" in line:
                    continue
                if argv[0] == "train":
                    # Whole runs are for other tests; this checks every flag, and starts no rank.
                    argv.append("--print-config")
                assert main(argv) == 0, line
                commands += 1
    assert commands == 12
    assert "wrote 142 train and 8 val samples" in capsys.readouterr().out
