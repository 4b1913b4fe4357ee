"""`megatron-mimo evaluate` on runs of random weights: sources, files, going on after a stop."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.asked import pictures, save

RUN = [
    *("--model-provider", "mock", "--seq-length", "64", "--init", "topology-invariant"),
    *("--override", "language.hidden_size=64", "--override", "vision.hidden_size=64"),
]
FLAGS = ["--device", "cpu", "--max-new-tokens", "3"]
QUESTIONS = ["Which colour?", "How many?", "Is it red?", "And now?"]


@pytest.fixture(scope="module")
def place(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one rank and an image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("evaluated")
    run_ranks(1, save, RUN, str(folder / "run"))
    Image.fromarray(pictures()[0]).save(folder / "a.png")
    return folder


def commands(lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of some commands."""
    from megatron_mimo.cli import main

    found = []
    for argv in lines:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
        found.append((code, out.getvalue(), err.getvalue()))
    return found


def answers_of(run: str, image: str) -> list[str]:
    """What the model answers to the questions."""
    import megatron_mimo

    model = megatron_mimo.load(run, device="cpu")
    return [model.generate(text, [image], max_new_tokens=3).text for text in QUESTIONS]


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").open(encoding="utf-8")]


def test_every_source_gives_the_same_results(
    run_ranks: Callable[..., list], place: Path, tmp_path: Path
) -> None:
    (answers,) = run_ranks(1, answers_of, str(place / "run"), str(place / "a.png"), timeout=120)
    assert all(answers) and len(set(answers)) > 1
    # The model is right about the first two, and the last has choices.
    samples: list[dict[str, Any]] = [
        {"image": "a.png", "question": f"<image>{text}", "answer": "nothing", "task": "rest"}
        for text in QUESTIONS
    ]
    samples[0] |= {"answer": answers[0], "task": "first"}
    samples[1] |= {"answer": answers[1]}
    samples[3] |= {"answer": "B", "choices": ["nothing", answers[3]]}
    lines, array, dataset = (tmp_path / name for name in ("asked.jsonl", "asked.json", "data"))
    lines.write_text("\n".join(map(json.dumps, samples)))
    array.write_text(json.dumps(samples))
    root, run = ["--image-root", str(place)], str(place / "run")
    argv = ["evaluate", run, *FLAGS, "--json", "--data"]
    prepare = [str(lines), "--out", str(dataset), *root, "--val-fraction", "0.5"]
    found = run_ranks(1, commands, [
        [*argv, str(lines), *root, "--out", str(tmp_path / "out")],
        [*argv, str(array), *root],
        ["data", "prepare", *prepare],
        [*argv, str(dataset), "--split", "train"],
        [*argv, str(dataset)],
        [*argv, str(lines), *root, "--metric", "anls", "--metric", "vqa", "--limit", "2"],
    ], timeout=120)[0]  # fmt: skip
    assert [code for code, _, _ in found] == [0] * 6, found
    of_lines, of_array, of_train, of_val, limited = (
        json.loads(found[n][1]) for n in (0, 1, 3, 4, 5)
    )
    # Which samples are in which split is for `data prepare` to say.
    by_task = {(r["metric"], r["task"]): (r["score"], r["samples"]) for r in of_lines["results"]}
    assert by_task == {
        ("exact-match", None): (pytest.approx(2 / 3), 3),
        ("exact-match", "first"): (1, 1),
        ("exact-match", "rest"): (0.5, 2),
        ("multiple-choice", None): (1, 1),
        ("multiple-choice", "rest"): (1, 1),
    }
    assert of_array["results"] == of_lines["results"]
    assert of_train["split"] == "train" and of_val["split"] == "val"
    right = {(None, "exact-match"): 0.0, (None, "multiple-choice"): 0.0}
    for part in (of_train, of_val):
        for result in part["results"]:
            if result["task"] is None:
                right[None, result["metric"]] += result["score"] * result["samples"]
    assert list(right.values()) == pytest.approx([2, 1])
    assert limited["samples"] == 2 and limited["results"][0]["metric"] == "anls"
    assert limited["results"][0]["score"] == 1
    assert found[5][2] == (
        f"error: --metric vqa fits no sample of {lines}: expected samples with four answers or "
        f"more\n"
    )
    # What is written.
    out = tmp_path / "out"
    assert [line["answer"] for line in written(out)] == answers
    assert [line["scores"] for line in written(out)][2:] == [
        {"exact-match": 0},
        {"multiple-choice": 1},
    ]
    assert json.loads((out / "results.json").read_text()) == of_lines
    page = (out / "report.html").read_text()
    assert page.count('<figure class="wrong">') == 1 and "data:image/png;base64," in page
    assert "Is it red?<br>" in page and "1 of 1 wrong answers" in page


