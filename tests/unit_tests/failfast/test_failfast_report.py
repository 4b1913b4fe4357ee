"""The text of a failure, and the record that torchrun reads."""

import json
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_mimo.failfast.report import (
    FailureReport,
    Kind,
    died,
    is_ahead,
    read_record,
    render,
    write_own_record,
    write_record,
    write_record_ahead,
)

FIRST = FailureReport(
    kind=Kind.EXCEPTION,
    rank=2,
    role="encoder dp 0 tp 1",
    host="node7",
    summary="RuntimeError: boom\nsecond line",
    traceback="Traceback (most recent call last):\n  in train\nRuntimeError: boom\nsecond line",
    seconds=1000.7,
)
DEAD = died(2, "llm dp 0", "node7", 1000.7)


def as_torchrun_shows(folder: Path, ranks: list[int], exit_code: int = 1) -> str:
    """The summary that torchrun prints, given the files and the order of its noticing."""
    failures = {
        rank: ProcessFailure(
            local_rank=rank, pid=rank, exitcode=exit_code, error_file=str(folder / str(rank))
        )
        for rank in ranks
    }
    return ChildFailedError("train", failures).format_msg().partition("Root Cause")[2]


def test_the_block_has_rank_role_and_traceback() -> None:
    lines = render(FIRST).splitlines()
    assert lines[1] == ("rank 2 (encoder dp 0 tp 1) on node7 failed first: RuntimeError: boom")
    assert "\n".join(lines[3:-1]) == FIRST.traceback


def test_wrong_usage_is_one_line() -> None:
    report = FailureReport(
        kind=Kind.USAGE,
        rank=0,
        role="llm",
        host="node7",
        summary="--lr -1: expected a positive number",
        traceback="Traceback",
        seconds=0.0,
    )
    assert render(report) == "error: --lr -1: expected a positive number"
    assert report.exit_code == 2


def test_json_and_back() -> None:
    assert FailureReport.from_json(json.loads(json.dumps(FIRST.to_json()))) == FIRST


def test_a_long_traceback_keeps_both_ends() -> None:
    text = "begin" + "x" * 100_000 + "end"
    short = FailureReport.from_json({**FIRST.to_json(), "traceback": text}).to_json()["traceback"]
    assert len(short) < 20_000
    assert short.startswith("begin")
    assert short.endswith("end")


def test_how_a_process_died() -> None:
    crash = (
        "Fatal Python error: Segmentation fault\n\n"
        "Thread 0x1 (most recent call first):\n  File guard.py in _obey\n\n"
        "Current thread 0x2 (most recent call first):\n  File train.py in step\n\n"
        "Extension modules: numpy"
    )
    summary_of = {
        code: died(0, "llm", "h", 0.0, exit_code=code).summary for code in (-9, -77, 7, None)
    }
    assert summary_of[-9] == "killed by signal 9 (SIGKILL)"
    assert summary_of[-77] == "killed by signal 77 (unknown)"
    assert summary_of[7] == "ended with exit code 7 and without an exception"
    assert "kill -9" in summary_of[None]
    crashed = died(0, "llm", "h", 0.0, exit_code=-11, crash=crash)
    assert crashed.summary == "Fatal Python error: Segmentation fault"
    assert "train.py" in crashed.traceback
    assert "_obey" not in crashed.traceback
    assert "Extension" not in crashed.traceback


def test_torchrun_shows_the_first_failure_whatever_it_noticed_first(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        write_record(str(tmp_path / str(rank)), FIRST, rank=rank, role="llm", host="node7")
    shown = as_torchrun_shows(tmp_path, [0, 2, 1])
    assert "rank      : 2" in shown
    assert "rank 2 (encoder dp 0 tp 1) on node7 failed first" in shown
    assert "in train" in shown


def test_torchrun_on_another_machine_shows_the_traceback_too(tmp_path: Path) -> None:
    write_record(str(tmp_path / "5"), FIRST, rank=5, role="llm", host="node8")
    shown = as_torchrun_shows(tmp_path, [5])
    assert "rank 5 (llm) ends, because rank 2 (encoder dp 0 tp 1) failed" in shown
    assert "in train" in shown


def test_torchrun_shows_the_killed_rank_whose_end_it_noticed_first(tmp_path: Path) -> None:
    # Rank 2 is killed; torchrun reads its record before the watcher could replace it, and then
    # ends the others by signals. Rank 0 hears the verdict before, rank 1 does not.
    for rank in (0, 1, 2):
        ahead = died(rank, f"role {rank}", "node7", 900.0)
        write_record_ahead(str(tmp_path / str(rank)), ahead)
    write_record(str(tmp_path / "0"), DEAD, rank=0, role="llm", host="node7")
    ended = died(1, "role 1", "node7", 1001.0, exit_code=-15)
    write_own_record(str(tmp_path / "1"), ended, maybe_ended=True)
    shown = as_torchrun_shows(tmp_path, [2, 0, 1], exit_code=-9)
    assert "rank      : 2" in shown
    assert "rank 2 (role 2) on node7 ended without a report: killed by a signal" in shown


def test_an_exception_is_older_than_what_was_written_ahead(tmp_path: Path) -> None:
    write_record_ahead(str(tmp_path / "0"), died(0, "llm", "node7", 900.0))
    write_own_record(str(tmp_path / "2"), FIRST, maybe_ended=False)
    shown = as_torchrun_shows(tmp_path, [0, 2])
    assert "rank      : 2" in shown


def test_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_record_ahead(str(path), DEAD)
    assert is_ahead(json.loads(path.read_text()))
    write_record(str(path), FIRST, rank=0, role="llm", host="node7")
    record = json.loads(path.read_text())
    assert not is_ahead(record)
    assert read_record(record) == FIRST
    assert read_record({"message": "somebody else's"}) is None
    assert list(tmp_path.iterdir()) == [path]


def test_without_torchrun_nothing_is_written(tmp_path: Path) -> None:
    write_record("", FIRST, rank=0, role="llm", host="node7")
    write_record(str(tmp_path / "gone" / "record"), FIRST, rank=0, role="llm", host="node7")
    assert list(tmp_path.iterdir()) == []
