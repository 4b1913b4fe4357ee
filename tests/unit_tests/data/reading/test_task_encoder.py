"""Stored samples of every form and in every state, read through energon from disk."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.jsonl.crude_jsonl_dataset import CrudeJsonlDatasetFactory
from PIL import ExifTags, Image

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import ItemWords
from megatron_mimo.data.loader.stream_loader import build_train_loader
from megatron_mimo.data.reading.readers import train_streams
from megatron_mimo.data.reading.stream import LaneStream
from megatron_mimo.data.reading.task_encoder import read_sample
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.role import DataRole, SourceRole
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.data.samples.sample import Drawn, RawSample, RejectedSample, SkippedSample
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import ImageInput
from tests.unit_tests.data.toy import ToneInput

TOKENIZER = ByteTokenizer()


def role(*lanes: int, num_lanes: int, pixels: bool) -> DataRole:
    return DataRole(
        lanes=lanes,
        num_lanes=num_lanes,
        text_lane=None if pixels else lanes[0],
        sources={
            "encoder": SourceRole(
                rank=0 if pixels else None, serving={lane: (0,) for lane in range(num_lanes)}
            )
        },
    )


def picture(kind: str = "PNG", size: tuple[int, int] = (16, 16), **options: Any) -> bytes:
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def talk(question: str = "<image>What?", answer: str = "this") -> bytes:
    return json.dumps({"question": question, "answer": answer}).encode()


def web(path: Path, shards: Sequence[Mapping[str, Mapping[str, bytes]]]) -> Path:
    """A webdataset whose train split are the shards."""
    (path / "train").mkdir(parents=True)
    names = [f"train/{i}.tar" for i in range(len(shards))]
    for name, samples in zip(names, shards, strict=True):
        write_shard(path / name, samples.items())
    prepare(path, names)
    return path


def json_lines(path: Path, lines: Sequence[bytes]) -> Path:
    """A JSONL dataset."""
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    CrudeJsonlDatasetFactory.prepare_dataset(EPath(path))
    return path


def blend(path: Path, *parts: Mapping[str, Any]) -> Path:
    """A metadataset of weighted parts."""
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": list(parts)}},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def stream(path: Path, *, pixels: bool = True, **fields: Any) -> LaneStream:
    config = DataConfig(provider="energon", path=str(path), **{"seq_length": 128, **fields})
    return train_streams(config, role(0, num_lanes=1, pixels=pixels), TOKENIZER)[0]


def drawn(path: Path, number: int, **fields: Any) -> list[Drawn]:
    found = list(islice(iter(stream(path, **fields).__next__, None), number))
    assert all(isinstance(one, Drawn) for one in found), found
    return found  # type: ignore[return-value]


# -- one stored sample -----------------------------------------------------------------------------


@pytest.fixture
def media(tmp_path: Path) -> MediaFolder:
    (tmp_path / "a.png").write_bytes(b"file a")
    return MediaFolder(tmp_path)


@pytest.fixture
def read(media: MediaFolder) -> Callable[[Mapping[str, Any]], Any]:
    return lambda parts: read_sample("k", "d", parts, media, {"encoder": ImageInput()})


Read = Callable[[Mapping[str, Any]], Any]


def test_images_follow_the_numbers_in_their_names(read: Read) -> None:
    parts = {"10.png": b"c", "2.png": b"b", "1.JPG": b"a", "json": talk("q")}
    assert read(parts).items["encoder"] == (b"a", b"b", b"c")


def test_images_without_numbers_follow_the_alphabet(read: Read) -> None:
    parts = {"right.png": b"b", "left.png": b"a", "json": talk("q")}
    assert read(parts).items["encoder"] == (b"a", b"b")


def test_text_alone_is_a_sample(read: Read) -> None:
    expected = RawSample.asking(key="k", question="Say hello.", answer="hello", source="d")
    assert read({"json": talk("Say hello.", "hello")}) == expected


def test_a_text_file_is_a_caption(read: Read) -> None:
    sample = read({"txt": b"Two cats.\n", "0.png": b"a", "1.png": b"b"})
    assert sample.turns == (Turn("user", "<image><image>"), Turn("assistant", "Two cats."))


def test_paths_name_files_unless_images_stand_beside(read: Read) -> None:
    fields = {"text": "<image>x", "image": "a.png"}
    assert read({"json": json.dumps(fields).encode()}).items["encoder"] == (b"file a",)
    assert read({"json": fields}).items["encoder"] == (b"file a",)
    assert read({"json": fields, "png": b"beside"}).items["encoder"] == (b"beside",)


def test_a_missing_file_is_skipped(read: Read, tmp_path: Path) -> None:
    outcome = read({"json": {"text": "<image>x", "image": "b.png"}})
    assert outcome == SkippedSample(
        key="k",
        source="d",
        kind="missing file",
        reason=f"its image b.png is not in {tmp_path}",
    )


def test_a_file_that_this_host_cannot_read_stops(tmp_path: Path) -> None:
    # A regular file that fails to be read.
    media = MediaFolder(tmp_path, ["/proc"])
    parts = {"json": {"text": "<image>x", "image": "/proc/self/mem"}}
    outcome = read_sample("k", "d", parts, media, {"encoder": ImageInput()})
    assert isinstance(outcome, RejectedSample)
    assert "sample 'k' of d names an image that cannot be read here" in outcome.message


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"png": b""}, "sample 'k' of d has the files png: expected json or txt, and images"),
        ({"json": talk(), "txt": b""}, "has a json with question and a txt: expected one text"),
        ({"v1.json": talk()}, "a key ends at its first dot: rename files without further dots"),
        ({"json": talk(), "JSON": talk()}, "has the files JSON, json: expected"),
        ({"json": talk(), "mp4": b""}, "has the files json, mp4: expected"),
        ({"json": talk(), "mp4": b""}, "takes no video: use a dataset without, or a model that"),
        ({"json": talk(), "2.wav": b""}, "takes no audio: use a dataset without, or a model that"),
        ({"json": b"[1]"}, "sample 'k' of d has a json with list: expected"),
        ({"json": {"caption": "c"}}, "sample 'k' of d has a caption and no image"),
    ],
)
def test_unknown_contents_are_rejected(read: Read, parts: dict[str, Any], message: str) -> None:
    outcome = read(parts)
    assert isinstance(outcome, RejectedSample)
    assert message in outcome.message


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b""])
def test_malformed_json_is_skipped(read: Read, data: bytes) -> None:
    outcome = read({"json": data})
    assert isinstance(outcome, SkippedSample)
    assert outcome.kind == "malformed text"


def test_what_img2dataset_writes_is_a_caption(read: Read) -> None:
    known = json.dumps({"caption": None, "url": "http://x/a.jpg", "key": "0", "width": 3}).encode()
    sample = read({"json": known, "txt": b"A cat.\r\n", "jpg": b"a"})
    assert sample.turns == (Turn("user", "<image>"), Turn("assistant", "A cat."))


def test_endings_may_be_in_capitals(read: Read) -> None:
    assert read({"JSON": talk("q"), "PNG": b"a"}).items["encoder"] == (b"a",)
    assert read({"TXT": b"A cat.", "JPG": b"a"}).answer == "A cat."


BOTH = {"encoder": ImageInput(), "audio": ToneInput()}


def test_files_belong_to_the_module_whose_ending_or_noun_they_have(media: MediaFolder) -> None:
    parts = {"2.wav": b"b", "png": b"i", "1.tone": b"a", "json": talk("<tone><image><tone>")}
    sample = read_sample("k", "d", parts, media, BOTH)
    assert isinstance(sample, RawSample)
    assert sample.items == {"encoder": (b"i",), "audio": (b"a", b"b")}

    class Spectrum(ImageInput):
        @property
        def words(self) -> ItemWords:
            return ItemWords(noun="spectrum")

    spectra = {"encoder": ImageInput(), "audio": Spectrum(placeholder="<spectrum>")}
    parts = {"spectrum.1.png": b"s", "image.10.png": b"j", "image.2.png": b"i", "json": talk()}
    sample = read_sample("k", "d", parts, media, spectra)
    assert isinstance(sample, RawSample)
    assert sample.items == {"encoder": (b"i", b"j"), "audio": (b"s",)}
    outcome = read_sample("k", "d", {"json": talk(), "mp4": b""}, media, BOTH)
    assert isinstance(outcome, RejectedSample)
    assert "ppm), tones (tone, wav)" in outcome.message


def test_json_names_files_of_every_module_by_its_noun(media: MediaFolder, tmp_path: Path) -> None:
    (tmp_path / "b.wav").write_bytes(b"file b")
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "tone"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    stored = {"json": {"messages": said, "image": "a.png", "tones": ["b.wav"]}}
    sample = read_sample("k", "d", stored, media, BOTH)
    assert isinstance(sample, RawSample)
    assert sample.turns[0].text == "<image>and<tone>"
    assert sample.items == {"encoder": (b"file a",), "audio": (b"file b",)}
    # Items of one module beside the JSON say nothing of those of another.
    sample = read_sample("k", "d", {**stored, "wav": b"beside"}, media, BOTH)
    assert isinstance(sample, RawSample)
    assert sample.items == {"encoder": (b"file a",), "audio": (b"beside",)}
    stored["json"]["tones"] = ["c.wav"]
    skipped = read_sample("k", "d", stored, media, BOTH)
    assert isinstance(skipped, SkippedSample)
    assert (skipped.kind, skipped.reason[:18]) == ("missing file", "its tone c.wav is ")


def test_a_caption_is_of_the_items_of_all_modules(media: MediaFolder) -> None:
    parts = {"txt": b"A cat.", "1.wav": b"v", "2.wav": b"w", "png": b"i"}
    sample = read_sample("k", "d", parts, media, BOTH)
    assert isinstance(sample, RawSample)
    assert sample.turns[0].text == "<image><tone><tone>"
    outcome = read_sample("k", "d", {"json": {"caption": "c"}}, media, BOTH)
    assert isinstance(outcome, RejectedSample)
    assert "has a caption and no image or tone: expected one at least" in outcome.message


def test_what_is_no_text_is_not_learnt_wherever_it_is_stored(read: Read) -> None:
    said = {"caption": "\ufeffa cat\r\nsits"}
    marked = b"\xef\xbb\xbf" + json.dumps(said).encode()
    for stored in ({"json": said}, {"json": marked}, {"txt": "\ufeffa cat\r\nsits\r\n".encode()}):
        assert read({**stored, "png": b"p"}).turns[1].text == "a cat\nsits"


def test_half_a_character_leaves_the_sample_out(read: Read) -> None:
    for stored in ({"text": "\ud83d"}, {"text": "<image>", "image": "\ud83d.png"}):
        for part in (stored, json.dumps(stored).encode()):
            skipped = read({"json": part})
            assert isinstance(skipped, SkippedSample)
            assert skipped.kind == "malformed text"
            assert "is not valid Unicode: surrogates not allowed" in skipped.reason


# -- datasets --------------------------------------------------------------------------------------


def test_json_lines_with_images_beside_them(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/0.png").write_bytes(picture())
    lines = [
        {"question": "<image>What?", "answer": "a", "image": "pictures/0.png"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]},
        {"caption": "c", "images": ["pictures/0.png", "pictures/0.png"]},
        {"text": "d"},
    ]
    path = json_lines(tmp_path / "talk.jsonl", [json.dumps(line).encode() for line in lines])
    found = {one.documents[0].key: one.documents[0] for one in drawn(path, 40)}
    assert sorted(found) == ["0", "1", "2", "3"]
    assert [len(found[key].items.get("encoder", ())) for key in sorted(found)] == [1, 0, 2, 0]
    learnt = [bytes(found[key].tokens[found[key].targets][:-1].tolist()) for key in "012"]
    assert learnt == [b"a", b"b", b"c"]


def test_lines_that_do_not_parse_are_skipped_with_their_number(tmp_path: Path) -> None:
    lines = [b'{"text": "ab"}', b'{"text": ]}', b'{"text": "caf\xe9"}', b'{"text": "cd"}']
    path = json_lines(tmp_path / "talk.jsonl", lines)
    found = drawn(path, 20)
    assert {one.documents[0].key for one in found} == {"0", "3"}
    skipped = {bad.key: bad for one in found for bad in one.skipped}
    assert sorted(skipped) == ["1", "2"]
    assert skipped["1"].source == f"dataset {path}, shard talk.jsonl"
    assert "its json is malformed: Expecting value" in skipped["1"].reason


@pytest.mark.parametrize(("kept", "reason"), [(None, "No such file"), (0, "empty file")])
def test_samples_of_a_damaged_shard_are_skipped_with_its_name(
    tmp_path: Path, kept: int | None, reason: str
) -> None:
    shards = [{f"{name}{i}": {"json": talk("q")} for i in range(9)} for name in "ab"]
    path = web(tmp_path / "web", shards)
    shard = path / "train/1.tar"
    whole = shard.read_bytes()
    shard.unlink()
    if kept is not None:
        shard.write_bytes(whole[:kept])
    found = drawn(path, 30)
    assert {one.documents[0].key for one in found} == {f"a{i}" for i in range(9)}
    skipped = [bad for one in found for bad in one.skipped]
    assert {(bad.source, bad.kind) for bad in skipped} == {
        (f"dataset {path}, shard train/1.tar", "unreadable shard")
    }
    reasons = {bad.reason for bad in skipped}
    assert all(why.startswith("its shard cannot be read: ") for why in reasons)
    assert any(reason in why for why in reasons)


def test_a_blend_of_shards_and_lines_follows_its_weights(tmp_path: Path) -> None:
    web(tmp_path / "web", [{f"w{i}": {"json": talk(), "png": picture()} for i in range(20)}])
    (tmp_path / "files/deep").mkdir(parents=True)
    (tmp_path / "files/deep/x.jpg").write_bytes(picture("JPEG", (24, 16)))
    line = {"question": "<image>q", "answer": "a", "image": "deep/x.jpg"}
    json_lines(tmp_path / "talk.jsonl", [json.dumps(line).encode()] * 20)
    json_lines(tmp_path / "text.jsonl", [b'{"text": "plain"}'] * 20)
    path = blend(
        tmp_path / "blend.yaml",
        {"weight": 5, "path": "web"},
        {"weight": 3, "path": "talk.jsonl", "aux": {"media": "filesystem://files"}},
        {"weight": 2, "path": "text.jsonl"},
    )
    found = Counter(
        (one.documents[0].key.startswith("w"), len(one.documents[0].items.get("encoder", ())))
        for one in drawn(path, 1000)
    )
    assert set(found) == {(True, 1), (False, 1), (False, 0)}
    assert found[True, 1] == pytest.approx(500, abs=60)
    assert found[False, 1] == pytest.approx(300, abs=60)


def test_going_on_reads_broken_samples_alike(tmp_path: Path) -> None:
    """What waits in the shuffle buffer is read again by its key, broken or not."""
    shards = [{f"{name}{i}": {"json": talk("q")} for i in range(20)} for name in "ab"]
    shards[0]["a3"]["json"] = b"{"
    path = web(tmp_path / "web", shards)
    (path / "train/1.tar").write_bytes(b"")
    json_lines(tmp_path / "talk.jsonl", [b'{"text": "ab"}', b'{"text": ]}'] * 10)
    both = blend(
        tmp_path / "blend.yaml",
        {"weight": 1, "path": "web"},
        {"weight": 1, "path": "talk.jsonl"},
    )
    whole = stream(both, shuffle_buffer_size=10)
    begun = [next(whole) for _ in range(15)]
    state = whole.state()
    rest = [next(whole) for _ in range(15)]
    resumed = stream(both, shuffle_buffer_size=10)
    resumed.restore(0, [state])
    assert [described(next(resumed)) for _ in range(15)] == [described(one) for one in rest]
    kinds = {bad.kind for one in (*begun, *rest) for bad in one.skipped}
    assert kinds == {"malformed text", "unreadable shard"}


def test_too_many_bad_samples_stop_both_sides_at_the_same_step(tmp_path: Path) -> None:
    samples = {f"{i:03d}": {"json": talk(), "png": picture()} for i in range(200)}
    for i in range(0, 200, 10):
        samples[f"{i:03d}"]["png"] = b""
    path = web(tmp_path / "web", [samples])
    config = DataConfig(
        provider="energon", path=str(path), global_batch_size=100, max_bad_sample_fraction=0.05
    )
    ends = []
    for pixels in (True, False):
        loader = build_train_loader(config, role(0, num_lanes=1, pixels=pixels), TOKENIZER)
        steps: list[int] = []
        with pytest.raises(ValueError, match=r"lane 0: \d+ of 10\d\d samples cannot be") as error:
            for _ in range(100):
                steps.append(loader.next_step().lane_digest[0])
        ends.append((steps, str(error.value)))
    assert ends[0] == ends[1]
    assert f"of dataset {path} (broken image, such as '" in ends[0][1]


# -- both grids read the same ----------------------------------------------------------------------

NUM_SAMPLES = 10_000
BROKEN = 0.01
SIZES = [(8, 8), (16, 24), (40, 8), (33, 47), (20, 61)]


def described(found: Any) -> Any:
    """What both grids must agree on."""
    assert isinstance(found, Drawn), found
    (document,) = found.documents
    rows = [(image.grids, image.rows) for image in document.items.get("encoder", ())]
    return document.key, document.tokens.tobytes(), document.targets.tobytes(), rows, found.skipped


def pictures() -> Iterator[tuple[str, bytes]]:
    """Endings and files of many kinds, some of them lying on their side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for size in SIZES:
        yield "png", picture("PNG", size)
        yield "png", picture("PNG", size, exif=exif)
        yield "jpg", picture("JPEG", size)
        yield "jpg", picture("JPEG", size, exif=exif, progressive=True)
        yield "webp", picture("WEBP", size)
        yield "gif", picture("GIF", size)
        yield "bmp", picture("BMP", size)
        yield "ppm", picture("PPM", size)


