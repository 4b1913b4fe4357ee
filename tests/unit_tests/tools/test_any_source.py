"""`data prepare` on anything that a name can lead to: taken, or named with the reason."""

import io
import json
import os
import random
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.data.inputs import ENCODER
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.media.images import ImageInput
from megatron_mimo.tools.data.prepare import PrepareConfig, survey_samples
from megatron_mimo.tools.data.shards import survey_shards
from megatron_mimo.tools.data.sources import kind_of, read_array, read_folder, read_lines
from tests.properties import examples

INPUTS = {ENCODER: ImageInput()}


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 40, 200)).save(buffer, kind)
    return buffer.getvalue()


def tar_of(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["data", "prepare", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


# -- shards ----------------------------------------------------------------------------------------


def test_shards_out_of_order_are_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [(f"{key}.png", picture()) for key in "ab"]
    texts = [(f"{key}.txt", b"A card.") for key in "ab"]
    (tmp_path / "0.tar").write_bytes(tar_of(*images, *texts))
    err = refused(capsys, tmp_path)
    assert (
        "usable shard: 0.tar: is not in order: the files of sample 'a' do not follow each other"
        in err
    )
    assert "pack it again with tar --sort=name" in err


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "deep/0.tar.zst", "0.TAR"])
def test_archives_that_readers_cannot_open_are_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(tar_of(("a.json", b'{"text": "ab"}')))
    err = refused(capsys, tmp_path)
    assert name in err
    assert ("rename it to end in .tar" if "TAR" in name else "uncompress it") in err


def test_keys_with_dots_are_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [(f"cat.v{n}.{ending}", data) for n in (1, 2) for ending, data in FILES.items()]
    (tmp_path / "0.tar").write_bytes(tar_of(*files))
    err = refused(capsys, tmp_path)
    assert "a key ends at its first dot: rename files without further dots" in err


FILES = {"png": picture(), "json": b'{"caption": "A card."}'}


def test_img2dataset_shards_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = json.dumps({"url": "http://x/a.jpg", "caption": "A card.", "key": "0"}).encode()
    files = [
        (f"{n:09d}.{ending}", data)
        for n in range(3)
        for ending, data in (("jpg", picture("JPEG")), ("json", known), ("txt", b"A card."))
    ]
    (tmp_path / "00000.tar").write_bytes(tar_of(*files))
    (tmp_path / "00000_stats.json").write_text("{}")
    assert main(["data", "prepare", str(tmp_path), "--val-fraction", "0"]) == 0
    assert "indexed 3 train samples" in capsys.readouterr().out


def test_paths_in_linked_shards_begin_where_training_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    (source / "a.png").write_bytes(picture())
    text = b'{"image": "a.png", "caption": "A card."}'
    (source / "0.tar").write_bytes(tar_of(("a.json", text)))
    out = tmp_path / "out"
    assert f"its image a.png is not in {out}" in refused(capsys, source, "--out", out)
    assert main(["data", "prepare", str(source)]) == 0


# -- files -----------------------------------------------------------------------------------------


