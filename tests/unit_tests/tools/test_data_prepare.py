"""`megatron-mimo data prepare`: what it writes of each kind of source, and what it refuses."""

import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.webdataset import read_shard, write_shard
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.data.samples.sample import EncodedSample
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import ImageInput
from megatron_mimo.tools.data import sources
from megatron_mimo.tools.data.prepare import PrepareConfig, split_score, survey_samples
from megatron_mimo.tools.data.sources import Found, Problem, read_array, read_folder, stored_key


def picture(kind: str = "PNG", size: tuple[int, int] = (24, 16), shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 40, 200)).save(buffer, kind)
    return buffer.getvalue()


def prepare(*argv: object) -> int:
    return main(["data", "prepare", *map(str, argv)])


def stored(out: Path, split: str | None = None) -> dict[str, dict[str, bytes]]:
    """All samples of a dataset, or of a split."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(out.glob(f"{split or '*'}/*.tar")):
        for key, parts in read_shard(shard).items():
            assert key not in samples
            samples[key] = parts
    return samples


def read_back(out: Path, split: str) -> dict[str, EncodedSample]:
    """What training reads of a split, through energon; all of it is good."""
    from megatron_mimo.tools.data.reading import DatasetReader

    config = DataConfig(provider="energon", path=str(out), seq_length=4096, prompt_format="plain")
    bad: list[str] = []
    reader = DatasetReader(
        config,
        split,  # type: ignore[arg-type]
        ByteTokenizer(),
        lambda seen: bad.append(seen.reason) if seen.sample is None else None,
    )
    documents = [document for sequence in reader.sequences() for document in sequence.documents]
    assert bad == []
    return {document.key: document for document in documents}


def said(sample: EncodedSample) -> tuple[str, str]:
    """The text that is read and the text that is learnt."""
    tokens, targets = sample.tokens.tolist(), sample.targets.tolist()
    return tuple(  # type: ignore[return-value]
        ByteTokenizer().decode(
            [t for t, learnt in zip(tokens, targets, strict=True) if learnt is x]
        )
        for x in (False, True)
    )


def write_lines(path: Path, items: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Ten pictures, 0.png to 9.png."""
    folder = tmp_path / "media"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.png").write_bytes(picture(shade=i))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images with captions: 12 at the top, 3 deeper."""
    folder = tmp_path / "photos"
    (folder / "more.of them").mkdir(parents=True)
    for i in range(12):
        (folder / f"cat{i}.jpg").write_bytes(picture("JPEG", shade=i))
        (folder / f"cat{i}.txt").write_text(f"Cat {i}.", encoding="utf-8")
    for i in range(3):
        (folder / "more.of them" / f"dög.{i}.PNG").write_bytes(picture(shade=i))
        text = {"question": "<image>What?", "answer": f"Dog {i}."}
        (folder / "more.of them" / f"dög.{i}.json").write_text(json.dumps(text), encoding="utf-8")
    (folder / "README.md").write_text("not a sample")
    (folder / ".hidden.jpg").write_bytes(b"")
    return folder


# -- sources ---------------------------------------------------------------------------------------


