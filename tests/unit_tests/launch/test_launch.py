"""Starting ranks, with targets that need no process group."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_mimo.launch.preload import can_fork
from megatron_mimo.launch.ranks import launch

# Whether ranks are forked is decided by the platform alone, so that no fault of `can_fork` skips a
# test: elsewhere each rank is an interpreter of its own, which the other tests here start.
FORKS = pytest.mark.skipif(
    sys.platform != "linux",
    reason="ranks are forked on Linux alone: libraries of macOS do not survive a fork, and it has "
    "no prctl",
)

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


def test_a_rank_that_does_not_end_when_told_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "target.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "ready = pathlib.Path(__file__).parent / 'ready'\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    ready.touch()\n"
        "    time.sleep(600)\n"
        "while not ready.exists():\n"
        "    time.sleep(0.01)\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    assert launch(2, [], str(script)) == 1
    assert "rank 1 failed first: exit code 3" in capfd.readouterr().err


@FORKS
def test_a_forked_rank_finds_what_a_new_interpreter_would(tmp_path: Path) -> None:
    (tmp_path / "forked_target.py").write_text(
        "import json, os, pathlib, sys, time\n"
        "ready = 'megatron.core' in sys.modules\n"
        "import torch\n"
        # Threads and CUDA would not survive a fork.
        "parent = len(os.listdir(f'/proc/{os.getppid()}/task')), torch.cuda.is_initialized()\n"
        "seen = [__name__, sys.argv, ready, torch.get_num_threads(), os.getsid(0) == os.getpid()]\n"
        "print(json.dumps([os.environ['RANK'], seen, parent]), flush=True)\n"
        # The launcher ends the others once a rank has failed, which are to print before.
        "said = pathlib.Path('said')\n"
        "if os.environ['RANK'] == '0':\n"
        "    said.touch()\n"
        "    sys.exit(0)\n"
        "while not said.exists():\n"
        "    time.sleep(0.01)\n"
        "sys.exit(3)\n"
    )
    launcher = (
        "import sys\n"
        "from megatron_mimo.launch.ranks import launch\n"
        "sys.exit(launch(2, ['--lr', '1'], 'forked_target', fork=True))\n"
    )
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", launcher],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    expected = ["__main__", [str(tmp_path / "forked_target.py"), "--lr", "1"], True, 1, True]
    found = sorted(map(json.loads, run.stdout.splitlines()))
    assert found == [[rank, expected, [1, False]] for rank in "01"], run.stderr
    assert run.stderr.endswith(
        "rank 1 failed first: exit code 3, before it could say why. Its output is above.\n"
    )
    assert run.returncode == 1


@FORKS
def test_nothing_is_left_of_a_launcher_that_is_killed_while_it_imports(tmp_path: Path) -> None:
    target = tmp_path / "target.py"
    target.write_text("import time\ntime.sleep(600)\n")
    call = f"launch(1, [], {str(target)!r}, fork=True)"
    start = f"from megatron_mimo.launch.ranks import launch; {call}"
    launcher = subprocess.Popen([sys.executable, "-c", start])
    try:
        server = wait_for_fork_server(launcher.pid)
        # The rank that is asked for now must not be forked when the imports are done.
        time.sleep(0.2)
        started = [server, *psutil.Process(launcher.pid).children(recursive=True)]
    finally:
        launcher.kill()
        launcher.wait()
    assert not left_of(started)


@FORKS
def test_ranks_that_are_done_leave_without_their_launcher(tmp_path: Path) -> None:
    target = tmp_path / "target.py"
    target.write_text(
        "import os, pathlib, time\n"
        "folder, rank = pathlib.Path(__file__).parent, os.environ['RANK']\n"
        "(folder / f'begun-{rank}').touch()\n"
        "while rank == '1' and not (folder / 'go').exists():\n"
        "    time.sleep(0.05)\n"
    )
    call = f"launch(2, [], {str(target)!r}, fork=True)"
    start = f"from megatron_mimo.launch.ranks import launch; {call}"
    launcher = subprocess.Popen([sys.executable, "-c", start])
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"begun-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline, "the ranks have not begun within a minute"
            time.sleep(0.05)
        started = psutil.Process(launcher.pid).children(recursive=True)
    finally:
        launcher.kill()
        launcher.wait()
    (tmp_path / "go").touch()
    assert not left_of(started)


def left_of(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still live after half a minute; they are killed."""
    deadline = time.monotonic() + 30
    while (alive := [one for one in processes if lives(one)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        process.kill()
    return alive


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_fork_server(launcher: int) -> psutil.Process:
    """The process that ranks are forked from, as soon as it exists."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(launcher).children():
            # Others come and go: importing torch asks the compiler for its version.
            with suppress(psutil.NoSuchProcess):
                if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                    return child
        time.sleep(0.005)
    raise TimeoutError("no fork server within a minute")


def test_ranks_of_hosts_are_forked_on_linux() -> None:
    assert can_fork("cpu") == (sys.platform == "linux")


@pytest.mark.parametrize("nproc", [0, -2])
def test_no_ranks_are_refused(nproc: int, target: Path) -> None:
    with pytest.raises(ValueError, match=f"--nproc {nproc}: expected at least 1"):
        launch(nproc, [], str(target))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no file train\.py to start"):
        launch(1, [], "train.py")
