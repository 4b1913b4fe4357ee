"""Files of a run: begun again where somebody removes them; late errors and bad folders are told."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from megatron_mimo.runtime.output import LastingFile, require_folder


@pytest.mark.parametrize("how", ["file", "folder", "moved", "replaced", "folder is a file"])
def test_a_file_that_vanishes_is_noticed_and_begun_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a" / "curve"
    path.parent.mkdir()
    file = LastingFile(path, head=b"head\n")
    file.append(b"1\n")
    assert not file.has_vanished
    if how == "file":
        path.unlink()
    elif how == "moved":
        path.rename(tmp_path / "old")
    elif how == "replaced":
        (tmp_path / "new").write_bytes(b"theirs\n")
        os.replace(tmp_path / "new", path)
    else:
        shutil.rmtree(path.parent)
    if how == "folder is a file":
        path.parent.write_text("")
    assert file.has_vanished
    if how == "folder is a file":
        with pytest.raises(FileExistsError):
            file.begin_again()
        return
    file.begin_again()
    file.append(b"2\n")
    file.close()
    begin = b"theirs\n" if how == "replaced" else b"head\n"
    assert path.read_bytes() == begin + b"2\n"


def test_a_file_is_continued_by_the_next_run(tmp_path: Path) -> None:
    for text in (b"1", b"2"):
        file = LastingFile(tmp_path / "curve", head=b"head")
        file.append(text)
        file.close()
    assert (tmp_path / "curve").read_bytes() == b"head12"


def test_what_is_written_in_part_is_noticed(tmp_path: Path) -> None:
    file = LastingFile(tmp_path / "curve")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Like a disk that is full after so many bytes: the first write takes what fits.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            file.append(b"0123456789 and more")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert (tmp_path / "curve").read_bytes() == b"0123456789"


def test_what_a_file_system_tells_late_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LastingFile(tmp_path / "curve")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    file.append(b"1")
    monkeypatch.setattr("megatron_mimo.runtime.output._SYNC_S", -1.0)
    with pytest.raises(OSError, match="No space left"):
        file.append(b"2")
    with pytest.raises(OSError, match="No space left"):
        file.close()


def test_folders_are_made_and_tried(tmp_path: Path) -> None:
    require_folder("--save", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "taken").write_text("")
    for path, reason in ((tmp_path / "taken", "File exists"), (tmp_path / "taken/a", "Not a dir")):
        with pytest.raises(ValueError, match=f"^--save {path} cannot be written to: {reason}"):
            require_folder("--save", path)
    with pytest.raises(
        ValueError, match="^--save /proc/1/x cannot be written to: .*; name another"
    ):
        require_folder("--save", Path("/proc/1/x"))
