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


# -- nothing yet, or not what was named ------------------------------------------------------------


def test_a_path_names_the_newest_or_itself(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    newest = tmp_path / "iter_0000010"
    assert folders.find(tmp_path) == newest
    assert folders.find(newest) == newest
    copied = tmp_path / "best"
    newest.rename(copied)
    assert folders.find(copied) == copied


@pytest.mark.parametrize("left", [[], [".lock", "metrics.jsonl", "run.log"], [".saving-0000005-a"]])
def test_logs_and_leftovers_are_nothing_yet(left: list[str], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).touch()
    assert folders.find(tmp_path) is None
    assert folders.find(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["iter_0000005", "iter_0000010"],
         r"--load .* holds iter_0000005, iter_0000010, and no latest_.*write one of 5, 10 into"),
        (["release"], r"holds release, and no latest_.*expected a folder of checkpoints of this"),
        (["model-00001-of-00002.safetensors"], r"holds model-00001-of-00002.safetensors, and no"),
        ([".metadata", "__0_0.distcp"], r"holds .metadata, __0_0.distcp, and no latest_"),
    ],
)  # fmt: skip
def test_checkpoints_without_a_tracker_are_refused(
    names: list[str], message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=message):
        folders.find(tmp_path)


def test_paths_that_are_no_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, message in (
        ("file", "is not a folder: expected a folder of checkpoints"),
        ("link", r"is a link to .*gone, which is not there"),
        ("iter_0000007", r"iter_0000007 is not there: expected one of .*\(none is there\)"),
        ("a" * 300, "cannot be read: File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            folders.find(tmp_path / name)


def test_a_tracker_is_read_as_a_short_text(tmp_path: Path) -> None:
    save(tmp_path, 5)
    tracker = tmp_path / folders.TRACKER
    tracker.write_text("release")
    assert folders.find(tmp_path, release=True) == tmp_path / "release"
    for text in ("release", "9" * 5000, "-5", "\u0665", "5 5"):
        tracker.write_text(text)
        with pytest.raises(ValueError, match="expected the number of an iteration") as error:
            folders.find(tmp_path)
        assert len(str(error.value)) < 600
    tracker.unlink()
    os.mkfifo(tracker)
    with pytest.raises(ValueError, match="is not a file: expected one with an iteration's number"):
        folders.find(tmp_path)


@pytest.mark.parametrize("moment", range(4))
def test_a_death_while_the_first_is_published_is_nothing_yet_or_the_first(
    moment: int, tmp_path: Path
) -> None:
    """A tracker that is not written yet is no tracker that was lost."""
    staged = stage(tmp_path, 5)

    class Killed(BaseException):
        """Stands for SIGKILL."""

    calls = iter(range(10))

    def dying(original):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            if next(calls) == moment:
                raise Killed
            return original(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(folders, "sync", dying(folders.sync))
        with pytest.raises(Killed):
            folders.publish(staged, tmp_path, 5)
    final = tmp_path / "iter_0000005"
    assert folders.find(tmp_path) == (final if final.exists() else None)
    # A later run puts the tracker back, and saves on.
    folders.put_back(tmp_path)
    assert (tmp_path / folders.TRACKER).exists() == final.exists()
    folders.prune(tmp_path, None)
    save(tmp_path, 6)
    assert folders.find(tmp_path) == tmp_path / "iter_0000006"
