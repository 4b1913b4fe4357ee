"""`megatron-mimo plan`: the drawing, the list of actions, the picture, and what it refuses."""

import re
from pathlib import Path

import pytest
from PIL import Image

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


@pytest.mark.parametrize("cost", [1e-3, 1e6])
def test_the_unit_of_the_costs_does_not_change_the_picture(
    cost: float, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = []
    for encoder, llm in ((1.0, 1.0), (cost, cost)):
        path = tmp_path / f"{encoder}.png"
        costs = ("--encoder-cost", str(encoder), "--llm-cost", str(llm))
        plan(capsys, "--png", str(path), *PIPELINE, *costs)
        sizes.append(Image.open(path).size)
    (width, height), (other, _) = sizes
    assert abs(width - other) < 40 and width < 1000 and height < 400


def test_a_picture_is_bounded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Costs a million times apart, and a long step."""
    path = tmp_path / "schedule.png"
    many = ("--encoder-cost", "1e-3", "--llm-cost", "1000", "--num-microbatches", "20")
    out = plan(capsys, "--show-schedule", "--png", str(path), *many)
    assert max(map(len, out.splitlines())) < 4100
    assert max(Image.open(path).size) < 7000


def test_training_stages_draw_what_they_compute(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = {
        stage: plan(capsys, "--show-schedule", *PIPELINE, "--training-stage", stage)
        for stage in ("stage1", "stage2", "stage3")
    }
    # 3 microbatches: encoder and language model, forward 1 and backward 2 each.
    assert "|e0" in drawn["stage3"] and "is frozen" not in drawn["stage3"]
    for stage in ("stage1", "stage2"):
        assert "|e0" not in drawn[stage]
        assert "encoder: vision is frozen; the backward of the rest is short" in drawn[stage]
    takes = {
        stage: float(re.findall(r"the step takes ([\d.]+)", out)[0]) for stage, out in drawn.items()
    }
    # The language model's three backwards on a pipeline of two stages: half as long when frozen.
    assert takes["stage1"] < takes["stage2"] < takes["stage3"]
    assert "llm send grad" in plan(
        capsys, "--show-actions", "1", *PIPELINE, "--training-stage", "stage1"
    )


def test_it_takes_the_file_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "llm-pp: 2\nmicro-batch-size: 2\nglobal-batch-size: 6\ntraining-stage: stage2\n"
        "train-iters: 100\ngrids: {encoder: {dp: 2}}\n"
    )
    from_file = plan(capsys, "--show-schedule", "--config", str(file))
    flags = ("--encoder-dp", "2", "--training-stage", "stage2")
    assert from_file == plan(capsys, "--show-schedule", *PIPELINE, *flags)
    # The command line wins.
    assert "layout: 8 ranks" in plan(
        capsys, "--show-schedule", "--config", str(file), "--llm-dp", "3"
    )
    assert "llm-pp: 2" in plan(capsys, "--print-config", "--config", str(file))


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
        (["--show-schedule", "--global-batch-size", "3", "--llm-dp", "2"], "--global-batch-size 3"),
        (["--show-schedule", "--config", "no.yaml"], "--config no.yaml cannot be read: "),
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
