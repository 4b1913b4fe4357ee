"""Starting ranks, with targets that need no process group."""

import os
from pathlib import Path

import pytest

from megatron_mimo.training.launch import launch

INHERITED = ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "GLOO_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores what `launch` sets for the ranks."""
    for name in INHERITED:
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Writes its rank and arguments to a file; rank 1 fails if told to."""
    script = tmp_path / "target.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "rank = os.environ['RANK']\n"
        "seen = ' '.join([rank, os.environ['WORLD_SIZE'], *sys.argv[1:]])\n"
        "(pathlib.Path(__file__).parent / f'seen-{rank}').write_text(seen)\n"
        "print('said by', rank)\n"
        "sys.exit(3 if rank == '1' and 'fail' in sys.argv else 0)\n"
    )
    return script


def test_every_rank_gets_its_arguments(target: Path) -> None:
    assert launch(2, ["--lr", "1"], str(target)) == 0
    seen = [(target.parent / f"seen-{rank}").read_text() for rank in range(2)]
    assert seen == ["0 2 --lr 1", "1 2 --lr 1"]


def test_a_module_is_started_by_name(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(target.parent))
    assert launch(1, [], "target") == 0
    assert (target.parent / "seen-0").read_text() == "0 1"


def test_a_rank_without_a_report_is_named(target: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["fail"], str(target)) == 1
    expected = "rank 1 failed first: exit code 3, before it could say why. Its output is above.\n"
    assert capfd.readouterr().err.endswith(expected)


def test_output_is_also_written_to_files(
    target: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    assert launch(2, [], str(target), log_dir=logs) == 0
    written = sorted(path.read_text() for path in logs.rglob("stdout.log"))
    assert written == ["said by 0\n", "said by 1\n"]
    shown = capfd.readouterr().out
    assert "said by 0" in shown
    assert "said by 1" in shown


@pytest.mark.parametrize("nproc", [0, -2])
def test_no_ranks_are_refused(nproc: int, target: Path) -> None:
    with pytest.raises(ValueError, match=f"--nproc {nproc}: expected at least 1"):
        launch(nproc, [], str(target))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no file train\.py to start"):
        launch(1, [], "train.py")
