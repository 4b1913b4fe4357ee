"""What a run shows of itself: the log line, TensorBoard, metrics.jsonl, and failing disks."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mimo.checkpoint.progress import Progress as RunProgress
from megatron_mimo.watch.metrics import IterationMetrics, MetricsLogger, log_line

FIFTH = IterationMetrics(
    iteration=5,
    consumed_samples=40,
    lm_loss=5.123456,
    grad_norm=2.558,
    learning_rate=1e-4,
    loss_scale=1.0,
    num_zeros=None,
    iteration_time_ms=123.4,
    global_batch_size=8,
    skipped_iterations=0,
    nan_iterations=0,
)
# As Megatron-LM prints it.
LINE = (
    " iteration        5/      20 | consumed samples:           40 | elapsed time per iteration"
    " (ms): 123.4 | learning rate: 1.0E-04 | global batch size:     8 | lm loss: 5.123456E+00 |"
    " loss scale: 1.0 | grad norm: 2.558 | number of skipped iterations:   0 | number of nan"
    " iterations:   0 |"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def lines(folder: Path) -> list[dict[str, float | None]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_line_is_megatrons() -> None:
    assert log_line(FIFTH, 20) == LINE


def test_counted_zeros_stand_behind_the_norm() -> None:
    line = log_line(dataclasses.replace(FIFTH, num_zeros=7, skipped_iterations=2), 20)
    assert "| grad norm: 2.558 | num zeros: 7 | number of skipped iterations:   2 |" in line


def test_the_fill_of_packed_sequences_stands_last(tmp_path: Path) -> None:
    packed = dataclasses.replace(FIFTH, packing_fill=0.98766)
    assert log_line(packed, 20) == f"{LINE} packing fill: 0.9877 |"
    for metrics, fill in ((packed, 0.98766), (FIFTH, None)):
        folder = tmp_path / str(fill)
        logger = MetricsLogger(20, str(folder), io.StringIO())
        logger.log_iteration(metrics)
        logger.close("done")
        assert lines(folder)[0].get("packing_fill") == fill
        assert ("packing fill" in scalars(folder)) == (fill is not None)


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    metrics = MetricsLogger(20, None, stream)
    metrics.log_iteration(FIFTH)
    metrics.log_evaluation(5, 40, 2.0)
    metrics.close("done")
    assert stream.getvalue() == (
        f"{LINE}\n"
        " validation loss at iteration 5 | lm loss value: 2.000000E+00 | lm loss PPL: "
        "7.389056E+00 |\n"
        "done\n"
    )


def test_terminal_has_a_bar_under_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    metrics = MetricsLogger(20, None, stream)
    metrics.log_iteration(FIFTH)
    shown = stream.getvalue()
    assert LINE in shown
    assert "5/20" in shown[shown.index(LINE) :]
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"
    metrics.close("done")
    assert stream.getvalue().endswith("done\n")


def test_scalars_have_megatrons_tags(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    metrics = MetricsLogger(20, str(folder), io.StringIO())
    metrics.log_iteration(dataclasses.replace(FIFTH, num_zeros=7))
    metrics.log_evaluation(5, 40, 2.0)
    metrics.close("done")
    values = {
        "lm loss": 5.123456,
        "learning-rate": 1e-4,
        "grad-norm": 2.558,
        "batch-size": 8,
        "loss-scale": 1.0,
        "num-zeros": 7,
        "iteration-time-ms": 123.4,
        "lm loss validation": 2.0,
        "lm loss validation ppl": math.exp(2),
    }
    expected = {tag: [(5, pytest.approx(value))] for tag, value in values.items()}
    expected |= {f"{tag} vs samples": [(40, pytest.approx(value))] for tag, value in values.items()}
    assert scalars(folder) == expected


def test_scalars_are_on_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = MetricsLogger(20, str(tmp_path), io.StringIO())
    metrics.log_iteration(FIFTH)
    assert scalars(tmp_path)["lm loss"] == [(5, pytest.approx(5.123456))]
    assert len(lines(tmp_path)) == 1
    metrics.close("done")


def test_json_has_every_digit(tmp_path: Path) -> None:
    metrics = MetricsLogger(20, str(tmp_path), io.StringIO())
    third = 1 / 3
    metrics.log_iteration(dataclasses.replace(FIFTH, lm_loss=third, grad_norm=third * 1e-7))
    metrics.log_evaluation(5, 40, third)
    metrics.close("done")
    training, validation = lines(tmp_path)
    assert training["lm_loss"] == third
    assert training["grad_norm"] == third * 1e-7
    assert "num_zeros" not in training
    assert validation["lm_loss_validation"] == third
    assert validation["iteration"] == training["iteration"] == 5


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    metrics = MetricsLogger(20, str(tmp_path), io.StringIO())
    metrics.log_iteration(
        dataclasses.replace(FIFTH, lm_loss=math.nan, grad_norm=math.inf, num_zeros=0)
    )
    metrics.log_evaluation(5, 40, math.nan)
    metrics.close("done")
    training, validation = lines(tmp_path)
    assert training["lm_loss"] is None
    assert training["grad_norm"] is None
    assert training["num_zeros"] == 0
    assert validation["lm_loss_validation"] is None


def test_a_diverged_validation_loss_has_a_finite_perplexity() -> None:
    stream = io.StringIO()
    MetricsLogger(20, None, stream).log_evaluation(5, 40, 1e6)
    assert "lm loss PPL: 4.851652E+08" in stream.getvalue()


def test_a_folder_that_is_a_file_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("")
    with pytest.raises(ValueError) as error:
        MetricsLogger(20, str(path), io.StringIO())
    assert str(error.value) == (
        f"--tensorboard-dir {path} cannot be written to: File exists; name another folder"
    )


def test_checkpoints_have_metrics_beside_them(tmp_path: Path) -> None:
    """Without event files, and appended to by the run that goes on."""
    for iteration in (5, 6):
        metrics = MetricsLogger(20, None, io.StringIO(), save=str(tmp_path))
        metrics.log_iteration(dataclasses.replace(FIFTH, iteration=iteration))
        metrics.close("done")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [line["iteration"] for line in lines(tmp_path)] == [5, 6]


def test_event_files_have_the_only_metrics(tmp_path: Path) -> None:
    logs, save = tmp_path / "logs", tmp_path / "save"
    metrics = MetricsLogger(20, str(logs), io.StringIO(), save=str(save))
    metrics.log_iteration(FIFTH)
    metrics.close("done")
    assert not save.exists()
    assert scalars(logs) and lines(logs)


def test_a_folder_of_checkpoints_that_is_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("")
    with pytest.raises(ValueError, match=f"^--save {path} cannot be written to: File exists; name"):
        MetricsLogger(20, None, io.StringIO(), save=str(path))


# Fills the disk after a few events, by a limit on the size of files, which the kernel enforces
# where it would enforce the end of the disk. ENOSPC in the message would need a small disk.
ON_A_SMALL_DISK = """
import resource, sys
from tests.unit_tests.watch.test_metrics import FIFTH
from megatron_mimo.watch.metrics import MetricsLogger

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    metrics = MetricsLogger(20, sys.argv[1])
    for _ in range(1000):
        metrics.log_iteration(FIFTH)
