"""The command `megatron-mimo`: what it lists, what it refuses, what it starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_mimo import __version__, cli
from megatron_mimo.cli import main
from megatron_mimo.launch.preload import can_fork


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    assert [line.split()[0] for line in bare.splitlines() if line.startswith("  ")] == [
        "train",
        "demo",
        "demo-omni",
        "generate",
        "chat",
        "evaluate",
        "data",
        "plan",
        "checkpoint",
        "report",
        "parity",
        "doctor",
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_is_quick() -> None:
    imported = "import sys, megatron_mimo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], check=False).returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "megatron-mimo: unknown command 'trian': the nearest is 'train'"),
        (["data", "digit"], "megatron-mimo data: unknown command 'digit': the nearest is 'digits'"),
        (["train", "--nproc", "0"], "--nproc is 0: expected 1 to 65,536"),
        (["train", "--nprocs", "2"], "unknown flag --nprocs: the nearest is --nproc"),
        (["train", "--nproc", "2", "--lr", "x"], "--lr x: expected a number, not 'x'"),
        (["data", "digits", "--num-tran", "2"], "unknown flag --num-tran: the nearest is --num-tr"),
        (["demo", "--train-iter", "2"], "unknown flag --train-iter: the nearest is --train-iters"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


def test_a_wrong_grid_starts_no_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mimo.launch.ranks.launch", pytest.fail)
    assert main(["train", "--nproc", "3"]) == 2
    assert "leave ranks [2, 3) unused" in capsys.readouterr().err


@pytest.mark.parametrize("nproc", [["--nproc", "2"], ["--nproc=2"]])
def test_train_starts_ranks_with_the_flags_as_typed(
    nproc: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def launch(*args: object, fork: bool) -> int:
        started.append((*args, fork))
        return 7

    monkeypatch.setattr("megatron_mimo.launch.ranks.launch", launch)
    assert main(["train", "--lr", "0.5", *nproc, "--train-iters", "3"]) == 7
    typed = ["--lr", "0.5", "--train-iters", "3"]
    assert started == [(2, typed, "megatron_mimo.training", can_fork("auto"))]


def test_print_config_shows_the_resolved_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--nproc", "3", "--llm-dp", "2", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["encoder-offset"], shown["llm-offset"], shown["llm-dp"]) == (0, 1, 2)


def test_data_digits_writes_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    argv = ["data", "digits", "--out", str(out), "--num-train", "30", "--num-val", "20"]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"wrote 30 train and 20 val samples to {out}\n"
    assert (out / ".nv-meta").is_dir()
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {out} is not empty")
    assert main([*argv, "--overwrite"]) == 0


@pytest.mark.parametrize("start", ["megatron_mimo.cli", "megatron_mimo.training.__main__"])
def test_an_interrupt_during_imports_is_quiet(start: str) -> None:
    # tyro is among the first that they import.
    code = f"""
import os, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "tyro":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
# Programs that a shell starts in the background ignore it, and so do theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
import {start}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_of_a_command_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "plan", ("", interrupted))
    assert main(["plan"]) == 130
