"""Videos and audio clips in stored samples: prepared, read through energon, and shown."""

import base64
import io
import json
import re
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.reading.task_encoder import read_sample
from megatron_mimo.data.reading.webdataset import prepare as index_shards
from megatron_mimo.data.reading.webdataset import read_shard, write_shard
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.data.samples.sample import EncodedSample, RawSample, SkippedSample, try_encode
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.audio import AudioInput
from megatron_mimo.media.images import ImageInput
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.input import VideoInput
from megatron_mimo.tools.data.figures import figures
from megatron_mimo.tools.data.inspect import describe
from megatron_mimo.tools.data.page import Shown, write_page
from megatron_mimo.tools.data.reading import DatasetReader
from megatron_mimo.tools.data.statistics import Observation, Statistics
from tests.unit_tests.media.recorded import clip, pictures, tones, video

VIDEO = VideoConfig(num_frames=3, target_patches=16, patch_dim=8)
INPUTS: Inputs = {
    ENCODER: ImageInput(),
    "video": VideoInput(config=VIDEO, tags=("", "")),
    "audio": AudioInput(tags=("", "")),
}
TOKENIZER = ByteTokenizer((ENCODER, "audio"))
RATE = 16_000
WAV = clip(tones(RATE, RATE), RATE)
FLAC = clip(tones(RATE // 2, RATE), RATE, "flac", "flac")
MP4 = video(pictures(12, 32, 32), sound=tones(48_000, 48_000))
WEBM = video(pictures(6, 48, 32), "webm", "libvpx-vp9", options={"cpu-used": "8"})


def png(width: int = 16, height: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def config_of(path: Path) -> DataConfig:
    return DataConfig(
        provider="energon",
        path=str(path),
        seq_length=4096,
        prompt_format="plain",
        inputs=INPUTS,
    )


def read(path: Path) -> tuple[Statistics, list[Shown]]:
    """Counts of a train split, and its samples with content."""
    config, statistics = config_of(path), Statistics(inputs=INPUTS)
    places: list[Observation] = []

    def observe(seen: Observation) -> None:
        statistics.add(seen)
        places.append(seen)

    reader = DatasetReader(config, "train", TOKENIZER, observe)
    shown = [
        Shown(
            documents=reader.with_content(sequence),
            stored=reader.as_stored(sequence),
            places=(places[-1],),
        )
        for sequence in reader.sequences()
    ]
    return statistics, shown


def stored(path: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(path.glob("train/*.tar")):
        found |= read_shard(shard)
    return found


def prepare(source: Path, out: Path, *flags: str) -> int:
    return main(["data", "prepare", str(source), "--out", str(out), "--val-fraction", "0", *flags])


LINES: list[dict[str, Any]] = [
    {"question": "<image>Is it heard?<audio>", "answer": "yes", "image": "a.png", "audio": "a.wav"},
    {"question": "<video> or <video>", "answer": "no", "videos": ["v.mp4", "v.webm"]},
    # As LLaVA has them.
    {"conversations": [
        {"from": "human", "value": "<video>\n<audio>"}, {"from": "gpt", "value": "it moves"},
    ], "video": "v.webm", "audio": "a.flac"},
    # As chats have them.
    {"messages": [
        {"role": "user", "content": [
            {"type": "audio", "audio": "a.flac"}, {"type": "text", "text": " and "},
            {"type": "audio", "audio": "v.mp4"}, {"type": "video", "video": "v.mp4"},
            {"type": "image", "image": "a.png"},
        ]},
        {"role": "assistant", "content": "all"},
    ]},
    {"question": "nothing", "answer": "but text"},
]  # fmt: skip
FILES = {"a.png": png(), "a.wav": WAV, "a.flac": FLAC, "v.mp4": MP4, "v.webm": WEBM}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of JSON lines with items of every kind."""
    folder = tmp_path_factory.mktemp("lines")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    assert prepare(folder / "all.jsonl", folder / "out") == 0
    return folder / "out"


def test_files_are_stored_as_they_are(dataset: Path) -> None:
    found = stored(dataset)
    assert [sorted(parts) for parts in found.values()] == [
        ["json", "png", "wav"],
        ["1.mp4", "2.webm", "json"],
        ["flac", "json", "webm"],
        # One of the clips has the ending of a video.
        ["audio.1.flac", "audio.2.mp4", "json", "mp4", "png"],
        ["json"],
    ]
    first, second, _, fourth, _ = found.values()
    assert (first["png"], first["wav"]) == (FILES["a.png"], WAV)
    assert (second["1.mp4"], second["2.webm"]) == (MP4, WEBM)
    assert (fourth["audio.1.flac"], fourth["audio.2.mp4"], fourth["mp4"]) == (FLAC, MP4, MP4)


def test_training_reads_every_kind_in_its_place(dataset: Path) -> None:
    statistics, shown = read(dataset)
    assert statistics.num_bad == 0 and not statistics.blanks
    documents = [shown_one.documents[0] for shown_one in shown]
    kinds = [
        {module: [type(item).__name__ for item in items] for module, items in each.items.items()}
        for each in documents
    ]
    assert kinds == [
        {ENCODER: ["EncodedImage"], "audio": ["EncodedClip"]},
        {ENCODER: ["EncodedVideo", "EncodedVideo"]},
        {ENCODER: ["EncodedVideo"], "audio": ["EncodedClip"]},
        {ENCODER: ["EncodedVideo", "EncodedImage"], "audio": ["EncodedClip", "EncodedClip"]},
        {},
    ]
    image, sound = (TOKENIZER.placeholder_ids[module] for module in (ENCODER, "audio"))
    heard = documents[0].tokens.tolist()
    assert heard.count(image) == 1 and heard.count(sound) == 13
    seen: Any = documents[1].items[ENCODER]
    text = TOKENIZER.decode([token for token in documents[1].tokens.tolist() if token < 256])
    labels = ["\n".join(item.labels) for item in seen]
    assert text == f"{labels[0]} or {labels[1]}\nno"
    assert documents[1].tokens.tolist().count(image) == sum(item.rows for item in seen) == 12
    # The sound track of the video has its length, and not that of the pictures.
    clips: Any = documents[3].items["audio"]
    assert [item.samples for item in clips] == [RATE // 2, pytest.approx(RATE, abs=RATE // 20)]


def test_only_headers_are_read_where_nothing_is_decoded(dataset: Path) -> None:
    _, shown = read(dataset)
    for one in shown:
        raw, config = one.stored[0], config_of(dataset)
        without = try_encode(raw, config, TOKENIZER, content=())
        heard = try_encode(raw, config, TOKENIZER, content=("audio",))
        for outcome in (without, heard):
            assert isinstance(outcome, EncodedSample)
            np.testing.assert_array_equal(outcome.tokens, one.documents[0].tokens)
        assert isinstance(without, EncodedSample) and isinstance(heard, EncodedSample)
        items: list[Any] = [item for of_module in without.items.values() for item in of_module]
        assert all(getattr(item, "features", None) is None for item in items)
        assert all(getattr(item, "patches", None) is None for item in items)
        assert all(item.features is not None for item in heard.items.get("audio", ()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("wav", WAV[: len(WAV) // 2], "broken audio"),
        ("audio.mp4", video(pictures(3, 32, 32)), "broken audio"),
        ("mp4", MP4[:2000], "broken video"),
        ("mkv", WAV, "broken video"),
        # Seconds of sound take more positions than there are.
        ("wav", clip(tones(8_000 * 400, 8_000), 8_000), "too long"),
        ("mp4", video(pictures(12, 32, 32)), "too long"),
    ],
    ids=["half a clip", "no sound track", "half a video", "no pictures", "long clip", "long video"],
)
def test_all_readers_skip_the_same_samples(
    tmp_path: Path, name: str, data: bytes, kind: str
) -> None:
    noun = "<video>" if name in ("mp4", "mkv") else "<audio>"
    text = json.dumps({"question": noun, "answer": "a"}).encode()
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train" / "0.tar", [("k", {"json": text, name: data})])
    index_shards(tmp_path, ["train/0.tar"])
    endless = VideoInput(config=VideoConfig(target_patches=4096, patch_dim=8), tags=("", ""))
    config = config_of(tmp_path)
    if kind == "too long" and name == "mp4":
        config = DataConfig(
            provider="energon", path=str(tmp_path), seq_length=4096, prompt_format="plain",
            inputs={**INPUTS, "video": endless},
        )  # fmt: skip
    seen: list[Observation] = []
    reader = DatasetReader(config, "train", TOKENIZER, seen.append)
    assert not list(reader.sequences())
    assert [one.kind for one in seen] == [kind]
    parsed = read_sample("k", "s", {"json": text, name: data}, MediaFolder(tmp_path), config.inputs)
    assert isinstance(parsed, RawSample)
    outcomes = [
        try_encode(parsed, config, TOKENIZER, content=content)
        for content in ((), (ENCODER, "audio"))
    ]
    assert outcomes[0] == outcomes[1]
    assert isinstance(outcomes[0], SkippedSample) and outcomes[0].kind == kind


def test_parts_are_of_the_kind_of_their_noun_or_ending(tmp_path: Path) -> None:
    question = "<audio><audio><audio><video><image>"
    parts: Mapping[str, bytes] = {
        "json": json.dumps({"question": question, "answer": "a"}).encode(),
        "audio.10.mp4": MP4,
        "audio.2.flac": FLAC,
        "audio.1.WAV": WAV,
        "mp4": MP4,
        "image.png": png(),
    }
    (tmp_path / "s").mkdir()
    write_shard(tmp_path / "s" / "a.tar", [("k", parts)])
    assert prepare(tmp_path / "s", tmp_path / "out") == 0
    _, shown = read(tmp_path / "out")
    assert shown[0].stored[0].items == {
        ENCODER: (parts["image.png"],),
        "video": (MP4,),
        "audio": (WAV, FLAC, MP4),
    }


def test_a_folder_pairs_files_of_any_kind_with_captions(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in {"b.wav": WAV, "c.mp4": MP4, "d.png": png(), "d.flac": FLAC}.items():
        (folder / name).write_bytes(data)
        (folder / f"{name[0]}.txt").write_text(f"caption {name[0]}")
    assert prepare(folder, tmp_path / "out") == 0
    assert [sorted(parts) for parts in stored(tmp_path / "out").values()] == [
        ["txt", "wav"], ["mp4", "txt"], ["flac", "png", "txt"],
    ]  # fmt: skip
    statistics, _ = read(tmp_path / "out")
    assert statistics.num_bad == 0


def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in {"cut.wav": WAV[:9000], "x.bin": b"?" * 99, "none.mp4": b""}.items():
        (tmp_path / name).write_bytes(data)
    lines = [
        {"question": "<audio>", "answer": "a", "audio": "cut.wav"},
        {"question": "<audio>", "answer": "a", "audio": "x.bin"},
        {"question": "<video>", "answer": "a", "video": "none.mp4"},
        {"question": "<video>", "answer": "a", "video": "lost.mp4"},
        {"question": "<audio>", "answer": "a"},
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert prepare(tmp_path / "l.jsonl", tmp_path / "out") == 2
    said = capsys.readouterr().err
    for expected in (
        "l.jsonl:1: audio cut.wav is broken: clip of 9000 bytes is truncated",
        "l.jsonl:2: audio x.bin is of an unknown kind: expected wav, flac",
        "l.jsonl:3: video none.mp4 is empty",
        "l.jsonl:4: its video lost.mp4 is not in",
        "l.jsonl:5: 1 <audio> placeholders and 0 audios",
    ):
        assert expected in said


def test_files_without_an_ending_get_that_of_their_contents(tmp_path: Path) -> None:
    for name, data in {"sound": FLAC, "moving": WEBM}.items():
        (tmp_path / name).write_bytes(data)
    line = {"question": "<audio><video>", "answer": "a", "audio": "sound", "video": "moving"}
    (tmp_path / "l.jsonl").write_text(json.dumps(line))
    assert prepare(tmp_path / "l.jsonl", tmp_path / "out") == 0
    assert [sorted(parts) for parts in stored(tmp_path / "out").values()] == [
        ["flac", "json", "mkv"]
    ]


def test_the_page_shows_frames_and_plays_clips(dataset: Path, tmp_path: Path) -> None:
    statistics, shown = read(dataset)
    config = config_of(dataset)
    page = tmp_path / "page.html"
    write_page(page, statistics, shown, config, TOKENIZER, lead="", title="all")
    html = page.read_text()
    # Two images, and three frames of each of four videos.
    frames = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="(\w+ \d)', html)
    assert [alt for _, alt in frames].count("image 1") == 2 and len(frames) == 2 + 4 * 3
    sizes = {Image.open(io.BytesIO(base64.b64decode(data))).size for data, _ in frames}
    assert sizes == {(16, 16), (32, 32), (32, 16)}
    sounds = re.findall(r'<audio controls src="data:audio/wav;base64,([^"]+)">', html)
    assert len(sounds) == html.count("<svg") == 4
    with wave.open(io.BytesIO(base64.b64decode(sounds[0]))) as reader:
        assert (reader.getframerate(), reader.getnframes()) == (RATE, RATE)
        heard = np.frombuffer(reader.readframes(RATE), "<i2") / 32767
    np.testing.assert_allclose(heard, tones(RATE, RATE)[0], atol=1e-3)
    assert "1.00 seconds at 16,000 Hz, 13 rows" in html
    assert "3 frames of 32 x 32 pixels, 4 x 4 patches, 8 rows" in html
    for span in ("video 1: 8 rows", "video 2: ", "audio 1: 13 rows", "image 1: 1 rows"):
        assert span in html
    assert not re.search(r'(src|href)="(?!data:(image/png|audio/wav);base64,)', html)
    text = "\n".join(describe(statistics, config, "train"))
    assert "rows of a video" in text and "rows of an audio" in text
    assert statistics.images.counts == {0: 3, 1: 2}


def test_commands_name_the_kinds(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model-provider", "omni-tiny", "--seq-length", "2048"]
    videos = ["--video-num-frames", "3", "--video-target-num-patches", "16"]
    flags = [*model, *videos]
    page = tmp_path / "page.html"
    assert main(["data", "inspect", str(dataset), *flags, "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "training leaves out 0 of 5 samples" in said and "rows of a video" in said
    assert page.read_text().count("<audio controls") == 4
    assert main(["data", "bench", str(dataset), *flags, "--samples", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Videos are items of the encoder too, and are not counted as images.
    assert set(found["items"]) == {"encoder", "video", "audio"}
    assert found["items"]["encoder"] < found["items"]["video"]


def test_long_clips_are_shown_in_part(tmp_path: Path) -> None:
    long = clip(tones(8_000 * 45, 8_000), 8_000)
    kind, items = INPUTS["audio"], {"audio": (long,)}
    item, _ = kind.encode(long, kind.examine(long), with_content=True)
    raw = RawSample.asking(key="k", question="<audio>", answer="a", items=items)
    document = EncodedSample(
        key="k",
        tokens=np.zeros(1, np.int64),
        targets=np.zeros(1, np.bool_),
        items={"audio": (item,)},
    )
    shown = figures(document, raw, INPUTS)
    assert "audio 1: 45.00 seconds at 16,000 Hz, the first 30 play, 563 rows" in shown
    assert len(shown) < 1_400_000