def test_folder_of_images_with_captions(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(photos, "--out", out, "--val-fraction", 0.2) == 0
    samples = stored(out)
    assert samples["cat3"] == {
        "txt": b"Cat 3.",
        "jpg": (photos / "cat3.jpg").read_bytes(),
    }
    deep = "more%2Eof them/dög%2E1"
    assert samples[deep]["png"] == (photos / "more.of them" / "dög.1.PNG").read_bytes()
    assert len(samples) == 15
    train, val = read_back(out, "train"), read_back(out, "val")
    assert len(train) + len(val) == 15
    assert not train.keys() & val.keys()
    everything = train | val
    assert said(everything["cat3"]) == ("\n", "Cat 3.")
    assert said(everything[deep]) == ("What?\n", "Dog 1.")
    assert all(len(sample.items["encoder"]) == 1 for sample in everything.values())
    printed = capsys.readouterr().out
    assert f"wrote {len(train)} train and {len(val)} val samples in 2 shards" in printed
    assert f"megatron-mimo data inspect {out}" in printed
    assert "megatron-mimo train --nproc 2" in printed


def test_order_is_natural_and_folders_follow_files(photos: Path) -> None:
    where = [sample.where for sample in read_folder(photos, PrepareConfig().inputs)]
    assert where[:12] == [f"cat{i}.jpg" for i in range(12)]
    assert where[12:] == [f"more.of them/dög.{i}.PNG" for i in range(3)]


def test_a_link_to_a_folder_above_is_not_followed_round(photos: Path) -> None:
    (photos / "more.of them" / "up").symlink_to(photos)
    assert len(list(read_folder(photos, PrepareConfig().inputs))) == 15


FORMS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "question": ({"image": "1.png", "question": "<image>Q?", "answer": "A"}, ("Q?\n", "A")),
    "conversations": (
        {
            "images": ["1.png", "2.png"],
            "conversations": [
                {"from": "human", "value": "<image>One<image>two"},
                {"from": "gpt", "value": "B"},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "C"},
            ],
        },
        ("Onetwo\nAnd?\n", "BC"),
    ),
    "messages": (
        {
            "images": ["3.png"],
            "messages": [
                {"role": "system", "content": "S"},
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "What?"}],
                },
                {"role": "assistant", "content": "D"},
            ],
        },
        ("S\nWhat?\n", "D"),
    ),
    "caption": ({"image": "4.png", "caption": "E"}, ("\n", "E")),
    "interleaved": ({"images": ["5.png", "6.png"], "text": "F<image>G<image>H"}, ("F", "GH")),
    "text": ({"text": "Plain text."}, ("P", "lain text.")),
}


def check_forms(out: Path, name: str) -> None:
    everything = read_back(out, "train") | read_back(out, "val")
    assert len(everything) == len(FORMS)
    for number, (form, (item, texts)) in enumerate(FORMS.items(), 1):
        sample = everything[f"{name}-{number:08d}"]
        assert said(sample) == texts, form
        images = item.get("images", [item["image"]] if "image" in item else [])
        assert len(sample.items.get("encoder", ())) == len(images), form
        parts = stored(out)[sample.key]
        assert json.loads(parts.pop("json")) == item
        contents = [parts[name] for name in sorted(parts)]
        assert contents == [(out.parent / "media" / path).read_bytes() for path in images]


@pytest.mark.parametrize("flags", [(), ("--workers", "2", "--shard-size", "2")])
def test_every_form_of_a_jsonl_file(media: Path, flags: tuple[str, ...]) -> None:
    source = media / "talk.jsonl"
    lines = [json.dumps(item) for item, _ in FORMS.values()]
    # A byte-order mark and a last line without an end are found in the wild.
    source.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    out = media.parent / "out"
    assert prepare(source, "--out", out, "--val-fraction", 0.3, *flags) == 0
    check_forms(out, "talk")


def test_every_form_of_a_json_array(media: Path) -> None:
    items = [item for item, _ in FORMS.values()]
    source = media.parent / "llava.json"
    source.write_text(json.dumps(items, indent=1), encoding="utf-8")
    out = media.parent / "out"
    assert prepare(source, "--out", out, "--image-root", media, "--val-fraction", 0.3) == 0
    check_forms(out, "llava")