def test_bad_samples_are_named_and_counted(
    run_ranks: Callable[..., list], place: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes((place / "a.png").read_bytes())
    (tmp_path / "broken.png").write_bytes((place / "a.png").read_bytes()[:60])
    lines = [
        '{"question": "?", "answer": "x", "image": "broken.png"}',
        '{"question": "?", "answer": "x", "image": "a.png"}',
        '{"question": "?"}',
    ]
    asked, hopeless, empty = (tmp_path / f"{name}.jsonl" for name in ("asked", "hopeless", "empty"))
    asked.write_text("\n".join(lines))
    hopeless.write_text(lines[0])
    empty.write_text("\n")
    argv = ["evaluate", str(place / "run"), *FLAGS, "--data"]
    out = ["--out", str(tmp_path / "out")]
    (found,) = run_ranks(1, commands, [
        [*argv, str(asked), *out], [*argv, str(asked), *out], [*argv, str(hopeless)],
        [*argv, str(empty)],
    ], timeout=120)  # fmt: skip
    first, again, of_hopeless, of_empty = found
    assert first[0] == 0 and "1 sample evaluated; 2 could not be" in first[1]
    broken, unanswered = first[2].splitlines()
    assert broken.startswith(
        f"error: sample 'asked-00000001' of {asked}, line 1: image 1 cannot be"
    )
    assert unanswered.startswith(f"error: sample 'asked-00000003' of {asked}, line 3: it has no")
    assert again == first
    assert ["answer" in line for line in written(tmp_path / "out")] == [False, True, False]
    assert "Not evaluated: 2 samples" in (tmp_path / "out/report.html").read_text()
    assert of_hopeless[0] == 1 and of_hopeless[1] == ""
    assert of_hopeless[2].splitlines()[-1] == (
        f"error: none of 1 samples of {hopeless} could be evaluated"
    )
    assert of_empty[0] == 2 and of_empty[2] == f"error: --data {empty} has no samples\n"


def test_it_goes_on_after_an_interrupt(
    run_ranks: Callable[..., list], place: Path, tmp_path: Path
) -> None:
    sample = {"image": "a.png", "answer": "x"}
    lines = [json.dumps(sample | {"question": f"{number}?"}) for number in range(20_000)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(lines))
    out, file = tmp_path / "out", tmp_path / "out/answers.jsonl"
    argv = ["evaluate", str(place / "run"), *FLAGS, "--data", str(asked)]
    argv += ["--image-root", str(place), "--out", str(out)]
    command = [sys.executable, "-m", "megatron_mimo.cli", *argv]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        limit = time.monotonic() + 120
        while not (file.exists() and file.read_bytes().count(b"\n") > 2):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    before = file.read_bytes()
    number = before.count(b"\n")
    assert 2 < number < len(lines) and not (out / "results.json").exists()
    limit_flag = ["--limit", str(number + 2)]
    other = [*argv[:-1], str(tmp_path / "other"), *limit_flag]
    (found,) = run_ranks(1, commands, [
        [*argv, *limit_flag], other, [*argv, *limit_flag, "--max-new-tokens", "4"],
    ], timeout=120)  # fmt: skip
    assert [code for code, _, _ in found] == [0, 0, 2]
    assert "with another sampling: name another folder" in found[2][2]
    # What was answered is kept, and the whole is what one start gives.
    after = file.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == number + 2
    assert after == (tmp_path / "other/answers.jsonl").read_bytes()
    # Another dataset is not taken for the one that was begun.
    lines[1] = json.dumps(sample | {"question": "other?"})
    asked.write_text("\n".join(lines))
    (found,) = run_ranks(1, commands, [[*argv, *limit_flag]])
    assert found[0][0] == 2 and "line 2 of answers.jsonl answers another sample" in found[0][2]
