"""`megatron-mimo parity`: reading curves, comparing them, and comparing saved activations."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_mimo.cli import main
from megatron_mimo.tools.curves import NORM, read_run
from megatron_mimo.tools.parity.command import default_steps
from megatron_mimo.tools.parity.compare import relative_difference
from megatron_mimo.watch.event_file import EventFile
from megatron_mimo.watch.saved_activations import (
    EMBEDDINGS,
    LOGITS,
    METADATA,
    POSITIONS,
    PROJECTOR,
    SavedFile,
    SavedSample,
    step_folder,
)

LOSSES = {step: 4.0 - 0.01 * step for step in range(1, 31)}
NORMS = {step: 2.0 + 0.1 * step for step in range(1, 31)}


def write_jsonl(
    folder: Path, losses: Mapping[int, float | None], norms: Mapping[int, float | None] | None
) -> Path:
    """As a run appends to it."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step, loss in losses.items():
            entry = {"iteration": step, "consumed_samples": 8 * step, "lm_loss": loss}
            if norms is not None:
                entry["grad_norm"] = norms[step]
            file.write(json.dumps(entry) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"iteration": step, "lm_loss_validation": 9.0}) + "\n")
    return folder


def write_events(
    folder: Path, losses: Mapping[int, float], norms: Mapping[int, float], **how: bool
) -> Path:
    """As stock Megatron does, with torch's writer."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for step, loss in losses.items():
        writer.add_scalar("lm loss", loss, step, **how)
        writer.add_scalar("lm loss vs samples", loss, 8 * step, **how)
        writer.add_scalar("grad-norm", norms[step], step, **how)
        writer.add_scalar("learning-rate", 1e-4, step, **how)
    writer.close()
    return folder


def changed(values: Mapping[int, float], **steps: float) -> dict[int, float]:
    """With other values at some steps: `_3=1.0`."""
    return {**values, **{int(step[1:]): value for step, value in steps.items()}}


def parity(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["parity", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a", LOSSES, NORMS)


def test_equal_runs_pass(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = write_jsonl(tmp_path / "b", LOSSES, NORMS)
    code, out, err = parity(capsys, a, b)
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [
        "PASS: loss within 1e-05: equal at every step",
        "gradient norm within 0.0001: equal at every step",
    ]
    shown = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert shown == ["1", "2", "3", "10", "30", "worst"]


def test_a_difference_fails_and_names_its_first_step(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = changed(LOSSES, _7=LOSSES[7] * 1.002, _9=LOSSES[9] * 0.99, _12=LOSSES[12] * 1.000001)
    b = write_jsonl(tmp_path / "b", losses, NORMS)
    report = tmp_path / "report.json"
    code, out, _ = parity(capsys, a, b, "--steps", "7,9", "--json", report)
    assert code == 3
    assert (
        "FAIL: loss beyond 1e-05 first at step 7: 3.93 in RUN_A, 3.93786 in RUN_B (+2.00e-03); "
        "in 2 of 30 steps, most at step 9 (-1.00e-02)\n" in out
    )
    assert "gradient norm within 0.0001: equal at every step" in out
    found = json.loads(report.read_text())
    assert found["verdict"] == "FAIL"
    loss, norm = found["quantities"]["lm_loss"], found["quantities"]["grad_norm"]
    assert loss["first_beyond"]["step"] == 7
    assert loss["worst"]["relative"] == pytest.approx(-0.01)
    assert len(loss["steps"]) == 30
    assert norm["first_beyond"] is None
    assert parity(capsys, a, b, "--tolerance", "0.02")[0] == 0
    assert parity(capsys, a, b, "--tolerance", "0.005")[0] == 3


def test_the_gradient_norm_has_a_tolerance_of_its_own(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = write_jsonl(tmp_path / "b", LOSSES, changed(NORMS, _2=NORMS[2] * 1.001))
    code, out, _ = parity(capsys, a, b, "--tolerance", "1")
    assert code == 3
    assert "FAIL: loss within 1: equal" in out
    assert "gradient norm beyond 0.0001 first at step 2: 2.2 in RUN_A, 2.2022 in RUN_B" in out
    assert parity(capsys, a, b, "--norm-tolerance", "0.01")[0] == 0


@pytest.mark.parametrize("new_style", [False, True])
def test_event_files_of_torchs_writer(
    new_style: bool, a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = write_events(tmp_path / "deep" / "tensorboard", LOSSES, NORMS, new_style=new_style)
    run = read_run(str(tmp_path / "deep"))
    assert list(run.loss) == list(LOSSES)
    assert run.curves[NORM.tag] == pytest.approx(NORMS, rel=1e-7)
    # They have float32.
    assert parity(capsys, a, events, "--tolerance", "1e-7", "--norm-tolerance", "1e-7")[0] == 0
    assert parity(capsys, a, events, "--tolerance", "0")[0] == 3
    (file,) = events.iterdir()
    assert read_run(str(file)).curves == run.curves


def test_metrics_jsonl_is_preferred_to_event_files(a: Path) -> None:
    write_events(a, {1: 0.0}, {1: 0.0})
    assert read_run(str(a)).loss == LOSSES


def test_a_resume_undoes_what_comes_behind_it(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {step: 9.9 for step in range(8, 13)}
    head = {step: LOSSES[step] for step in range(1, 8)}
    tail = {step: LOSSES[step] for step in range(8, 11)}
    b = write_jsonl(tmp_path / "b", head | wrong, NORMS)
    write_jsonl(b, tail, NORMS)
    code, out, _ = parity(capsys, a, b)
    assert code == 0
    assert (
        "note: RUN_B went back and wrote steps 8, 9, 10, 11, 12 again, as after a resume: what it "
        "wrote last counts\n" in out
    )
    # The steps of the abandoned end are gone.
    assert "RUN_A has 30 steps from 1 to 30, RUN_B 10 steps from 1 to 10: 10 in common" in out
    # Event files: one for each start of the run.
    events = tmp_path / "events"
    events.mkdir()
    for losses in (head | wrong, tail):
        file = EventFile(events)
        for step, loss in losses.items():
            file.add_scalars({"lm loss": loss, "grad-norm": NORMS[step]}, step)
        file.close()
    assert read_run(str(events)).loss == pytest.approx(head | tail)


def test_a_resume_undoes_every_curve(tmp_path: Path) -> None:
    run = write_jsonl(tmp_path / "run", LOSSES, NORMS)  # Evaluates at 10, 20 and 30.
    write_jsonl(run, {step: LOSSES[step] for step in range(12, 16)}, NORMS)
    curves = read_run(str(run)).curves
    assert list(curves["lm loss validation"]) == [10]
    assert list(curves["grad-norm"]) == list(range(1, 16))


def test_a_missing_gradient_norm_is_said(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = write_jsonl(tmp_path / "b", LOSSES, None)
    code, out, _ = parity(capsys, a, b)
    assert code == 0
    assert "note: gradient norm: not in RUN_B, so not compared\n" in out
    assert "gradient norm within" not in out


def test_what_is_not_finite_in_one_run_fails(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = write_jsonl(tmp_path / "b", changed(LOSSES, _5=None), NORMS)  # type: ignore[arg-type]
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    code, out, _ = parity(capsys, a, b, "--tolerance", "1e9", "--json", report, "--png", picture)
    assert code == 3
    assert (
        "first at step 5: 3.95 in RUN_A, nan in RUN_B (RUN_B not finite); in 1 of 30 steps" in out
    )
    assert json.loads(report.read_text())["quantities"]["lm_loss"]["worst"]["b"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(RUN_A not finite)" in parity(capsys, b, a)[1]


def test_what_is_not_finite_in_both_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    norms = changed(NORMS, _1=None, _2=None)  # type: ignore[arg-type]
    runs = [write_jsonl(tmp_path / name, LOSSES, norms) for name in "ab"]
    code, out, _ = parity(capsys, *runs)
    assert code == 0
    assert "note: gradient norm: not finite in both runs at steps 1, 2, so not compared" in out
    runs = [write_jsonl(tmp_path / name, {1: None}, {1: 1.0}) for name in "cd"]
    code, _, err = parity(capsys, *runs)
    assert code == 2
    assert "is not finite at any common step: nothing to compare" in err


def test_other_log_intervals_are_said(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = write_jsonl(tmp_path / "b", {10: LOSSES[10], 20: LOSSES[20], 30: LOSSES[30]}, NORMS)
    code, out, _ = parity(capsys, a, b)
    assert code == 0
    assert "RUN_A logs every 1 iterations, RUN_B every 10: our losses are means" in out


def test_a_run_that_is_cut_off_in_a_line(a: Path) -> None:
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 31, "lm_lo')
    assert read_run(str(a)).loss == LOSSES


def test_a_picture(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = write_jsonl(tmp_path / "b", changed(LOSSES, _5=3.0), NORMS)
    picture = tmp_path / "parity.png"
    code, out, _ = parity(capsys, a, b, "--png", picture)
    assert code == 3
    assert f"wrote {picture}\n" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_default_steps() -> None:
    assert default_steps(range(1, 1201)) == (1, 2, 3, 10, 100, 1000, 1200)
    assert default_steps([5, 10, 15, 20, 25]) == (5, 10, 15, 25)
    assert default_steps([7]) == (7,)


def test_relative_difference() -> None:
    assert relative_difference(2.0, 2.1) == pytest.approx(0.05)
    assert relative_difference(-2.0, -2.1) == pytest.approx(-0.05)
    assert relative_difference(0.0, 0.0) == 0.0
    assert relative_difference(0.0, -1.0) == -math.inf
    assert math.isnan(relative_difference(1.0, math.inf))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a"], "expected RUN_A and RUN_B, got 1 (a)"),
        (["a", "nowhere"], "nowhere does not exist: expected a run's folder"),
        (["a", "empty"], "empty has neither metrics.jsonl nor event files"),
        (["a", "two"], "two has curves in 2 folders, two/x, two/y: name one"),
        (["a", "later"], "no step in common: a has 30 steps from 1 to 30, later 1 steps from 99"),
        (["a", "damaged"], "damaged/metrics.jsonl, line 2: expected an object with an iteration"),
        (["a", "other"], "has no 'lm loss': found loss, lr; is it the folder of another run"),
        (["a", "a/notes.txt"], "a/notes.txt is neither metrics.jsonl nor an event file"),
        (["a", "a", "--steps", "1,x"], "--steps 1,x: expected iterations, as in 1,2,3,10"),
        (["a", "a", "--steps", "1,99"], "--steps 1,99: the runs have no common loss at step 99"),
        (["a", "a", "--tolerance", "-1"], "--tolerance is -1: expected 0 to"),
        (["a", "a", "--tolerance", "nan"], "--tolerance is nan"),
        (["a", "a", "--norm-tolerance", "inf"], "--norm-tolerance is inf"),
        (["a", "a", "--tolerence", "1"], "unknown flag --tolerence: the nearest is --tolerance"),
        (["a", "a", "--png", "no/such/a.png"], "--png no/such/a.png cannot be written"),
        (["a", "a", "--json", "no/such/a.json"], "--json no/such/a.json cannot be written"),
        (["--tensors", "a", "a", "--png", "x"], "--png shows curves, which --tensors does not"),
        (["--tensors", "a", "a"], "a has no saved activations (step-N/)"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    argv: list[str],
    message: str,
    a: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in "xy":
        write_jsonl(tmp_path / "two" / name, LOSSES, NORMS)
    write_jsonl(tmp_path / "later", {99: 1.0}, {99: 1.0})
    write_jsonl(tmp_path / "damaged", {1: 1.0}, {1: 1.0})
    with (tmp_path / "damaged" / "metrics.jsonl").open("a") as file:
        file.write("[]\n")
    (tmp_path / "other").mkdir()
    events = EventFile(tmp_path / "other")
    events.add_scalars({"loss": 1.0, "lr": 1.0}, 1)
    events.close()
    (a / "notes.txt").touch()
    code, _, err = parity(capsys, *argv)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


SIZES = {"x": 6, "y": 4}
WIDTHS = {PROJECTOR: 8, EMBEDDINGS: 8, LOGITS: 12}


def values(point: str, key: str) -> torch.Tensor:
    seed = [PROJECTOR, EMBEDDINGS, LOGITS].index(point) * 10 + ord(key)
    random = torch.Generator().manual_seed(seed)
    return torch.randn(SIZES[key], WIDTHS[point], generator=random)


def save(
    folder: Path,
    *,
    rows: int = 1,
    columns: int = 1,
    add: Mapping[tuple[str, str, int], float] | None = None,
    step: int = 3,
    keys: str = "xy",
    points: tuple[str, ...] = (PROJECTOR, EMBEDDINGS, LOGITS),
    scale: float = 1.0,
) -> Path:
    """Activations of samples, each cut into parts by rows, zig-zag, and by columns.

    Args:
        folder: --save-activations.
        rows: Ranks that share positions.
        columns: Ranks that share columns.
        add: (point, key, position) -> what to add there.
        step: Iteration.
        keys: Samples.
        points: Saved.
        scale: Multiplies every value.
    """
    for point in points:
        where = step_folder(str(folder), step) / point.replace(" ", "-")
        where.mkdir(parents=True)
        each = WIDTHS[point] // columns
        for row in range(rows):
            for column in range(columns):
                tensors, samples = {}, []
                for number, key in enumerate(keys):
                    whole = values(point, key) * scale
                    for (at_point, at_key, position), value in (add or {}).items():
                        if (at_point, at_key) == (point, key):
                            whole[position] += value
                    held = torch.arange(SIZES[key])[row::rows].flip(0)
                    tensors[key] = whole[held, column * each : (column + 1) * each].contiguous()
                    tensors[key + POSITIONS] = held
                    samples.append(
                        SavedSample(
                            name=key,
                            key=key,
                            lane=number if rows > 1 else 0,
                            microbatch=0,
                            index=number,
                            size=SIZES[key],
                        )
                    )
                about = SavedFile(
                    point=point,
                    first_column=column * each,
                    width=WIDTHS[point],
                    samples=tuple(samples),
                )
                name = f"rank-{row * columns + column:05}-microbatch-00000.safetensors"
                save_file(tensors, where / name, {METADATA: about.to_json()})
    return folder


def test_activations_of_other_layouts_are_put_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, many = save(tmp_path / "one"), save(tmp_path / "many", rows=2, columns=4)
    report = tmp_path / "report.json"
    code, out, err = parity(capsys, "--tensors", one, many, "--json", report)
    assert (code, err) == (0, "")
    assert "PASS: every sample within 1e-05 at 3 points; at most 0.00e+00" in out
    (step,) = json.loads(report.read_text())["steps"].values()
    assert [point["point"] for point in step["points"]] == [PROJECTOR, EMBEDDINGS, LOGITS]
    assert [point["cosine"] for point in step["points"]] == pytest.approx([1, 1, 1])
    # The folder of a step will do.
    assert parity(capsys, "--tensors", one / "step-00000003", many)[0] == 0


def test_the_first_point_that_parts_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save(tmp_path / "one")
    fault = {(EMBEDDINGS, "y", 2): 0.5, (LOGITS, "x", 1): 50.0}
    many = save(tmp_path / "many", rows=2, columns=2, add=fault)
    report = tmp_path / "report.json"
    code, out, _ = parity(capsys, "--tensors", one, many, "--json", report)
    assert code == 3
    assert (
        "FAIL: the runs differ at combined embeddings (projector output agree): 1 of 2 samples "
        "differ by more than 1e-05, most 'y' by" in out
    )
    assert "there most at position 2 (0.5)" in out
    (step,) = json.loads(report.read_text())["steps"].values()
    embeddings = step["points"][1]
    here, there = values(EMBEDDINGS, "y"), values(EMBEDDINGS, "y")
    there[2] += 0.5
    apart = (here - there).double()
    whole = [torch.cat([values(EMBEDDINGS, "x"), one]).double().flatten() for one in (here, there)]
    assert embeddings["largest"] == pytest.approx(0.5)
    assert embeddings["mean"] == pytest.approx(float(apart.abs().sum()) / 80)
    assert embeddings["cosine"] == pytest.approx(
        float(torch.nn.functional.cosine_similarity(*whole, dim=0))
    )
    assert embeddings["samples"][1]["relative"] == pytest.approx(
        float(apart.norm() / here.double().norm())
    )


def test_a_scale_leaves_the_cosine_and_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other", scale=1.5)
    code, out, _ = parity(capsys, "--tensors", one, other)
    assert code == 3
    assert "differ at projector output: 2 of 2 samples differ" in out
    assert "1.000000000" in out
    assert parity(capsys, "--tensors", one, other, "--tolerance", "0.6")[0] == 0


def test_activations_that_are_not_finite_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save(tmp_path / "one")
    other = save(tmp_path / "other", add={(LOGITS, "x", 4): math.nan})
    code, out, _ = parity(capsys, "--tensors", one, other, "--tolerance", "100")
    assert code == 3
    assert "the runs differ at logits (projector output, combined embeddings agree): 1 of 2" in out
    assert "at position 4 (inf)" in out


def test_runs_that_read_other_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other", keys="x")
    for first, second, name in ((one, other, "A"), (other, one, "B")):
        code, out, _ = parity(capsys, "--tensors", first, second)
        assert code == 3
        assert f"the runs read other samples: 1 of 2 samples at {PROJECTOR}, such as 'y'" in out
        assert f"are in {name} alone" in out
    silent = save(tmp_path / "silent", points=(EMBEDDINGS, LOGITS))
    code, out, _ = parity(capsys, "--tensors", one, silent)
    assert code == 3
    assert "FAIL: projector output: only in A" in out


def test_activations_that_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, many = save(tmp_path / "one"), save(tmp_path / "many", rows=2, columns=2)
    other = save(tmp_path / "other", step=4)
    code, _, err = parity(capsys, "--tensors", one, other)
    assert code == 2
    assert "no step in common: " in err
    assert "step 3, " in err
    assert "step 4; save the same one with --save-activations-step" in err
    lost = (
        many / "step-00000003" / "combined-embeddings" / "rank-00002-microbatch-00000.safetensors"
    )
    whole = lost.read_bytes()
    lost.unlink()
    code, _, err = parity(capsys, "--tensors", one, many)
    assert code == 2
    assert "36 of 48 values; files of a rank are missing, or of another run" in err
    lost.write_bytes(whole[:50])
    code, _, err = parity(capsys, "--tensors", one, many)
    assert code == 2
    assert f"{lost} is damaged: " in err
    save_file({"x": torch.zeros(1)}, lost)
    assert f"{lost} is damaged: not the description" in parity(capsys, "--tensors", one, many)[2]
    lost.write_bytes(whole)
    assert parity(capsys, "--tensors", one, many)[0] == 0