except (ValueError, RuntimeError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2000, "ValueError: --tensorboard-dir {path} cannot be written to: File too large; name"),
        (20000, "RuntimeError: cannot write metrics to --tensorboard-dir {path}: File too large;"),
    ],
)
def test_a_disk_that_is_full_stops_the_run_and_names_the_folder(
    tmp_path: Path, size: int, message: str
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path), str(size)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.startswith(message.format(path=tmp_path))
    assert len(run.stderr.splitlines()) == 1, run.stderr


def test_a_full_disk_says_to_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(ValueError, match=r"device; free space there, or name another folder$"):
        MetricsLogger(20, str(tmp_path), io.StringIO())
    assert not list(tmp_path.iterdir()), "the probe stays behind"


def test_loads_of_experts_are_scalars_by_layer(tmp_path: Path) -> None:
    from megatron_mimo.watch.experts import LayerLoad

    loads = (LayerLoad(2, (3, 1), 1.5), LayerLoad(5, (2, 2), 1.0))
    logger = MetricsLogger(10, str(tmp_path))
    logger.log_iteration(dataclasses.replace(FIFTH, experts=loads))
    logger.close("done")
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert "experts" not in written
    assert written["seq_load_balancing_loss"] == 1.25
    assert written["experts/max over mean load"] == 1.25
    assert written["experts/layer 2 most tokens"] == 3
    assert written["experts/layer 2 fewest tokens"] == 1
    assert written["experts/layer 5 max over mean load"] == 1
    assert LayerLoad(1, (0, 0), 0.0).max_over_mean == 1


