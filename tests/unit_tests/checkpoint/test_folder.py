"""Checkpoint folders: trackers, checksums, publication, locks."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_mimo.checkpoint import folder as folders


def stage(root: Path, iteration: int, token: str = "a") -> Path:
    staged = folders.staging_folder(root, iteration, token)
    staged.mkdir(parents=True)
    (staged / "weights").write_bytes(b"w" * iteration)
    (staged / "common.pt").write_bytes(b"c")
    found = {name: folders.checksum(staged / name) for name in folders.files_of(staged)}
    folders.write_checksums(staged, found)
    return staged


def save(root: Path, *iterations: int) -> None:
    for iteration in iterations:
        folders.publish(stage(root, iteration), root, iteration)


def faults(root: Path, iteration: int) -> list[str]:
    folder = folders.iteration_folder(root, iteration)
    expected = folders.read_checksums(folder)
    return folders.check_files(folder, expected, expected)


def test_nothing_saved_is_no_iteration(tmp_path: Path) -> None:
    assert folders.latest_iteration(tmp_path) is None
    assert folders.latest_iteration(tmp_path / "absent") is None


def test_a_published_checkpoint_is_the_latest(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    assert folders.latest_iteration(tmp_path) == 10
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert (tmp_path / "iter_0000005").is_dir()
    assert faults(tmp_path, 10) == []


def test_what_is_staged_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 5)
    stage(tmp_path, 10)
    assert folders.latest_iteration(tmp_path) == 5
    folders.prune(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", folders.TRACKER]


def test_an_iteration_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    staged = stage(tmp_path, 5, "b")
    (staged / "new").write_text("new")
    folders.publish(staged, tmp_path, 5)
    assert (tmp_path / "iter_0000005" / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", folders.TRACKER]


def test_a_death_while_replacing_leaves_the_older_one_to_be_put_back(tmp_path: Path) -> None:
    save(tmp_path, 5)
    before = (tmp_path / "iter_0000005" / "weights").read_bytes()
    staged = stage(tmp_path, 5, "b")
    (staged / "weights").write_bytes(b"new")

    class Killed(BaseException):
        """Stands for SIGKILL between the two renames."""

    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self == staged:
            raise Killed
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(Killed):
            folders.publish(staged, tmp_path, 5)
    with pytest.raises(ValueError, match="iter_0000005 is not there.* half replaced"):
        folders.latest_iteration(tmp_path)
    folders.put_back(tmp_path)
    assert folders.latest_iteration(tmp_path) == 5
    assert (tmp_path / "iter_0000005" / "weights").read_bytes() == before
    folders.prune(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", folders.TRACKER]


def test_only_the_newest_are_kept_and_the_named_one(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20)
    (tmp_path / folders.TRACKER).write_text("5")
    removed = folders.prune(tmp_path, 2)
    assert [path.name for path in removed] == ["iter_0000010"]
    assert {p.name for p in tmp_path.glob("iter_*")} == {
        "iter_0000005",
        "iter_0000015",
        "iter_0000020",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ten", "holds 'ten': expected the number of an iteration; write the last one of 5"),
        ("", "holds ''"),
        ("7", r"names iteration 7, and .*iter_0000007 is not there: write one of 5 into it"),
    ],
)
def test_a_wrong_tracker_says_what_is_there(text: str, message: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / folders.TRACKER).write_text(text)
    with pytest.raises(ValueError, match=message):
        folders.latest_iteration(tmp_path)


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    file = tmp_path / "iter_0000005" / "weights"
    file.write_bytes(b"wwwwx")
    assert faults(tmp_path, 5) == [f"{file} is not what was saved: its bytes have changed"]
    file.write_bytes(b"www")
    assert faults(tmp_path, 5) == [f"{file} has 3 bytes, 5 were saved"]
    file.unlink()
    assert faults(tmp_path, 5) == [f"{file} is missing"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weights": {"size": 5}}', '{"weights": 5}'])
def test_a_damaged_list_of_checksums_is_refused(text: str, tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    path = tmp_path / "iter_0000010" / folders.CHECKSUMS
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"checksums.json cannot be read .* iterations 5 are there"
    ):
        folders.read_checksums(tmp_path / "iter_0000010")


def test_files_are_shared_among_all_ranks() -> None:
    names = [f"__{i}_0.distcp" for i in range(5)]
    shares = [folders.share(names, rank, 3) for rank in range(3)]
    assert sorted(name for part in shares for name in part) == names
    assert max(map(len, shares)) == 2


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    holder = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from megatron_mimo.checkpoint.folder import SaveLock
        lock = SaveLock(Path({str(tmp_path)!r}))
        import os
        if os.fork() == 0:
            import time
            time.sleep(60)  # A reader process that outlives the run.
            os._exit(0)
        print("held", flush=True)
        sys.stdin.read()
        os._exit(0)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"another run saves there \(process {first.pid} on"):
            folders.SaveLock(tmp_path)
        first.stdin.close()
        first.wait(timeout=20)
        folders.SaveLock(tmp_path).release()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"--save .*file/checkpoints cannot be written"):
        folders.SaveLock(file / "checkpoints")
    if os.geteuid() != 0:  # Nothing is read-only to root.
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="cannot be written"):
            folders.SaveLock(tmp_path / "checkpoints")
        tmp_path.chmod(0o700)
