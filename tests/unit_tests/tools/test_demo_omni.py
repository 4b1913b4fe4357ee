import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.data.samples.omni.dataset import StoredQuestion
from megatron_mimo.data.samples.omni.motion import FRAME_RATE, mp4
from megatron_mimo.data.samples.omni.questions import KINDS, Kind
from megatron_mimo.data.samples.omni.vocabulary import write_tokenizer
from megatron_mimo.tools.cards import Card, Sound
from megatron_mimo.tools.demo.moving import animated
from megatron_mimo.tools.demo.omni import (
    TOKENIZER,
    OmniDemoConfig,
    asking_line,
    score,
    score_rows,
    training_flags,
)
from megatron_mimo.tools.demo.omni_worker import as_samples, swapped
from megatron_mimo.tools.demo.page import omni_examples_section, omni_results_section, picture


def question(key: str, kind: Kind = "same", answer: str = "yes") -> StoredQuestion:
    return StoredQuestion(
        key=key,
        kind=kind,
        question="<image><audio>Is it?",
        answer=answer,
        files={"image": f"picture {key}".encode(), "audio": f"call {key}".encode()},
    )


@pytest.mark.parametrize("count", [2, 3, 50])
def test_swapping_moves_every_file_of_one_medium_and_nothing_else(count: int) -> None:
    questions = [question(str(i), answer=str(i)) for i in range(count)]
    others = swapped(questions, "audio")
    assert sorted(q.files["audio"] for q in others) == sorted(q.files["audio"] for q in questions)
    for before, after in zip(questions, others, strict=True):
        assert after.files["audio"] != before.files["audio"]
        assert after.files["image"] == before.files["image"]
        assert (after.key, after.question, after.answer) == (
            before.key,
            before.question,
            before.answer,
        )


def test_files_become_items_of_their_kinds() -> None:
    (sample,) = as_samples([question("a")])
    assert (sample.question, sample.answer) == ("<image><audio>Is it?", "yes")
    assert sample.items == {"encoder": (b"picture a",), "audio": (b"call a",)}


def test_scores_stand_beside_their_chances() -> None:
    questions = [question("a"), question("b", answer="no"), question("c", "all", "7 3 5")]
    answers = {"a": "yes", "b": "yes", "c": "7 3 5"}
    others = {
        "image": {"a": "no", "b": "yes", "c": "7 3 5"},
        "audio": {"a": "yes", "b": "no", "c": "7 3 4"},
        "video": {"c": "7 3"},
    }
    scores = score(questions, answers, others)
    assert scores["same"].all_there == 0.5
    assert scores["same"].swapped == {"image": 0, "audio": 1}
    assert scores["all"].swapped == {"image": 1, "audio": 0, "video": 0}
    head, rows = score_rows(scores)
    assert head[2:] == ("pictures swapped", "calls swapped", "videos swapped")
    assert rows == [
        (KINDS["same"].label, "50.0%", "0% (50%)", "100% (50%)", ""),
        (KINDS["all"].label, "100.0%", "100% (10%)", "0% (10%)", "0% (10%)"),
    ]


def test_a_video_is_shown_frame_by_frame() -> None:
    frames = np.zeros((3, 32, 48), dtype=np.uint8)
    for index in range(3):
        frames[index, 8:24, 16 * index : 16 * index + 16] = 200
    moving = animated(mp4(frames))
    assert moving.media_type == "image/png"
    with Image.open(io.BytesIO(moving.content)) as png:
        shown = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(png)]
        assert png.info["duration"] == 1000 / FRAME_RATE
    assert np.abs(np.stack(shown).astype(int) - frames).max() < 60
    assert [int(frame.mean(0).argmax()) // 16 for frame in shown] == [0, 1, 2]


def test_the_page_shows_and_plays() -> None:
    _, results = omni_results_section(("about", "match"), [("where it <moves>", "93.1%")], "So.")
    assert "where it &lt;moves&gt;" in results and "<td class=number>93.1%</td>" in results
    card = Card(
        pictures=(picture(b"PNG"),),
        sounds=(Sound(content=b"RIFF", media_type="audio/flac"),),
        question="Is it?",
        expected="yes",
        answer="no",
        is_right=False,
    )
    _, answers = omni_examples_section([card])
    assert "0 of 1 shown are right" in answers
    assert re.findall(r'<(img|audio controls) src="([^"]*)"', answers) == [
        ("img", "data:image/png;base64,UE5H"),
        ("audio controls", "data:audio/flac;base64,UklGRg=="),
    ]


def test_the_last_line_asks_about_held_out_files(tmp_path: Path) -> None:
    line = asking_line(tmp_path, question("a"))
    image, audio = tmp_path / "example.png", tmp_path / "example.flac"
    assert shlex.split(line.removeprefix("ask it yourself: ")) == [
        *("megatron-mimo", "generate", str(tmp_path), "Is it?"),
        *("--image", str(image), "--audio", str(audio)),
    ]
    assert (image.read_bytes(), audio.read_bytes()) == (b"picture a", b"call a")


@pytest.mark.parametrize(
    "config",
    [OmniDemoConfig(), OmniDemoConfig(train_iters=1), OmniDemoConfig(encoder_dp=2, audio_dp=2)],
    ids=["as it is", "one iteration", "six ranks"],
)
def test_the_training_flags_fit_together(config: OmniDemoConfig, tmp_path: Path) -> None:
    (tmp_path / "omni-digits" / ".nv-meta").mkdir(parents=True)
    write_tokenizer(tmp_path / TOKENIZER)
    flags = training_flags(config, tmp_path / "omni-digits", tmp_path)
    line = parse(flags, CommandLine, prog="megatron-mimo train")
    resolved = resolve(line.train, config.world_size)
    assert {name: grid.dp for name, grid in resolved.layout.modules.items()} == {
        "encoder": config.encoder_dp,
        "audio": config.audio_dp,
        "llm": config.llm_dp,
    }
    assert resolved.train_iters == config.train_iters
    assert resolved.save is not None and resolved.save.root == str(tmp_path)