def test_endings_in_capitals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.JSON").write_text('[{"text": "ab"}]')
    assert main(["data", "prepare", str(tmp_path / "a.JSON"), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "b.JSON").write_text('{"text": "ab"}')
    assert main(["data", "prepare", str(tmp_path / "b.JSON"), "--out", str(tmp_path / "o")]) == 2
    assert "holds one object" in capsys.readouterr().err


def test_pipes_devices_and_links_that_lead_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, beside = tmp_path / "photos", tmp_path / "beside"
    source.mkdir()
    beside.mkdir()
    (beside / "x.png").write_bytes(picture())
    for name in ("good", "pipe", "device", "link", "piped"):
        (source / f"{name}.txt").write_text("A card.")
    (source / "good.png").write_bytes(picture())
    os.mkfifo(source / "pipe.png")
    (source / "device.png").symlink_to("/dev/zero")
    (source / "link.png").symlink_to(beside / "x.png")
    (source / "piped.txt").unlink()
    os.mkfifo(source / "piped.txt")
    (source / "piped.png").write_bytes(picture())
    err = refused(capsys, source, "--out", tmp_path / "out")
    assert "4 of 5 samples are bad" in err
    assert "pipe.png: its image pipe.png is a pipe, not a file" in err
    assert "device.png: its image device.png is outside of" in err
    assert f"link.png: its image link.png is outside of {source}" in err
    assert f"--media-root {beside} allows others" in err
    assert "piped.png: its caption piped.txt is a pipe, not a file" in err
    flags = ("--skip-bad", "--media-root", str(beside), "--val-fraction", "0")
    assert main(["data", "prepare", str(source), "--out", str(tmp_path / "out"), *flags]) == 0
    assert "wrote 2 train" in capsys.readouterr().out


def test_links_that_lead_round_or_nowhere_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for name, target in (("round.png", "round.png"), ("gone.png", "nothing")):
        (source / name).symlink_to(target)
        (source / name).with_suffix(".txt").write_text("A card.")
    (source / "out").symlink_to("/")
    err = refused(capsys, source, "--out", tmp_path / "out")
    assert "round.png: its image round.png is not a path: Too many levels of symbolic links" in err
    assert f"gone.png: its image gone.png is not in {source}" in err
    assert f"out: its folder out is outside of {source}" in err


def test_sources_that_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source in (tmp_path / "pipe.jsonl", "/dev/zero", tmp_path / ("x" * 300), "a\0.jsonl"):
        err = refused(capsys, source, "--out", tmp_path / "out")
        assert len(err.splitlines()) == 1
        assert "expected a folder of images" in err


# -- anything --------------------------------------------------------------------------------------

NAMES = ("a", "b", "a.b", ".hidden", "é", "x" * 90, "__meta__", "{1..3}", "a\nb", "caf\udce9")
ENDINGS = ("png", "PNG", "jpg", "txt", "TXT", "json", "JSON", "tar", "md", "gif", "")
CONTENTS = (
    b"", b"A caption.", b"\xff\xfe", b"\0" * 700, b'{"caption": "A card."}', b'{"text": "ab"}',
    b'{"image": "/etc/passwd", "text": "<image>"}', b"[" * 5000, b'{"caption": "\\ud83d"}',
    picture(), picture()[:40], picture("JPEG"), picture("GIF"), b"\x89PNG\r\n\x1a\n",
)  # fmt: skip


def fill(folder: Path, rng: random.Random) -> None:
    """A few files of any name, kind and contents."""
    folders = [folder]
    for _ in range(rng.randrange(1, 9)):
        ending = rng.choice(ENDINGS)
        path = rng.choice(folders) / (rng.choice(NAMES) + (f".{ending}" if ending else ""))
        if os.path.lexists(path):
            continue
        match rng.randrange(12):
            case 0:
                os.mkfifo(path)
            case 1:
                path.symlink_to(rng.choice(("/dev/zero", "/etc", "a.png", "..", "loop", "/")))
            case 2:
                path.mkdir()
                folders.append(path)
            case _:
                path.write_bytes(rng.choice(CONTENTS))


@examples(100)
@given(st.integers(0, 2**63).map(random.Random))
def test_every_file_of_a_folder_is_taken_or_named(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fill(folder, rng)
        found = list(read_folder(folder, PrepareConfig().inputs))
        survey = survey_samples(found, PrepareConfig())
        assert len(survey.verdicts) == len(found)
        assert survey.num_bad == len(survey.problems) or survey.num_bad > 20
        for sample in survey.problems:
            assert sample.reason
            assert len(sample.line.splitlines()) == 1
            assert len(sample.reason) < 1000


LINES = (
    b'{"text": "ab"}', b'{"image": "a.png", "caption": "x"}',
    b'{"image": ["a.png"], "text": "<image>"}',
    b'{"images": null, "text": "a"}', b'{"image": "../x.png", "caption": "x"}', b"null", b"[]",
    b'{"image": "' + b"A" * 9000 + b'", "caption": "x"}', b'{"image": "a\\u0000", "caption": "x"}',
    b'{"image": {"bytes": "x"}, "caption": "x"}',
    b'{"messages": [{"role": "user", "content": [3]}]}',
    b'{"messages": {"role": "user"}}', b'{"conversations": [null]}', b'{"text": "\\ud83d"}', b"{",
    b'{"image": "http://x/a.png", "caption": "x"}', b'{"question": "a", "answer": null}', b"\xff",
    b'{"image": "\\ud83d.png", "caption": "x"}', b"NaN", b'{"text": NaN}', b"1" * 6000, b"[" * 9999,
)  # fmt: skip


@examples(100)
@given(st.integers(0, 2**63).map(random.Random))
def test_every_line_is_taken_or_named(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "a.png").write_bytes(picture())
        lines = [bytearray(rng.choice(LINES)) for _ in range(rng.randrange(1, 6))]
        for line in lines:
            if rng.random() < 0.3:
                at = rng.randrange(len(line))
                line[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        media = MediaFolder(folder)
        for name, joined in (
            ("a.jsonl", b"\n".join(lines)),
            ("a.json", b"[%s]" % b",".join(lines)),
        ):
            (folder / name).write_bytes(joined)
            read = read_lines if name == "a.jsonl" else read_array
            try:
                kind_of(folder / name)
            except ValueError:
                continue
            survey = survey_samples(read(folder / name, media, INPUTS), PrepareConfig())
            assert all(problem.where.startswith(name) for problem in survey.problems)


@examples(100)
@given(st.integers(0, 2**63).map(random.Random))
def test_every_shard_is_taken_or_named(rng: random.Random) -> None:
    files = [
        (f"{rng.choice(NAMES[:5])}.{rng.choice(ENDINGS)}", rng.choice(CONTENTS))
        for _ in range(rng.randrange(1, 6))
    ]
    data = bytearray(tar_of(*files))
    for _ in range(rng.randrange(3)):
        at = rng.randrange(min(len(data), 3000))
        data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "0.tar").write_bytes(data)
        try:
            survey = survey_shards(folder, INPUTS, MediaFolder(folder), most=20)
        except ValueError as error:
            assert "holds no usable shard" in str(error)
        else:
            assert survey.num_samples == survey.num_bad + sum(survey.shards.values())