def test_absolute_paths_and_files_named_without_their_kind(media: Path, tmp_path: Path) -> None:
    (media / "blob").write_bytes(picture("WEBP"))
    source = write_lines(
        tmp_path / "a.jsonl",
        [{"image": str(media / "blob"), "caption": "A"}, {"image": "media/1.png", "caption": "B"}],
    )
    assert prepare(source, "--out", tmp_path / "out", "--media-root", media) == 0
    assert stored(tmp_path / "out")["a-00000001"].keys() == {"json", "webp"}
    assert len(read_back(tmp_path / "out", "train") | read_back(tmp_path / "out", "val")) == 2


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_are_read_piece_by_piece(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    items = [{"text": f'{i} "é]}}, \\ {{[' * i} for i in range(1, 30)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding="utf-8")
    found = list(read_array(path, MediaFolder(tmp_path), {"encoder": ImageInput()}))
    assert [json.loads(sample.text) for sample in found if isinstance(sample, Found)] == items


@pytest.mark.parametrize(
    ("text", "good", "problem"),
    [
        ("[]", 0, None),
        ('[{"text": "a"}]', 1, None),
        ('[{"text": "a"}, {"text": "b"', 1, "item 2"),
        ('[{"text": "a"} {"text": "b"}]', 1, "item 2"),
        ('[{"text": "a"}, nope]', 1, "item 2"),
        ('"text"', 0, "item 1"),
        ("", 0, "item 1"),
    ],
)
def test_arrays_that_are_cut_or_broken(
    text: str, good: int, problem: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = list(read_array(path, MediaFolder(tmp_path), {"encoder": ImageInput()}))
    assert sum(isinstance(sample, Found) for sample in found) == good
    problems = [sample for sample in found if isinstance(sample, Problem)]
    assert [p.where for p in problems] == ([f"a.json {problem}"] if problem else [])
    assert all("malformed JSON" in p.reason for p in problems)


# -- shards ----------------------------------------------------------------------------------------


def write_shards(folder: Path, names: Sequence[str], **more: Mapping[str, bytes]) -> Path:
    """Shards of three samples each; `more` goes into the first."""
    for number, name in enumerate(names):
        samples: dict[str, Mapping[str, bytes]] = {
            f"s{number}-{i}": {"txt": b"Caption.", "png": picture(shade=i)} for i in range(3)
        }
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(folder / name, [*samples.items(), *(more.items() if not number else ())])
    return folder


def test_shards_are_indexed_where_they_are(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "shards", [f"part-{i}.tar" for i in range(4)])
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in source.iterdir()}
    assert prepare(source) == 0
    after = {p.name: (p.stat().st_ino, p.read_bytes()) for p in source.glob("*.tar")}
    assert after == before
    assert {path.name for path in source.iterdir() if path.suffix != ".idx"} == {
        ".nv-meta",
        *before,
    }
    train, val = read_back(source, "train"), read_back(source, "val")
    assert (len(train), len(val)) == (9, 3)
    assert len(train | val) == 12


def test_shards_are_linked_into_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["train/a.tar", "train/b.tar", "val/c.tar"]
    source, out = write_shards(tmp_path / "shards", names), tmp_path / "out"
    assert prepare(source, "--out", out) == 0
    assert "indexed 6 train samples in 2 shards and 3 val samples in 1 shards" in (
        capsys.readouterr().out
    )
    assert all((out / name).is_symlink() for name in names)
    assert sorted(p.name for p in source.rglob("*.idx")) == []
    assert set(read_back(out, "train")) == {f"s{n}-{i}" for n in (0, 1) for i in range(3)}
    assert set(read_back(out, "val")) == {f"s2-{i}" for i in range(3)}


def test_bad_samples_of_shards_are_left_out_of_the_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_shards(
        tmp_path / "shards",
        ["a.tar", "b.tar"],
        broken={"png": picture()[:30], "txt": b"cut"},
        captionless={"png": picture()},
    )
    (source / "empty.tar").write_bytes(b"")
    (source / "cut.tar").write_bytes((source / "b.tar").read_bytes()[:1540])
    out = tmp_path / "out"
    assert prepare(source, "--out", out) == 2
    err = capsys.readouterr().err
    assert "a.tar broken: image of 30 bytes" in err
    assert "4 of 10 samples are bad" in err
    assert "a.tar captionless: has the files png: expected json or txt" in err
    assert "empty.tar: cannot be read" in err
    assert "cut.tar: cannot be read" in err
    assert not out.exists()
    assert prepare(source, "--out", out, "--skip-bad") == 0
    assert "left out 4 bad samples" in capsys.readouterr().out
    assert set(read_back(out, "train") | read_back(out, "val")) == {
        f"s{n}-{i}" for n in (0, 1) for i in range(3)
    }


def test_shards_with_double_keys_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    for name in ("a.tar", "b.tar"):
        write_shard(source / name, [("same", {"json": b'{"text": "ab"}'})])
    assert prepare(source) == 2
    err = capsys.readouterr().err
    assert f"{source}: samples share the key 'same', one in a.tar and one in b.tar" in err
    assert sorted(path.name for path in source.iterdir()) == ["a.tar", "b.tar"]


def test_shards_beside_the_folders_of_splits_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_shards(tmp_path / "shards", ["train/a.tar", "b.tar"])
    assert prepare(source) == 2
    assert "has shards in train/ or val/, and b.tar beside them" in capsys.readouterr().err


# -- bad input -------------------------------------------------------------------------------------

BAD_LINES: dict[str, tuple[str, str]] = {
    "missing image": ('{"image": "gone.png", "caption": "A"}', "its image gone.png is not in"),
    "folder for an image": ('{"image": "folder", "caption": "A"}', "folder is a folder"),
    "empty image": ('{"image": "empty.png", "caption": "A"}', "empty.png is empty"),
    "cut image": ('{"image": "cut.png", "caption": "A"}', "cut.png is broken: image of 40 bytes"),
    "no image file": ('{"image": "notes", "caption": "A"}', "notes is of an unknown kind"),
    "malformed": ('{"text": ', "json is malformed"),
    "not an object": ("[1, 2]", "a json with list: expected an object"),
    "unknown form": ('{"prompt": "A"}', "has a json with prompt: expected exactly one of"),
    "two forms": ('{"text": "A", "caption": "B"}', "has a json with caption and text"),
    "unknown role": (
        '{"conversations": [{"from": "bot", "value": "A"}]}',
        "conversations[0].from is 'bot': expected one of",
    ),
    "no answer": ('{"question": "A", "answer": ""}', "answer"),
    "caption alone": ('{"caption": "A"}', "has a caption and no image"),
    "placeholders": (
        '{"images": ["1.png", "2.png"], "text": "A <image>"}',
        "1 <image> placeholders and 2 images",
    ),
    "no UTF-8": ("\udce9", "json is malformed"),
}


@pytest.fixture
def bad(media: Path) -> Path:
    """A JSONL file with a good line in front of, between and behind all bad ones."""
    (media / "folder").mkdir()
    (media / "empty.png").write_bytes(b"")
    (media / "cut.png").write_bytes(picture()[:40])
    (media / "notes").write_text("no image")
    good = json.dumps({"image": "1.png", "caption": "Fine."})
    lines = [good, *(line for text, _ in BAD_LINES.values() for line in (text, good))]
    source = media / "bad.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    return source


def test_all_bad_lines_are_named_at_once(
    bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(bad, "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].endswith(
        f"bad.jsonl: {len(BAD_LINES)} of {2 * len(BAD_LINES) + 1} samples are bad; "
        f"nothing was written"
    )
    for number, (name, (_, message)) in enumerate(BAD_LINES.items()):
        where = f"  bad.jsonl:{2 * number + 2}: "
        assert lines[number + 1].startswith(where), name
        assert message in lines[number + 1], name
    assert lines[-1] == "correct them, or pass --skip-bad to leave them out"
    assert not (tmp_path / "out").exists()


def test_images_of_another_folder_are_a_flag_and_not_bad_samples(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"image": f"{number}.png", "caption": "Fine."} for number in (1, 2, 3)]
    (tmp_path / "texts").mkdir()
    source = write_lines(tmp_path / "texts/llava.jsonl", lines)
    for flags in ((), ("--skip-bad",)):
        assert prepare(source, "--out", tmp_path / "out", *flags) == 2
        assert (
            f"\n3 of them name files that are not in {source.parent}: pass --image-root with the "
            f"folder that their paths begin in\n"
        ) in capsys.readouterr().err
    assert prepare(source, "--out", tmp_path / "out", "--image-root", media) == 0


def test_bad_lines_are_left_out_on_request(
    bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(bad, "--out", tmp_path / "out", "--skip-bad") == 0
    assert f"left out {len(BAD_LINES)} bad samples" in capsys.readouterr().out
    good = {f"bad-{2 * i + 1:08d}" for i in range(len(BAD_LINES) + 1)}
    assert set(stored(tmp_path / "out")) == good


def test_only_the_first_twenty_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"no": i} for i in range(50)])
    assert prepare(source, "--out", tmp_path / "out", "--skip-bad") == 2
    err = capsys.readouterr().err
    assert "50 of 50 samples are bad" in err
    assert err.count("\n  a.jsonl:") == 20
    assert "and 30 more" in err