@pytest.mark.parametrize("what", ["folder", "events", "metrics.jsonl"])
def test_files_that_are_removed_are_begun_again(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "curves"
    metrics = MetricsLogger(20, str(folder), io.StringIO())
    metrics.log_iteration(FIFTH)
    for path in sorted(folder.iterdir()):
        if what == "folder" or what in path.name:
            path.unlink()
    if what == "folder":
        folder.rmdir()
    for iteration in (6, 7):
        metrics.log_iteration(dataclasses.replace(FIFTH, iteration=iteration))
    metrics.log_evaluation(7, 40, 2.0)
    metrics.close("done")
    steps = [line["iteration"] for line in lines(folder)]
    assert steps == ([5, 6, 7, 7] if what == "events" else [6, 7, 7])
    shown = [step for step, _ in scalars(folder)["lm loss"]]
    assert shown == ([5, 6, 7] if what == "metrics.jsonl" else [6, 7])
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "begun again from iteration 6 on, earlier values are lost" in warning.getMessage()


def test_a_folder_that_cannot_come_back_ends_the_run_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "curves"
    metrics = MetricsLogger(20, str(folder), io.StringIO())
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(RuntimeError, match=f"^cannot write metrics to --tensorboard-dir {folder}:"):
        metrics.log_iteration(FIFTH)


def record(folder: Path, iterations: range, samples: int = 8) -> None:
    """A run that begins, or goes on, with the first of some iterations."""
    before = iterations.start - 1
    metrics = MetricsLogger(20, str(folder), io.StringIO())
    metrics.undo(RunProgress(before, before * samples))
    for iteration in iterations:
        metrics.log_iteration(
            dataclasses.replace(
                FIFTH,
                iteration=iteration,
                consumed_samples=iteration * samples,
                lm_loss=float(iteration + 100 * iterations.stop),
            )
        )
    metrics.close("done")


def test_a_run_that_goes_back_shows_no_step_twice(tmp_path: Path) -> None:
    for iterations in (range(1, 10), range(5, 8), range(3, 12)):
        record(tmp_path, iterations)
        shown = scalars(tmp_path)
        assert [step for step, _ in shown["lm loss"]] == list(range(1, iterations.stop))
        assert [step for step, _ in shown["lm loss vs samples"]] == [
            8 * iteration for iteration in range(1, iterations.stop)
        ]
    assert [value for _, value in scalars(tmp_path)["lm loss"]] == [
        *(1001, 1002),
        *(1200 + iteration for iteration in range(3, 12)),
    ]
    # Nothing is destroyed: neither lines, nor the events that were taken out.
    assert len(lines(tmp_path)) == 9 + 3 + 9
    assert len(list(tmp_path.glob("events.out.undone.*"))) == 2


def test_event_files_that_are_cut_off_are_undone_as_far_as_they_go(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6))
    (path,) = tmp_path.glob("events.out.tfevents.*")
    path.write_bytes(path.read_bytes()[:-7] + b"\xff" * 3)
    record(tmp_path, range(3, 5))
    assert [step for step, _ in scalars(tmp_path)["lm loss"]] == [1, 2, 3, 4]


def test_a_run_that_only_goes_on_leaves_event_files_alone(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    (path,) = tmp_path.glob("events.out.tfevents.*")
    before = path.stat()
    record(tmp_path, range(4, 6))
    after = path.stat()  # Whoever reads the file may change its time of access.
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert not list(tmp_path.glob("events.out.undone.*"))
