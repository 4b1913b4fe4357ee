"""Folders of a run are tried before anything is built."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.runtime import RuntimeContext
from megatron_mimo.runtime.device import Device
from megatron_mimo.training.folders import require_folders


def require(*flags: str, local_rank: int = 0) -> None:
    resolved = resolve(parse(flags, CommandLine, prog="train").train, 1)
    require_folders(
        resolved,
        RuntimeContext(rank=0, local_rank=local_rank, world_size=1, device=Device("cpu")),
    )


@pytest.mark.parametrize(
    ("flag", "more"),
    [
        ("--save", ()),
        ("--dataloader-save", ()),
        ("--save-activations", ()),
        ("--timeline-dir", ("--timeline-profile",)),
        ("--timeline-dir", ("--profile",)),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, flag: str, more: tuple[str, ...]
) -> None:
    require(flag, str(tmp_path / "new"), *more)
    assert (tmp_path / "new").is_dir()
    taken = tmp_path / "taken"
    taken.write_text("")
    require(flag, str(taken / "a"), *more, local_rank=1)
    with pytest.raises(ValueError, match=f"^{flag} {taken / 'a'} cannot be written to: Not a dir"):
        require(flag, str(taken / "a"), *more)


def test_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_mimo.cli", "train", "--train-iters", "1"),
            *("--timeline-profile", "--profile-step-start", "1", "--profile-step-end", "2"),
            *("--timeline-dir", str(tmp_path / "taken")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 2
    assert f"--timeline-dir {tmp_path / 'taken'} cannot be written to: File exists" in run.stderr
    assert "Traceback" not in run.stderr and "iteration" not in run.stdout
