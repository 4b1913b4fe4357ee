"""What leaves a border is one line of ours, and the library's error is behind it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.border import border, reason_of, take_traceback_flag

RAISED = (
    AssertionError(), KeyError("key"), RecursionError("maximum recursion depth exceeded"),
    FileNotFoundError(2, "No such file or directory", "a.yaml"), ValueError("two\nlines"),
    MemoryError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ZeroDivisionError("float division by zero"), StopIteration(), RuntimeError("\ud83d"),
    Exception("x" * 5000),
)  # fmt: skip


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
def test_anything_becomes_one_line_with_its_cause(raised: Exception) -> None:
    with (
        pytest.raises(ValueError, match=r"^a\.yaml is not such a thing \(.+\)$") as caught,
        border(lambda why: f"a.yaml is not such a thing ({why})"),
    ):
        raise raised
    text = str(caught.value)
    assert caught.value.__cause__ is raised
    assert len(text.splitlines()) == 1
    assert len(text) < 500
    text.encode()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_exits_pass(kind: type[BaseException]) -> None:
    with pytest.raises(kind), border(str):
        raise kind


@given(st.text())
def test_a_reason_is_one_line_that_says_something(text: str) -> None:
    for error in (ValueError(text), KeyError(text), OSError(2, text)):
        reason = reason_of(error)
        assert reason.strip()
        assert len(reason.split("\n")) == 1
        reason.encode()


def test_the_flag_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMO_TRACEBACK", "")
    assert take_traceback_flag(["train", "--traceback", "--lr", "1"]) == ["train", "--lr", "1"]


def prepare(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_mimo.cli", "data", "prepare", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_traceback_is_shown_on_request_only(tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 300))
    quiet = prepare(long)
    assert quiet.returncode == 2
    assert len(quiet.stderr.splitlines()) == 1
    assert "is not a source: File name too long" in quiet.stderr
    loud = prepare("--traceback", long)
    assert loud.returncode == 2
    assert "Traceback" in loud.stderr
    assert loud.stderr.splitlines()[-1] == quiet.stderr.splitlines()[-1]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": "note " * 99}) + "\n" for _ in range(99)))
    limited = (
        "import resource, signal, sys\n"
        "from megatron_mimo.cli import main\n"
        # Files may not grow beyond this: writing fails as on a full disk.
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for argv in (["prepare", str(source), "--out"], ["digits", "--num-train", "99", "--out"]):
        out = tmp_path / argv[0]
        run = subprocess.run(
            [sys.executable, "-c", limited, "data", *argv, str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 1
        assert "Traceback" not in run.stderr
        assert run.stderr.splitlines()[-1].startswith(f"error: {out} was not written: File too")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_names_of_files_need_be_no_unicode(tmp_path: Path) -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    (tmp_path / f"{name}.txt").write_text("A caption.")
    run = prepare(str(tmp_path), "--out", str(tmp_path.with_name("out")))
    assert run.returncode == 2
    assert r"caf\udce9.txt: no image beside it" in run.stderr
