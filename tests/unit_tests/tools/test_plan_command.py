"""`megatron-mimo plan`: the drawing, the list of actions, the picture, and what it refuses."""

from pathlib import Path

import pytest

from megatron_mimo.cli import main

PIPELINE = ["--llm-pp", "2", "--num-microbatches", "3"]


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_drawing_shows_who_waits_for_whom(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--show-schedule", *PIPELINE).splitlines()
    assert "layout: 3 ranks, disjoint grids" in out[0]
    drawn = [line.rstrip() for line in out if "|" in line]
    encoder, first, last = drawn
    assert first.index("|L0") == encoder.index("|E1")
    assert last.index("|L0") == first.index("|L1")
    assert first.index("|l0") == last.index("|L1")
    assert encoder.index("|e0") == first.index("|l0") + len("|l0   ")


def test_the_summary_counts_what_is_alive(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--show-schedule", "--encoder-run-ahead", "0", *PIPELINE)
    assert "at most 2 of the encoder in flight" in out
    assert "at most 2 of the llm in flight" in out
    out = plan(capsys, "--show-schedule", "--evaluation", *PIPELINE)
    assert "at most 1 of the encoder in flight" in out
    assert "|e0" not in out


def test_ranks_that_do_the_same_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--show-schedule", "--encoder-dp", "2", "--llm-dp", "2", "--llm-tp", "2")
    assert "encoder stage 0, ranks 0-1 " in out
    assert "llm stage 0, ranks 2-5 " in out


def test_actions_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--show-actions", "1", "--num-microbatches", "1", "--freeze-vit")
    assert out.splitlines() == [
        "rank 1, llm dp 0:",
        "  llm post input 0",
        "  llm wait input 0",
        "  llm forward 0",
        "  llm backward 0",
        "  llm send grad 0",
    ]


def test_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "schedule.png"
    assert plan(capsys, "--png", str(path), *PIPELINE) == f"wrote {path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to show: add --show-schedule"),
        (["--show-actions", "2"], "--show-actions 2: expected 0 to 1"),
        (["--show-schedule", "--num-microbatches", "0"], "--num-microbatches is 0"),
        (["--show-schedule", "--encoder-run-ahead", "-1"], "--encoder-run-ahead is -1"),
        (["--show-schedule", "--llm-cost", "0"], "--llm-cost is 0: expected more than 0"),
        (["--show-schedule", "--llm-offset", "3"], "encoder grid [0, 1) and llm grid [3, 4) leave"),
        (["--show-schedul"], "unknown flag --show-schedul: the nearest is --show-schedule"),
        (["--png", "/nonexistent/a.png"], "--png /nonexistent/a.png cannot be written"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1