def flipped(data: bytes, random: np.random.Generator) -> bytes:
    """With some bits changed behind the header."""
    changed = bytearray(data)
    for at in random.integers(len(data) // 3, len(data), 20):
        changed[at] ^= 1 << int(random.integers(8))
    return bytes(changed)


def broken(number: int, ending: str, file: bytes, random: np.random.Generator) -> dict[str, bytes]:
    """A stored sample with one of ten faults."""
    match number % 10:
        case 0:
            return {ending: file[: len(file) // 2], "json": talk()}
        case 1:
            return {ending: b"", "json": talk()}
        case 2:
            return {ending: random.bytes(300), "json": talk()}
        case 3:
            return {ending: file, "json": talk()[:-4]}
        case 4:
            return {"json": b'{"text": "<image>x", "image": "nowhere.png"}'}
        case 5:
            return {ending: file, "json": talk(answer="long " * 50)}
        case 6:
            return {ending: file, "json": talk(answer=" ")}
        case 7:
            return {ending: file, "json": b'{"messages": [{"role": "user", "content": "<image>"}]}'}
        case 8:
            return {ending: file, "json": b'{"text": "<image>\\ud83d"}'}
        case _:
            return {ending: flipped(file, random), "json": talk()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and lines with 10,000 samples, one in a hundred broken, and one shard emptied."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(0)
    files = list(pictures())
    stored: dict[str, dict[str, bytes]] = {}
    for number in range(NUM_SAMPLES * 4 // 5):
        ending, file = files[int(random.integers(len(files)))]
        if random.random() < BROKEN:
            parts = broken(int(random.integers(10)), ending, file, random)
        elif number % 7 == 0:
            parts = {"json": talk("Say it.", f"it {number}")}
        elif number % 7 == 1:
            parts = {f"0.{ending}": file, "1.png": files[0][1], "txt": b"Two of them."}
        else:
            parts = {ending: file, "json": talk(answer=f"number {number}")}
        stored[f"s{number:05d}"] = parts
    keys = sorted(stored)
    cuts = [0, 2000, 2030, 5000, len(keys)]
    shards = [{key: stored[key] for key in keys[first:last]} for first, last in pairwise(cuts)]
    path = web(folder / "web", shards)
    (path / "train/1.tar").write_bytes(b"")
    (folder / "files").mkdir()
    for number, (ending, file) in enumerate(files):
        (folder / f"files/{number}.{ending}").write_bytes(file)
    (folder / "files/flipped.jpg").write_bytes(flipped(picture("JPEG", (48, 48)), random))
    lines = []
    for number in range(NUM_SAMPLES // 5):
        chosen = int(random.integers(len(files)))
        name = f"{chosen}.{files[chosen][0]}"
        if random.random() < BROKEN:
            name = ["nowhere.png", "flipped.jpg"][number % 2]
        line = json.dumps({"text": f"see <image> {number}", "image": name}).encode()
        lines.append(b'{"text": }' if random.random() < BROKEN / 2 else line)
    json_lines(folder / "talk.jsonl", lines)
    return blend(
        folder / "blend.yaml",
        {"weight": 4, "path": "web"},
        {"weight": 1, "path": "talk.jsonl", "aux": {"media": "filesystem://files"}},
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_grids_read_the_same_of_10_000_samples(mixed: Path) -> None:
    config = DataConfig(provider="energon", path=str(mixed), seq_length=128, shuffle_buffer_size=50)
    lanes = 2
    encoder = train_streams(config, role(*range(lanes), num_lanes=lanes, pixels=True), TOKENIZER)
    kinds: Counter[str] = Counter()
    seen = blanks = 0
    for lane in range(lanes):
        language = train_streams(config, role(lane, num_lanes=lanes, pixels=False), TOKENIZER)[lane]
        of_lane = 0
        while of_lane < NUM_SAMPLES // lanes:
            pixels, text = next(encoder[lane]), next(language)
            assert described(pixels) == described(text)
            kinds.update(bad.kind for bad in text.skipped)
            blanks += pixels.documents[0].flaw is not None
            of_lane += 1 + len(text.skipped)
        seen += of_lane
    assert seen >= NUM_SAMPLES
    assert set(kinds) == {
        "broken image", "missing file", "malformed text", "no answer", "too long",
        "unreadable shard",
    }  # fmt: skip
    assert kinds.total() == pytest.approx(NUM_SAMPLES * BROKEN, rel=0.6)
    assert blanks