def test_bad_pairs_of_a_folder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat3.txt").unlink()
    (photos / "cat4.jpg").unlink()
    (photos / "cat5.png").write_bytes(picture())
    (photos / "cat6.json").write_text('{"caption": "A"}')
    (photos / "cat7.txt").write_bytes(b"\xff\xfe")
    (photos / "cat8.txt").write_text("  \n")
    out = photos.parent / "out"
    assert prepare(photos, "--out", out) == 2
    err = capsys.readouterr().err
    assert "6 of 15 samples are bad" in err
    assert "cat3.jpg: no caption: expected cat3.txt or cat3.json" in err
    assert "cat4.txt: no image beside it" in err
    assert "cat5.jpg, cat5.png, cat5.txt share a name" in err
    assert "cat6.jpg, cat6.json, cat6.txt share a name" in err
    assert "cat7.jpg: its txt is not UTF-8" in err
    assert "cat8.jpg: it has" in err
    assert prepare(photos, "--out", out, "--skip-bad") == 0
    assert len(stored(out)) == 9


def write_nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def write_object(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.json").write_text('\n {"text": "ab"}')
    return folder / "a.json"


def write_other(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.csv").write_text("image,caption")
    return folder / "a.csv"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone", "does not exist: expected a folder of images"),
        (write_nothing, "holds no samples: expected images with captions"),
        (write_object, "holds one object: expected an array"),
        (write_other, "is of an unknown kind: expected a folder of images"),
    ],
)
def test_sources_of_no_use(
    make: Callable[[Path], Path], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(make(tmp_path / "source"), "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--out is missing"),
        (("--out", "{photos}"), "exists: name another folder"),
        (("--out", "{photos}/out"), "name a folder beside it"),
        (("--out", "{new}", "--val-fraction", "1"), "--val-fraction is 1: expected 0 or more"),
        (("--out", "{new}", "--shard-size", "0"), "--shard-size is 0: expected 1 to"),
        (("--out", "{new}", "--workers", "0"), "--workers is 0: expected 1 to"),
        (("--out", "{new}", "--image-root", "x"), "--image-root is for files with paths of images"),
        (("--out", "{new}", "extra"), "expected one SOURCE, got 2"),
        (("--skip",), "unknown flag --skip: the nearest is --skip-bad"),
    ],
)
def test_wrong_flags(
    flags: tuple[str, ...], message: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = photos.parent / "new"
    assert prepare(photos, *(flag.format(photos=photos, new=new) for flag in flags)) == 2
    assert message in capsys.readouterr().err
    assert not new.exists()


# -- splits, shards and bytes ----------------------------------------------------------------------


def files_of(out: Path) -> dict[str, bytes]:
    """Everything but energon's database and the number that it draws at random."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("index.uuid", "index.sqlite")
    }


def test_the_same_source_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--shard-size", 4, "--workers", workers)
        assert prepare(photos, "--out", tmp_path / name, *flags) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_shards_are_bounded_by_samples_and_by_bytes(media: Path, tmp_path: Path) -> None:
    items = [{"text": f"{i:0>300}"} for i in range(10)] + [{"text": "x" * 5000}, {"text": "end"}]
    source = write_lines(tmp_path / "a.jsonl", items)

    def sizes(out: Path, *flags: object) -> list[int]:
        assert prepare(source, "--out", out, "--val-fraction", 0, *flags) == 0
        return [len(read_shard(shard)) for shard in sorted((out / "train").glob("*.tar"))]

    assert sizes(tmp_path / "a", "--shard-size", 5) == [5, 5, 2]
    # Each text is 312 bytes in its JSON; the long one stands alone.
    assert sizes(tmp_path / "b", "--shard-bytes", 312 * 4) == [4, 4, 2, 1, 1]
    split = yaml.safe_load((tmp_path / "a" / ".nv-meta" / "split.yaml").read_text())
    assert split["split_parts"]["val"] == []


def texts(number: int) -> list[Found]:
    return [
        Found(
            where=f"a:{i}",
            key=f"a-{i}",
            identity=f"text {i}",
            text=json.dumps({"text": f"text {i}"}).encode(),
            ending="json",
            items={},
            files=MediaFolder("."),
        )
        for i in range(number)
    ]


def test_the_split_of_a_sample_stays_when_others_come() -> None:
    config = PrepareConfig(val_fraction=0.1)
    samples = texts(600)
    few = survey_samples(samples[103:400], config).verdicts
    many = survey_samples(samples, config).verdicts
    assert few == many[103:400]
    assert 30 <= many.count(2) <= 90


def test_samples_of_one_image_are_in_one_split(media: Path, tmp_path: Path) -> None:
    items = [
        {"image": f"{i % 10}.png", "question": f"<image>Q{i}?", "answer": "A"} for i in range(60)
    ]
    assert prepare(write_lines(media / "a.jsonl", items), "--out", tmp_path / "o", *VAL) == 0
    images = {
        split: {parts["png"] for parts in stored(tmp_path / "o", split).values()}
        for split in ("train", "val")
    }
    assert len(images["train"] | images["val"]) == 10
    assert not images["train"] & images["val"]


VAL = ("--val-fraction", "0.4")


@pytest.mark.parametrize(
    ("number", "fraction", "num_val"),
    [(1, 0.5, None), (2, 1e-9, 1), (2, 0.999999, 1), (5, 1e-9, 1), (5, 0.0, 0)],
)
def test_neither_split_is_empty_where_there_are_two(
    number: int, fraction: float, num_val: int | None
) -> None:
    verdicts = survey_samples(texts(number), PrepareConfig(val_fraction=fraction)).verdicts
    assert verdicts.count(0) == 0
    if num_val is not None:
        assert verdicts.count(2) == num_val


@given(st.text())
def test_scores_are_spread_over_the_unit_interval(text: str) -> None:
    assert 0 <= split_score(text) < 1
    assert split_score(text) == split_score(text)


NAMES = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1
).filter(lambda name: all(part not in ("", ".", "..") for part in name.split("/")))


@given(st.lists(NAMES, min_size=2, max_size=2, unique=True))
@example(["__meta__", "__meta__/a"])
@example(["long" * 40 + "a", "long" * 40 + "b"])
@example(["é" * 60 + "a", "é" * 60 + "b"])
@example(["d/" * 200 + "a", "d/" * 200 + "b"])
@example(["a.b", "a%2Eb"])
def test_keys_differ_when_names_do_and_survive_a_tar_file(names: list[str]) -> None:
    keys = [stored_key(name) for name in names]
    assert keys[0] != keys[1]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            tar.addfile(tarfile.TarInfo(f"{key}.1.jpeg"))
    buffer.seek(0)
    from megatron_mimo.data.reading.webdataset import group_members

    with tarfile.open(fileobj=buffer) as tar:
        assert [(key, [*parts]) for key, parts in group_members(tar)] == [
            (key, ["1.jpeg"]) for key in keys
        ]


def test_our_reading_of_names_is_energons() -> None:
    from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

    from megatron_mimo.data.reading import webdataset

    assert split_name_re.pattern == webdataset._NAME.pattern
    assert skip_meta_re.pattern == webdataset._META.pattern


# -- nothing half-written --------------------------------------------------------------------------


def test_a_failure_while_writing_leaves_nothing(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_mimo.tools.data.prepare.prepare", full)
    before = sorted(tmp_path.iterdir())
    assert prepare(photos, "--out", tmp_path / "out") == 1
    assert "was not written: No space left" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_source_that_changes_is_noticed(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(media / "a.jsonl", [{"text": "ab"}, {"text": "cd"}])

    def survey(samples: Any, config: PrepareConfig) -> Any:
        found = survey_samples(samples, config)
        write_lines(source, [{"text": "ab"}])
        return found

    monkeypatch.setattr("megatron_mimo.tools.data.prepare.survey_samples", survey)
    assert prepare(source, "--out", tmp_path / "out") == 2
    assert "had 2 samples and now has 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_terminated_run_leaves_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "deep" / "out"
    program = (
        "import sys, time; from megatron_mimo.tools.data import prepare as p; "
        "p.prepare = lambda *a, **k: (print('writing', flush=True), time.sleep(60)); "
        "from megatron_mimo.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    write_lines(source, [{"text": "ab"}, {"text": "cd"}])
    argv = [sys.executable, "-c", program, "data", "prepare", str(source), "--out", str(out)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert [path.name for path in out.parent.iterdir()] == [f".out.partial-{process.pid}"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert list(out.parent.iterdir()) == []
