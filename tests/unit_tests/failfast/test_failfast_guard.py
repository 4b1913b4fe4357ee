"""What a rank makes of its own end, tried with a single process."""

import json
import socket
from pathlib import Path

import pytest

from megatron_mimo.failfast import guard_rank
from megatron_mimo.failfast.wire import Link
from megatron_mimo.runtime.environment import first_node


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_success_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with guard_rank("everything") as guard:
        guard.training_starts()
    assert capfd.readouterr() == ("", "")


def test_an_exception_is_shown_with_rank_role_and_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end, guard_rank("everything"):
        raise KeyError("dog")
    assert end.value.code == 1
    shown = capfd.readouterr().err
    assert "rank 0 (everything) on" in shown
    assert "failed first: KeyError: 'dog'" in shown
    assert 'raise KeyError("dog")' in shown


def test_our_own_value_error_is_the_users_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, guard_rank("everything"):
        first_node("")
    assert end.value.code == 2
    expected = "error: no machine in the Slurm node list '': set MASTER_ADDR\n"
    assert capfd.readouterr().err == expected


def test_once_training_runs_a_value_error_is_a_failure(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end, guard_rank("everything") as guard:
        guard.training_starts()
        first_node("")
    assert end.value.code == 1
    assert "in first_node" in capfd.readouterr().err


def test_a_librarys_value_error_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, guard_rank("everything"):
        json.loads("{")
    assert end.value.code == 1
    assert "JSONDecodeError" in capfd.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (1, 1), ("no", 1)])
def test_exits_pass_through(code: object, expected: int) -> None:
    with pytest.raises(SystemExit) as end, guard_rank("everything"):
        raise SystemExit(code)
    assert end.value.code == expected


@pytest.mark.parametrize("code", [0, None])
def test_a_good_exit_stays_good(code: int | None) -> None:
    with pytest.raises(SystemExit) as end, guard_rank("everything"):
        raise SystemExit(code)
    assert not end.value.code


def test_torchrun_shows_the_failure_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
    with pytest.raises(SystemExit), guard_rank("everything"):
        assert "ended without a report" in record.read_text()
        raise KeyError("dog")
    assert "rank 0 (everything)" in record.read_text()
    assert "KeyError: 'dog'" in record.read_text()
    assert capfd.readouterr().err == ""


def test_success_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
    with guard_rank("everything"):
        assert record.exists()
    assert not record.exists()


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "0"])
def test_a_wrong_number_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MIMO_FAILFAST_SILENCE_S", value)
    with pytest.raises(ValueError, match=f"MIMO_FAILFAST_SILENCE_S='{value}'"):
        guard_rank("everything")


def test_a_wrong_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "a"}
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match="MASTER_PORT='a' is not a whole number"):
        guard_rank("everything")


def test_a_link_keeps_objects_apart() -> None:
    ours, theirs = (Link(end) for end in socket.socketpair())
    assert ours.send(kind="one")
    assert ours.send(kind="two", text="ä\n")
    assert theirs.receive_first(10.0) == {"kind": "one"}
    assert theirs.receive() == [{"kind": "two", "text": "ä\n"}]
    assert theirs.receive_first(0.0) is None
    ours.close()
    assert theirs.receive() is None
    assert not theirs.send(kind="three") or not theirs.send(kind="three")
