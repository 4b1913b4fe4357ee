"""`data prepare` of local datasets of Hugging Face's, written by `datasets` and by pyarrow."""

import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import ENCODER
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.data.samples.sample import EncodedSample, RawSample, try_encode
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import ImageInput, decode_image
from megatron_mimo.tools.data import table_files
from megatron_mimo.tools.data.columns import Column, find_roles, to_sample
from megatron_mimo.tools.data.hub_folder import splits_of
from megatron_mimo.tools.data.prepare import PrepareConfig, survey_samples
from megatron_mimo.tools.data.sources import Found, Problem
from megatron_mimo.tools.data.tables import TableFlags, TableSource
from megatron_mimo.tools.evaluate.dataset import Asked, ask
from tests import lmms
from tests.properties import examples

HERE = Path(__file__).parent
INPUTS = {ENCODER: ImageInput()}


def prepare(*argv: object) -> int:
    return main(["data", "prepare", *map(str, argv)])


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a refusal."""
    assert prepare(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def stored(out: Path, split: str = "train") -> list[tuple[RawSample, Mapping[str, Any]]]:
    """The samples of a split as training parses them, and the fields of their JSON."""
    from megatron_mimo.tools.evaluate.prepared import read_prepared

    config = DataConfig(provider="energon", path=str(out), seq_length=4096, prompt_format="plain")
    found = []
    for sample in read_prepared(config, split, ByteTokenizer()):  # type: ignore[arg-type]
        assert isinstance(sample.parsed, RawSample), sample.parsed
        encoded = try_encode(sample.parsed, config, ByteTokenizer(), content=(ENCODER,))
        assert isinstance(encoded, EncodedSample) and encoded.flaw is None, encoded
        found.append((sample.parsed, sample.fields))
    return found


def told(sample: RawSample) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in sample.turns]


# -- datasets that `datasets` has written ----------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, and what `datasets` reads of them, which lies beside the environment."""
    folder = tmp_path_factory.mktemp("hub")
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "write_hub_datasets.py"), str(folder)],
        env=os.environ | home | {"PYTHONPATH": str(lmms.folder())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def asked(*texts: str) -> list[tuple[str, str]]:
    return [(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]


VOTES = ["racket", "net", "a net", "net", "net"]
# Form -> for each row its turns, and the fields of its JSON beside them.
EXPECTED: dict[str, list[tuple[list[tuple[str, str]], dict[str, Any]]]] = {
    "vqa": [
        (
            asked("<image>What is behind?", "net"),
            {"answers": VOTES, "question_type": "what is", "question_id": 262148000},
        ),
        (
            asked("<image>Is the sky blue?", "yes"),
            {"answers": ["yes"], "question_type": "is the", "question_id": 262148001},
        ),
    ],
    "textvqa": [
        (
            asked("<image>Which brand?", "nokia"),
            {"answers": ["nokia", "nokia", "toshiba"], "flickr_url": "http://x/1.jpg"},
        ),
        # Of answers that as many have given, the first.
        (asked("<image>What time?", "5:41"), {"answers": ["5:41", "5:40"]}),
    ],
    "chartqa": [
        (
            asked("<image>How many?\nCount.", "14"),
            {"answers": ["14"], "human_or_machine": "machine"},
        )
    ],
    "scienceqa": [
        (
            asked("<image>Which is north?\nA. Maine\nB. Texas", "B"),
            {"choices": ["Maine", "Texas"], "task": "closed choice", "lecture": ""},
        ),
        (
            asked("Which word?\nA. a\nB. b\nC. c", "C"),
            {"choices": ["a", "b", "c"], "task": "closed choice", "lecture": "Words."},
        ),
        (
            asked("<image>Which is hot?\nA. ice\nB. fire", "A"),
            {"choices": ["ice", "fire"], "task": "closed choice", "lecture": "Heat."},
        ),
    ],
    "letters": [
        (asked("<image>Which?\nA. red\nB. green", "B"), {"choices": ["red", "green"]}),
        (asked("<image>Which?\nA. red\nB. green", "A"), {"choices": ["red", "green"]}),
        (asked("<image>Which?\nA. 1\nB. 2", "B"), {"choices": ["1", "2"]}),
    ],
    "classes": [(asked("<image>Which?", "dog"), {"split_of_origin": 2.5})],
    "cauldron": [
        (asked("<image><image>Same?", "No."), {}),
        (asked("<image>What?", "A card.", "Which colour?", "Red."), {}),
    ],
    "fields": [(asked("<image>What?", "A.", "Why?", "B."), {})],
    "llava": [
        (asked("<image>\nWhat?", "A card.", "Why?", "So."), {"id": "a"}),
        (asked("2 + 2?", "4"), {"id": "b"}),
    ],
    "chat": [
        (asked("<image>What?", "A card."), {}),
        (asked("One <image>, two <image>?", "Yes."), {}),
    ],
    "parts": [(asked("Left: <image> right: <image>", "Yes."), {})],
}
TEXTS = {"question", "answer", "messages"}


def check(out: Path, form: str, hub: Path, name: str = "train", split: str = "train") -> None:
    """All of a form's rows are in a dataset: turns, fields, and pixels as `datasets` has them."""
    pixels = dict(np.load(hub / f"{form}.npz"))
    found = stored(out, split)
    assert [sample.key for sample, _ in found] == [f"{name}-{n:08d}" for n in range(len(found))]
    for row, ((sample, fields), (turns, others)) in enumerate(
        zip(found, EXPECTED[form], strict=True)
    ):
        assert told(sample) == turns
        assert {key: fields[key] for key in fields.keys() - TEXTS} == others
        images = [np.asarray(decode_image(image)) for image in sample.items.get(ENCODER, ())]
        order = [1, 0] if form == "parts" else range(len(images))
        for image, number in zip(images, order, strict=True):
            np.testing.assert_array_equal(image, pixels.pop(f"{row}-{number}"))
    assert not pixels


@pytest.mark.parametrize("form", EXPECTED)
def test_every_form_of_a_dataset(form: str, hub: Path, tmp_path: Path) -> None:
    assert prepare(hub / form, "--out", tmp_path / "out", "--val-fraction", 0) == 0
    check(tmp_path / "out", form, hub)


def test_what_save_to_disk_writes(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has the splits train, validation: choose one with --split" in refused(
        capsys, hub / "saved", "--out", tmp_path / "out"
    )
    splits = ("--split", "train", "--val-split", "validation")
    assert prepare(hub / "saved", "--out", tmp_path / "out", *splits) == 0
    check(tmp_path / "out", "vqa", hub)
    ((sample, _),) = stored(tmp_path / "out", "val")
    assert sample.key == "validation-00000000"
    assert told(sample) == EXPECTED["vqa"][1][0]
    # One split of it, and one file.
    one = hub / "saved/train"
    for source, out in ((one, "one"), (next(one.glob("*.arrow")), "file")):
        assert prepare(source, "--out", tmp_path / out, "--val-fraction", 0) == 0
    check(tmp_path / "one", "vqa", hub)
    check(tmp_path / "file", "vqa", hub, name="data")


def test_evaluation_sees_all_answers_and_the_choices(hub: Path, tmp_path: Path) -> None:
    from megatron_mimo.tools.evaluate.prepared import read_prepared

    found = {}
    for form in ("vqa", "scienceqa"):
        assert prepare(hub / form, "--out", tmp_path / form, "--val-fraction", 0) == 0
        config = DataConfig(provider="energon", path=str(tmp_path / form))
        samples = read_prepared(config, "train", ByteTokenizer())
        found[form] = [ask(sample, config.inputs, None) for sample in samples]
    first = found["vqa"][0]
    assert isinstance(first, Asked)
    assert list(first.expected.references) == VOTES
    assert [turn.text for turn in first.turns] == ["<image>What is behind?"]
    first = found["scienceqa"][0]
    assert isinstance(first, Asked)
    assert (first.expected.references, first.expected.choices) == (("B",), ("Maine", "Texas"))
    assert first.task == "closed choice"


def test_inspection_takes_the_result(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(hub / "cauldron", "--out", tmp_path / "out", "--val-fraction", 0) == 0
    capsys.readouterr()
    flags = ("--model-provider", "nemotron-moe-vlm-tiny", "--seq-length", "512")
    assert main(["data", "inspect", str(tmp_path / "out"), *flags]) == 0
    assert "2 samples" in capsys.readouterr().out


def test_splits_by_names_are_those_of_datasets(hub: Path) -> None:
    layouts = json.loads((hub / "layouts.json").read_text())
    for name, expected in layouts.items():
        folder = hub / "layouts" / name
        splits = splits_of(folder, None)
        found = {s: [str(path.relative_to(folder)) for path in of] for s, of in splits.items()}
        assert found == expected, name


# -- files that pyarrow has written ----------------------------------------------------------------


def picture(shade: int = 0, size: tuple[int, int] = (16, 12)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (shade, 40, 200)).save(content, "PNG")
    return content.getvalue()


def rows(number: int, **columns: Sequence[Any]) -> dict[str, Any]:
    image = [{"bytes": picture(n), "path": None} for n in range(number)]
    texts = {name: [f"{name} {n}" for n in range(number)] for name in ("question", "answer")}
    return {"image": image, **texts, **columns}


def write(path: Path, columns: Mapping[str, Any], **flags: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **flags)
    return path


def write_arrow(path: Path, columns: Mapping[str, Any]) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return path


CARD = """\
---
license: mit
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/train-*
  - split: test
    path: [easy/test-*]
- config_name: hard
  data_files: hard/*.parquet
---
# A dataset
"""


def test_the_card_names_splits_and_subsets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write(source / "easy/train-00000-of-00002.parquet", rows(2))
    write(source / "easy/train-00001-of-00002.parquet", rows(3))
    write(source / "hard/all.parquet", rows(1))
    (source / "README.md").write_text(CARD)
    assert "choose one of easy, hard with --subset" in refused(capsys, source, "--out", out)
    assert "no subset soft" in refused(capsys, source, "--out", out, "--subset", "soft")
    easy = ("--subset", "easy", "--val-fraction", 0)
    assert "has the splits train, test" in refused(capsys, source, "--out", out, *easy)
    assert "names files of the split test, and none of them is there" in refused(
        capsys, source, "--out", out, *easy, "--split", "test"
    )
    assert prepare(source, "--out", out, *easy, "--split", "train") == 0
    # Rows are counted on over the files of a split.
    found = stored(out)
    assert [sample.key for sample, _ in found] == [f"train-{n:08d}" for n in range(5)]
    assert [told(sample)[1][1] for sample, _ in found] == [f"answer {n}" for n in (0, 1, 0, 1, 2)]
    assert prepare(source, "--out", tmp_path / "hard", "--subset", "hard") == 0
    capsys.readouterr()
    (source / "easy/train-00000-of-00002.parquet").unlink()
    err = refused(capsys, source, "--out", tmp_path / "new", *easy, "--split", "train")
    assert "has 1 of 2 files of the split train: train-00000-of-00002 is missing" in err


def test_columns_of_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [{"bytes": picture(n), "path": None} for n in range(2)]
    columns = {"links": pictures, "rechts": [p["bytes"] for p in pictures], "frage": ["a", "b"]}
    source = write(tmp_path / "a.parquet", {**columns, "antwort": [["x", "y", "y"], ["z"]]})
    out = ("--out", tmp_path / "out", "--val-fraction", 0)
    err = refused(capsys, source, *out)
    assert "has no column of questions or conversations by a known name: give --question-" in err
    assert (
        "its columns are links (struct<bytes: binary, path: null>), rechts (binary), frage "
        "(string), antwort (list<element: string>)"
    ) in err
    err = refused(capsys, source, *out, "--question-column", "frage")
    assert "has no column of answers by a known name: give --answer-column" in err
    flags = [*out, "--question-column", "frage", "--answer-column", "antwort"]
    # Pictures are not left out only because of the name of their column.
    assert "has images in links: give --image-column" in refused(capsys, source, *flags)
    flags += ["--image-column", "links", "--image-column", "rechts"]
    assert "no column nichts, which" in refused(
        capsys, source, *flags, "--choices-column", "nichts"
    )
    assert "has string in frage" in refused(capsys, source, *flags, "--choices-column", "frage")
    assert prepare(source, *flags) == 0
    (first, fields), _ = stored(tmp_path / "out")
    assert told(first) == asked("<image><image>a", "y")
    assert fields["answers"] == ["x", "y", "y"]
    assert first.items[ENCODER] == (picture(0), picture(0))


def test_two_columns_that_could_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * 2
    both = write(tmp_path / "a.parquet", rows(2, query=["a", "b"]))
    out = ("--out", tmp_path / "out")
    assert "has the columns question and query: choose by" in refused(capsys, both, *out)
    both = write(tmp_path / "b.parquet", rows(2, conversations=turns))
    err = refused(capsys, both, *out)
    assert "has question and conversations: choose by --question-column or --conv" in err
    named = ("--conversation-column", "conversations", "--val-fraction", 0)
    err = refused(capsys, both, *out, *named, "--answer-column", "answer")
    assert "has whole conversations in conversations: leave out --answer-column" in err
    assert prepare(both, *out, *named) == 0
    assert [told(sample) for sample, _ in stored(tmp_path / "out")] == [asked("<image>a", "b")] * 2


def test_questions_about_one_image_are_in_one_split(tmp_path: Path) -> None:
    """The same bytes under any name, as VQA stores an image with each of its questions."""
    images = [{"bytes": picture(n % 8), "path": f"{n}.png"} for n in range(40)]
    source = write(tmp_path / "a.parquet", rows(40, image=images))
    assert prepare(source, "--out", tmp_path / "out", "--val-fraction", 0.5) == 0
    train, val = (
        {image for sample, _ in stored(tmp_path / "out", split) for image in sample.items[ENCODER]}
        for split in ("train", "val")
    )
    assert train and val and not train & val
    assert len(train | val) == 8


def test_images_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They begin beside the files, or in --image-root, and bytes win."""
    source, out = tmp_path / "source", tmp_path / "out"
    images = [{"bytes": None, "path": "p/0.png"}, {"bytes": picture(7), "path": "/home/a/b.png"}]
    write(source / "train.parquet", rows(2, image=images))
    assert prepare(source, "--out", out) == 2
    err = capsys.readouterr().err
    assert f"train row 0: its image p/0.png is not in {source}" in err
    assert f"1 of them name files that are not in {source}: pass --image-root" in err
    (tmp_path / "elsewhere/p").mkdir(parents=True)
    (tmp_path / "elsewhere/p/0.png").write_bytes(picture(3))
    flags = ("--image-root", tmp_path / "elsewhere", "--val-fraction", 0)
    assert prepare(source, "--out", out, *flags) == 0
    found = [sample.items[ENCODER] for sample, _ in stored(out)]
    assert found == [(picture(3),), (picture(7),)]
    write(source / "train.parquet", rows(1, image=["../elsewhere/p/0.png"]))
    assert prepare(source, "--out", tmp_path / "new") == 2
    assert "is outside of" in capsys.readouterr().err


NULL = {"bytes": None, "path": None}
CUT = picture(size=(160, 120))[:100]
NO_TEXT = pa.StringArray.from_buffers(1, *pa.array([b"\xff"]).buffers()[1:])
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "answer": ({"answer": [None]}, "its answer is null: expected an answer"),
    "question": ({"question": pa.array([None], "string")}, "its question is null"),
    "answers": ({"answer": pa.array([[]], pa.list_(pa.string()))}, "its answer is empty"),
    "empty": ({"answer": [" "]}, "it has an answer without text"),
    "class": ({"choices": [["a", "b"]], "answer": [2]}, "its answer is 2, which is none of its 2"),
    "hidden": ({"choices": [["a", "b"]], "answer": [-1]}, "its answer is -1, which is none"),
    "choice": ({"choices": [["B", "A"]], "answer": ["A"]}, "A, which is more than one of its 2"),
    "image": ({"image": [[NULL]]}, "its image has neither bytes nor a path"),
    "none": ({"image": [[None, {"bytes": picture(), "path": ""}]]}, "an image that is null"),
    "broken": ({"image": [{"bytes": CUT, "path": ""}]}, "image 1 is broken: image of"),
    "kind": ({"image": [{"bytes": b"GIF", "path": "a.gif"}]}, "image 1 is of an unknown kind"),
    "zero": ({"image": [{"bytes": b"", "path": "a.gif"}]}, "image 1 is empty"),
    "marks": ({"question": ["<image> and <image>?"]}, "the question has 2 <image> and 1 images"),
    "text": ({"question": NO_TEXT}, "its question cannot be read: 'utf-8' codec can't decode"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_no_use_are_named_and_counted(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns, message = ROWS[row]
    source = tmp_path / "source"
    write(source / "data/train-00000-of-00002.parquet", {**rows(1), **columns})
    write(source / "data/train-00001-of-00002.parquet", rows(1))
    assert prepare(source, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert f"{source}: 1 of 2 samples are bad; nothing was written\n  train row 0: " in err
    assert message in err
    assert prepare(source, "--out", tmp_path / "out", "--skip-bad", "--val-fraction", 0) == 0
    assert "left out 1 bad samples" in capsys.readouterr().out
    assert [sample.key for sample, _ in stored(tmp_path / "out")] == ["train-00000001"]


def encrypted(path: Path) -> None:
    from pyarrow.parquet import encryption

    class Keys(encryption.KmsClient):
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return key

        def unwrap_key(self, key: bytes, name: str) -> bytes:
            return key

    config = encryption.EncryptionConfiguration(footer_key="key", column_keys={"key": ["question"]})
    factory = encryption.CryptoFactory(lambda _: Keys())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    write(path, rows(2), encryption_properties=properties)


def compressed_in_an_unknown_way(path: Path) -> None:
    write(path, rows(2), compression="snappy")
    # In the footer, after the path of a column: a field of the kind int32, and twice its value.
    content = path.read_bytes()
    assert content.count(b"question\x15\x02") == 1
    path.write_bytes(content.replace(b"question\x15\x02", b"question\x15\x06"))


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda path: cut(write(path, rows(2))), "cannot be read: "),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read: "),
    "other": (lambda path: path.write_text("<html>" * 99), "Parquet magic bytes not found"),
    "encrypted": (encrypted, "expected a whole parquet file that is not encrypted"),
    "pointer": (pointer, "it is a pointer of Git LFS, not the file: run `git lfs pull`"),
    "rows": (lambda path: write(path, {k: v[:0] for k, v in rows(1).items()}), "holds no samples"),
    "types": (lambda path: write(path, rows(1, image=[3])), "has int64 in image: expected images"),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("kind", FILES)
def test_files_that_cannot_be_read_are_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = FILES[kind]
    (tmp_path / "source").mkdir()
    make(tmp_path / "source/train.parquet")
    err = refused(capsys, tmp_path / "source", "--out", tmp_path / "out")
    assert message in err
    assert str(tmp_path / "source") in err
    assert not (tmp_path / "out").exists()


def test_a_compression_that_pyarrow_lacks_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compressed_in_an_unknown_way(tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet", "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "a.parquet: row group 0 cannot be read: OSError: While LZO compression is" in err


def damage(path: Path, text: str) -> None:
    """Overwrite pages of the column in front of a text."""
    content = bytearray(path.read_bytes())
    at = content.index(text.encode())
    content[at - 12 : at] = b"\xff" * 12
    path.write_bytes(content)


def test_a_damaged_part_of_a_file_is_counted_and_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    file = write(source / "train.parquet", rows(6), row_group_size=2, compression="none")
    damage(file, "answer 2")
    assert prepare(source, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert f"  {file}: row group 1 cannot be read: " in err
    assert "1 of 5 samples are bad" in err
    assert prepare(source, "--out", tmp_path / "out", "--skip-bad", "--val-fraction", 0) == 0
    found = [sample.key for sample, _ in stored(tmp_path / "out")]
    assert found == [f"train-{n:08d}" for n in (0, 1, 4, 5)]


def test_arrow_files_that_are_cut_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_arrow(tmp_path / "a.arrow", rows(6))
    path.write_bytes(path.read_bytes()[:-200])
    assert prepare(path, "--out", tmp_path / "out") == 2
    assert "a.arrow: batch 2 cannot be read, and nothing after it: " in capsys.readouterr().err


def test_flags_of_tables_are_refused_for_other_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n')
    err = refused(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--split", "train")
    assert "--split is for parquet and arrow files: leave it out for" in err


def test_without_pyarrow_a_line_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.parquet", rows(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    err = refused(capsys, source, "--out", tmp_path / "out")
    assert "read by pyarrow, which is not installed: run `pip install pyarrow`" in err


def test_a_few_rows_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of a file of 24 MB a row group of 1 MB: its pages, its dictionary, and the rows of both."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 1 << 18), dtype=np.uint8)
    content = [{"bytes": row.tobytes(), "path": None} for row in noise]
    texts = {name: ["a"] * 96 for name in ("question", "answer")}
    columns = {"image": content, **texts}
    write(tmp_path / "a.parquet", columns, compression="none", row_group_size=4)
    before, most = pa.total_allocated_bytes(), 0
    source = TableSource(tmp_path / "a.parquet", TableFlags(), MediaFolder(tmp_path), INPUTS)
    for sample, expected in zip(source.read(), content, strict=True):
        assert isinstance(sample, Found) and sample.items == {"encoder": (expected["bytes"],)}
        most = max(most, pa.total_allocated_bytes() - before)
    assert 1 << 20 <= most < 4 << 20


# -- anything --------------------------------------------------------------------------------------


FILLED: tuple[dict[str, Any], ...] = (
    {"image": {"bytes": picture(), "path": "a"}, "question": "a", "answer": "b", "id": 3},
    {"image": [{"bytes": picture(), "path": "a"}], "question": "a", "answers": [{"answer": "b"}]},
    {"images": [{"bytes": picture()}], "query": "a", "answer": ["b"], "answers": {"answer": ["b"]}},
    {"question": "a", "choices": ["a", "b"], "answer": 1, "label": 2.5},
    {"question": "a", "options": ["a", "b"], "label": ["B"], "task": "c"},
    {"images": [{"path": "a.png"}], "texts": [{"user": "a", "assistant": "b"}]},
    {"image": picture(), "texts": {"user": ["a", "b"], "assistant": ["c", "d"]}},
    {"image": "a.png", "conversations": [{"from": "human", "value": "a"}]},
    {
        "images": [{"bytes": picture()}],
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0, "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "index": None, "text": "a"}]},
        ],
    },
)


def with_nulls(value: Any, rng: random.Random) -> Any:
    """The same value with some of its parts, at any depth, null or left out."""
    if rng.random() < 0.1:
        return None
    if isinstance(value, dict):
        return {key: with_nulls(part, rng) for key, part in value.items()}
    if isinstance(value, list):
        return [with_nulls(part, rng) for part in value if rng.random() < 0.9]
    return rng.choice((-1, 7)) if isinstance(value, int) and rng.random() < 0.2 else value


@examples(500)
@given(st.integers(0, 2**63).map(random.Random))
def test_nulls_anywhere_are_a_sample_or_a_reason(rng: random.Random) -> None:
    filled = rng.choice(FILLED)
    columns = [
        Column(name, table_files._form(pa.infer_type([filled[name]])), "") for name in filled
    ]
    roles = find_roles(columns, {}, "a.parquet")
    row = {name: with_nulls(value, rng) for name, value in filled.items()}
    try:
        sample = to_sample(row, roles, INPUTS)
    except (ValueError, MalformedError) as error:
        assert str(error).startswith(("its ", "has a json", "it has ", "the question has")), error
    else:
        assert all(isinstance(image, bytes | str) and image for image in sample.images)


@examples(100)
@given(st.integers(0, 2**63).map(random.Random))
def test_damaged_files_are_read_or_named(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as place:
        kind = rng.choice(("parquet", "arrow"))
        path = Path(place) / f"a.{kind}"
        columns = rows(5, choices=[["x", "answer 1"]] * 5, answers=[[{"answer": "x"}]] * 5)
        if kind == "parquet":
            write(path, columns, row_group_size=2, compression=rng.choice(("none", "snappy")))
        else:
            write_arrow(path, columns)
        content = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(content))
            content[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            source = TableSource(path, TableFlags(), MediaFolder(place), INPUTS)
            survey = survey_samples(source.read(), PrepareConfig())
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            assert path.name in str(error)
        else:
            assert all(isinstance(problem, Problem) for problem in survey.problems)
            assert all(len(problem.line.splitlines()) == 1 for problem in survey.problems)
