"""What `megatron-mimo evaluate` asks of a dataset, in each form of one; and the file of answers."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.tools.evaluate.answers import AnswerBook
from megatron_mimo.tools.evaluate.command import digest_of_weights
from megatron_mimo.tools.evaluate.dataset import Asked, Unusable, read_dataset
from megatron_mimo.tools.evaluate.messages import sampling_of, turns_of, without_effect
from megatron_mimo.tools.evaluate.page import shown
from megatron_mimo.tools.evaluate.place import DatasetPlace


def png(size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def read(path: Path, **flags: Any) -> list[Asked | Unusable]:
    place = DatasetPlace(path=str(path), **flags)
    place.check()
    return list(read_dataset(place, DataConfig(), ByteTokenizer(("encoder",))))


def said(found: Asked | Unusable) -> tuple[list[tuple[str, str]], tuple[str, ...], int]:
    """Turns, references and number of images of a sample that can be asked."""
    assert isinstance(found, Asked), found
    turns = [(turn.role, turn.text) for turn in found.turns]
    return turns, found.expected.references, len(found.items.get("encoder", ()))


HUMAN, GPT = "human", "gpt"
SAMPLES: list[tuple[Mapping[str, Any], Any]] = [
    (
        {"image": "a.png", "question": "Which?", "answer": "Red"},
        ([("user", "<image>Which?")], ("Red",), 1),
    ),
    (
        {"images": ["a.png", "a.png"], "question": "<image>, <image>?", "answers": ["x", "y"]},
        ([("user", "<image>, <image>?")], ("x", "y"), 2),
    ),
    (
        {"question": "2 + 2?", "answer": 4, "task": "sums"},
        ([("user", "2 + 2?")], ("4",), 0),
    ),
    (
        {"question": "?", "answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}]},
        ([("user", "?")], ("a", "b"), 0),
    ),
    (
        {
            "image": "a.png",
            "conversations": [
                {"from": HUMAN, "value": "<image>One?"},
                {"from": GPT, "value": "1"},
                {"from": HUMAN, "value": "Two?"},
                {"from": GPT, "value": "2"},
                {"from": HUMAN, "value": "Thanks."},
            ],
        },
        ([("user", "<image>One?"), ("assistant", "1"), ("user", "Two?")], ("2",), 1),
    ),
    (
        {"messages": [{"role": "user", "content": "Three?"}], "answer": "3"},
        ([("user", "Three?")], ("3",), 0),
    ),
    ({"image": "a.png", "caption": "A card."}, ([("user", "<image>")], ("A card.",), 1)),
]  # fmt: skip


def test_every_form_in_lines_an_array_and_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    contents = [json.dumps(content) for content, _ in SAMPLES]
    (tmp_path / "lines.jsonl").write_text("\n\n".join(contents))
    (tmp_path / "array.json").write_text(f"[{', '.join(contents)}]")
    (tmp_path / "shards/val").mkdir(parents=True)
    # Paths that the JSON names lead into the dataset's folder.
    (tmp_path / "shards/a.png").write_bytes(png())
    samples = [(f"s{n}", {"json": text.encode()}) for n, text in enumerate(contents)]
    write_shard(tmp_path / "shards/val/000000.tar", samples)
    prepare(tmp_path / "shards", ["val/000000.tar"])
    wanted = [expected for _, expected in SAMPLES]
    of_lines = read(tmp_path / "lines.jsonl")
    assert [said(found) for found in of_lines] == wanted
    assert [said(found) for found in read(tmp_path / "array.json")] == wanted
    assert [said(found) for found in read(tmp_path / "shards")] == wanted
    assert [getattr(found, "task", None) for found in of_lines[2:4]] == ["sums", None]
    assert len({found.digest() for found in of_lines}) == len(wanted)
    assert [found.digest() for found in of_lines] == [
        found.digest() for found in read(tmp_path / "lines.jsonl")
    ]


def test_choices_and_the_field_of_the_task(tmp_path: Path) -> None:
    lines = [
        {"question": "?", "answer": "B", "choices": ["x", "y"], "category": "a", "level": 3},
        {"question": "?", "answer": "B", "choices": {"A": "x", "B": "y", "C": None}, "level": 4},
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [one for one in read(tmp_path / "asked.jsonl") if isinstance(one, Asked)]
    assert [one.expected.choices for one in found] == [("x", "y"), ("x", "y")]
    assert [one.task for one in found] == ["a", None]
    by_level = read(tmp_path / "asked.jsonl", task_field="level")
    assert [getattr(one, "task", None) for one in by_level] == ["3", "4"]


BAD = [
    ("{", "its json is malformed: Expecting property name"),
    ('{"question": "?"}', 'it has no answer: expected a text as "answer"'),
    ('{"question": "?", "answers": []}', "it has no answer"),
    ('{"question": "?", "answer": " "}', "it has no answer"),
    ('{"question": "?", "answers": [true]}', "its answers hold 'True': expected texts or numbers"),
    ('{"text": "A document."}', "it has no question: expected a turn of the user"),
    ('{"image": "gone.png", "question": "?", "answer": "x"}', "its image gone.png is not in"),
    ('{"image": "../x.png", "question": "?", "answer": "x"}', "is outside of"),
    ('{"id": 3}', "has a json with id: expected exactly one of question"),
    ('{"messages": [{"role": "user", "content": "?"}]}', "it has no answer"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": "?", "answer": "x"}\n' + line)
    good, bad = read(path)
    assert isinstance(good, Asked) and isinstance(bad, Unusable)
    assert bad.message.startswith(f"sample 'asked-00000002' of {path}, line 2")
    assert reason in bad.message


def test_a_bad_sample_of_a_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    samples = [
        ("a", {"json": b'{"question": "<image>?", "answers": ["x"]}', "png": png()}),
        ("b", {"json": b'{"question": "?"}', "png": png()}),
        ("c", {"json": b"{", "png": png()}),
        ("d", {"txt": b"A card.", "json": b'{"task": "cards"}', "png": png()}),
    ]
    write_shard(tmp_path / "val/000000.tar", samples)
    prepare(tmp_path, ["val/000000.tar"])
    a, b, c, d = read(tmp_path)
    assert said(a)[1] == ("x",) and said(d)[1] == ("A card.",)
    assert getattr(d, "task", None) == "cards"
    assert isinstance(b, Unusable) and "'b' of" in b.message and "no answer" in b.message
    assert isinstance(c, Unusable) and "'c' of" in c.message and "malformed" in c.message


def test_images_of_a_file_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png())
    path = tmp_path / "asked.jsonl"
    path.write_text('{"image": "a.png", "question": "?", "answer": "x"}')
    assert isinstance(read(path)[0], Unusable)
    (found,) = read(path, image_root=str(tmp_path / "images"))
    assert said(found)[2] == 1
    # Another image under the same name is another sample.
    (tmp_path / "images/a.png").write_bytes(png()[:-1] + b"?")
    (other,) = read(path, image_root=str(tmp_path / "images"))
    assert said(other) == said(found) and other.digest() != found.digest()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "megatron-mimo evaluate RUN --data DATASET: expected one RUN, got 0"),
        (["a"], "--data is missing: expected the dataset of the questions"),
        (["a", "--data", "gone"], "--data gone is not there: expected a .jsonl or .json file"),
        (["a", "--data", "f.jsonl", "--split", "val"], "--split val with --data f.jsonl: a file"),
        (["a", "--data", ".", "--image-root", "."], "--image-root with --data .: expected it"),
        (["a", "--data", "f.jsonl", "--image-root", "x"], "--image-root x is not a folder"),
        (["a", "--data", "f.jsonl", "--metric", "bleu"], "--metric"),
        (["a", "--data", "f.jsonl", "--limit", "0"], "--limit is 0: expected 1 to"),
        (["a", "--data", "f.jsonl"], "RUN a is not there: expected the folder of --save"),
    ],
)
def test_wrong_usage_is_one_line(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.jsonl").write_text("{}")
    assert main(["evaluate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"error: {message}")


def test_a_dataset_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"question": "?", "answer": "x"}, ')
    with pytest.raises(ValueError, match=r"--data .*a.json, item 2: malformed JSON"):
        read(tmp_path / "a.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"^--data .*folder is not prepared for Energon"):
        read(tmp_path / "folder")


# -- the file of answers ---------------------------------------------------------------------------

ASKS = {"model": "m", "sampling": {"temperature": 0.0}}


def line(number: int) -> dict[str, Any]:
    return {"key": str(number), "answer": "é", "digest": f"d{number}"}


def test_answers_are_there_after_another_start(tmp_path: Path) -> None:
    with AnswerBook(tmp_path / "a", ASKS) as book:
        assert book.earlier(0, "d0", "sample 0") is None
        book.write(line(0))
        book.write(line(1))
    # A line that a killed process has begun.
    with (tmp_path / "a/answers.jsonl").open("ab") as file:
        file.write(b'{"key": "2", "ans')
    with AnswerBook(tmp_path / "a", ASKS) as book:
        assert book.earlier(1, "d1", "sample 1") == line(1)
        assert book.earlier(2, "d2", "sample 2") is None
        book.write(line(2))
        found = [json.loads(text) for text in (tmp_path / "a/answers.jsonl").open()]
        assert found == [line(0), line(1), line(2)]
        with pytest.raises(ValueError, match="line 1 of answers.jsonl answers another sample than"):
            book.earlier(0, "other", "sample 0")
        # A limit has left one out.
        book.rewrite([line(0) | {"scores": {}}, line(1)])
    found = [json.loads(text) for text in (tmp_path / "a/answers.jsonl").open()]
    assert found == [line(0) | {"scores": {}}, line(1)]


def test_a_smaller_limit_loses_no_answer(tmp_path: Path) -> None:
    with AnswerBook(tmp_path, ASKS) as book:
        for number in range(3):
            book.write(line(number))
    with AnswerBook(tmp_path, ASKS) as book:
        book.rewrite([line(0) | {"scores": {}}])
    found = [json.loads(text) for text in (tmp_path / "answers.jsonl").open()]
    assert found == [line(0) | {"scores": {}}, line(1), line(2)]


def test_answers_of_another_evaluation_are_left_alone(tmp_path: Path) -> None:
    with AnswerBook(tmp_path, ASKS) as book:
        # Nothing is answered yet: another may begin.
        pass
    with AnswerBook(tmp_path, {**ASKS, "model": "n"}) as book:
        book.write(line(0))
    with pytest.raises(ValueError, match="of another evaluation, with another model and sampling"):
        AnswerBook(tmp_path, {"model": "m", "sampling": {}})
    (tmp_path / "answers.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1 is not an answer"):
        AnswerBook(tmp_path, ASKS)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from megatron_mimo.tools.evaluate.answers import AnswerBook\n"
        "AnswerBook(Path(sys.argv[1]), {})"
    )
    with AnswerBook(tmp_path, {}):
        other = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True)
    assert b"is in use by another process" in other.stderr


def test_a_model_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = digest_of_weights(tmp_path)
    assert digest_of_weights(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert digest_of_weights(tmp_path) != before


# -- pages, and words of lmms-eval -----------------------------------------------------------------


def test_large_and_rare_images_are_made_small() -> None:
    small = shown(png())
    assert small is not None and (small.content, small.media_type) == (png(), "image/png")
    for source in (png((900, 700)), png(kind="TIFF"), np.zeros((4, 6, 3), np.uint8)):
        found = shown(source)
        assert found is not None and found.media_type == "image/jpeg"
        assert max(Image.open(io.BytesIO(found.content)).size) <= 512
    assert shown(b"no image") is None


def test_messages_of_a_task() -> None:
    picture = Image.new("RGB", (2, 2))
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "url": picture},
                {"type": "text", "text": "Is <image> red, or "},
                {"type": "image", "url": "b.png"},
                {"type": "text", "text": "?"},
            ],
        },
    ]
    turns, images = turns_of(messages, "<image>")
    assert [(turn.role, turn.text) for turn in turns] == [
        ("system", "Be short."),
        ("user", "<image>Is  red, or <image>?"),
    ]
    assert images == [picture, "b.png"]
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(ValueError, match="a part of type video: expected text and image"):
        turns_of(video, "<image>")


def test_settings_of_a_task() -> None:
    how = {"max_new_tokens": 5, "temperature": 0.7, "top_p": None, "until": ["\n\n", ""]}
    assert sampling_of(how) == ({"max_new_tokens": 5, "temperature": 0.7}, ["\n\n"])
    assert sampling_of({**how, "do_sample": False})[0]["temperature"] == 0
    assert sampling_of({"do_sample": True}) == ({"temperature": 1.0}, [])
    assert sampling_of({"until": "."}) == ({}, ["."])
    known = {**how, "num_beams": 1, "use_cache": True, "do_sample": True}
    assert without_effect(known) == set()
    assert without_effect({"num_beams": 3, "image_aspect_ratio": "pad"}) == {
        "num_beams",
        "image_aspect_ratio",
    }
