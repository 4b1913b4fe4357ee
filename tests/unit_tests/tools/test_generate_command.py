"""`megatron-mimo generate` and `chat`: what is refused in one line, before a model is loaded."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.cli import main
from megatron_mimo.settings import declared
from megatron_mimo.tools.generate.questions import read_questions


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line on standard error."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "megatron-mimo generate RUN QUESTION: expected RUN and QUESTION, got 0"),
        (
            ["runs/a", "what", "is", "it"],
            "megatron-mimo generate RUN QUESTION: expected RUN and QUESTION, got 4; put the "
            'question in quotes, as in "what is it"',
        ),
        (["runs/a"], "expected either a QUESTION after RUN, or --questions FILE"),
        (
            ["runs/a", "?", "--questions", "f"],
            "expected either a QUESTION after RUN, or --questions FILE, got both",
        ),
        (
            ["runs/a", "--questions", "f", "--image", "a.png"],
            "--image a.png with --questions: name images in the file",
        ),
        (["runs/a", "?", "--image", "nowhere.png"], "--image nowhere.png is not there: expected"),
        (["runs/a", "?", "--temperature", "-1"], "--temperature is -1: expected 0 to 1,000"),
        (["runs/a", "?", "--top-p", "0"], "--top-p is 0: expected more than 0"),
        (["runs/a", "?", "--imagee", "x"], "unknown flag --imagee: the nearest is --image"),
        (["nowhere", "?"], "RUN nowhere is not there: expected the folder of --save, or a folder"),
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
    assert refused(["generate", *argv], capsys).startswith(message)


def test_chat_takes_one_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(["chat"], capsys).startswith("megatron-mimo chat RUN: expected one RUN, got 0")
    message = refused(["chat", str(tmp_path / "nowhere")], capsys)
    assert message.startswith(f"RUN {tmp_path}/nowhere is not there")


def test_a_folder_without_a_checkpoint_names_those_below(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refused(["generate", str(tmp_path), "?"], capsys)
    assert message.startswith(f"RUN {tmp_path} has neither a checkpoint nor config.json")
    assert "have" not in message
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("3")
    message = refused(["generate", str(tmp_path), "?"], capsys)
    assert message.endswith(f"; {tmp_path}/a and {tmp_path}/b have")


def checkpoint(folder: Path, **flags: Any) -> Path:
    """A checkpoint that says of its run what is given, without weights."""
    import torch

    from megatron_mimo.checkpoint import folder as folders

    staged = folders.staging_folder(folder, 3, "test")
    staged.mkdir(parents=True)
    common = {"args": Namespace(**flags), "iteration": 3, "consumed_train_samples": 3}
    torch.save(common, staged / folders.COMMON)
    folders.seal(staged, {})
    folders.publish(staged, folder, 3)
    return folders.iteration_folder(folder, 3)


def test_a_checkpoint_chooses_no_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there = checkpoint(tmp_path, model_provider="mock", custom_import=("antigravity",))
    assert refused(["generate", str(tmp_path), "?"], capsys) == (
        f"{there} is of a run with --custom-import antigravity, which runs code: give "
        f"--custom-import antigravity again if you trust it"
    )


def test_a_checkpoint_that_does_not_say_its_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint(tmp_path, seq_length=64)
    assert "does not say which model this is" in refused(["generate", str(tmp_path), "?"], capsys)


def test_a_damaged_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there = checkpoint(tmp_path, model_provider="mock")
    (there / "common.pt").write_bytes((there / "common.pt").read_bytes()[:-1] + b"?")
    message = refused(["generate", str(tmp_path), "?"], capsys)
    assert "common.pt is not what was saved" in message


def test_a_tokenizer_that_has_moved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    checkpoint(tmp_path, model_provider="mock", tokenizer_model="old/place")
    message = refused(["generate", str(tmp_path), "?"], capsys)
    assert message.startswith("--tokenizer-model old/place is not a folder")
    message = refused(["generate", str(tmp_path), "?", "--tokenizer-model", "new"], capsys)
    assert message.startswith("--tokenizer-model new is not a folder")


def test_flags_that_do_not_matter_are_flags() -> None:
    from megatron_mimo.config.sections import TrainConfig
    from megatron_mimo.inference.run import TRAINING_ONLY

    of_model = {flag.name for flag in declared(TrainConfig) if flag.path[0] == "model"}
    assert of_model >= TRAINING_ONLY


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON: "),
        ("[]", 'line 2 is list: expected an object with the text "question"'),
        ('{"query": "?"}', 'line 2 is an object with query: expected an object with the text "que'),
        ('{"question": 3}', "line 2 is an object with question: expected"),
        ('{"question": "?", "image": "a", "images": ["b"]}', "line 2 has image and images: expec"),
        ('{"question": "?", "image": 7}', "line 2: image is [7]: expected the path of a file"),
        ('{"question": "?", "image": "gone.png"}', "line 2: image FOLDER/gone.png is not there"),
    ],
)
def test_wrong_lines_are_named(
    line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(f'{{"question": "first"}}\n{line}\n')
    found = refused(["generate", "runs/a", "--questions", str(file)], capsys)
    wanted = f"--questions {file}, {message}".replace("FOLDER", str(tmp_path))
    assert found.startswith(wanted)


def test_questions_are_read_with_their_fields(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    lines = [
        {"question": "é?", "image": "a.png", "id": 1},
        {"question": "b", "images": ["x/b.png", "/c.png"]},
        {"question": "c", "image": None},
    ]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    first, second, third = read_questions(file)
    assert first.text == "é?" and first.fields["id"] == 1
    assert first.files["image"] == (tmp_path / "a.png",)
    assert second.files["image"] == (tmp_path / "x/b.png", Path("/c.png"))
    assert not any(third.files.values()) and third.where.endswith("line 5")


def test_questions_name_videos_and_clips_and_may_hold_any_character(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    line = {"question": "a\u2028b\x85c?", "video": "v.mp4", "audios": ["1.wav", "2.wav"]}
    file.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    (found,) = read_questions(file)
    assert found.text == line["question"]
    assert found.files["video"] == (tmp_path / "v.mp4",)
    assert found.files["audio"] == (tmp_path / "1.wav", tmp_path / "2.wav")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\xff\xfe", "cannot be read")]
)
def test_a_file_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_questions(file)
