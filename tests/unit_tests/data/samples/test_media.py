"""Files that samples name: below their dataset, or below a folder that was allowed, or not read."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.samples.media import MediaFolder, check_roots, read_regular
from megatron_mimo.data.samples.sample import UnusableError
from tests.properties import examples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a folder beside it, with all that a path can lead to."""
    place = tmp_path_factory.mktemp("place")
    data, beside = place / "data", place / "beside"
    (data / "deep").mkdir(parents=True)
    beside.mkdir()
    (data / "a.png").write_bytes(b"inside")
    (data / "deep/b.png").write_bytes(b"inside")
    (beside / "secret.png").write_bytes(b"secret")
    (data / "link.png").symlink_to("a.png")
    (data / "out.png").symlink_to(beside / "secret.png")
    (data / "folder-out").symlink_to(beside)
    (data / "loop").symlink_to("loop")
    (data / "gone.png").symlink_to("nothing")
    os.mkfifo(data / "pipe.png")
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(data)
        made.bind("socket.png")
        os.chdir(before)
    return place


@pytest.mark.parametrize("path", ["a.png", "./deep/../a.png", "deep/b.png", "link.png"])
def test_files_below_the_dataset_are_read(place: Path, path: str) -> None:
    assert MediaFolder(place / "data").read(path, "image") == b"inside"
    whole = str(place / "data" / path)
    assert MediaFolder(place / "data").read(whole, "image") == b"inside"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/hostname", "its image /etc/hostname is outside of"),
        ("../beside/secret.png", "--media-root .*/beside allows others"),
        ("deep/../../beside/secret.png", "is outside of"),
        ("out.png", "is outside of"),
        ("folder-out/secret.png", "is outside of"),
        ("http://127.0.0.1:9/x.png", "is a URL: nothing is fetched"),
        ("file:///etc/hostname", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("msc://profile/x.png", "is a URL"),
        ("/dev/zero", "is outside of"),
        ("loop", "its image loop is not a path: Too many levels|is outside"),
        ("gone.png", "its image gone.png is not in"),
        ("a.png/b.png", "is not in"),
        ("nothing.png", "is not in"),
        ("deep", "its image deep is a folder, not a file"),
        ("", "is a folder, not a file"),
        ("pipe.png", "is a pipe, not a file"),
        ("socket.png", "its image socket.png is"),
        ("a\0b", r"its image a\\x00b is not a path: it has a NUL"),
        ("A" * 9000, "its image A{77}... is not a path: File name too long"),
        ("\ud83d.png", "is not a path|is not in"),
    ],
)
def test_other_paths_are_named_with_the_reason(place: Path, path: str, message: str) -> None:
    with pytest.raises(UnusableError, match=message) as caught:
        MediaFolder(place / "data").read(path, "image")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_root_allows_what_lies_in_it_and_no_more(place: Path) -> None:
    media = MediaFolder(place / "data", [str(place / "beside")])
    for path in (str(place / "beside/secret.png"), "../beside/secret.png", "out.png"):
        assert media.read(path, "image") == b"secret"
    for path in ("/etc/hostname", str(place / "beside-not" / "a.png")):
        with pytest.raises(UnusableError, match="is outside of"):
            media.read(path, "image")
    # Devices do not end.
    with pytest.raises(UnusableError, match="is a device, not a file"):
        MediaFolder(place / "data", ["/dev"]).read("/dev/zero", "image")


def test_a_root_must_be_a_folder(place: Path) -> None:
    check_roots([str(place)])
    with pytest.raises(ValueError, match="--media-root .*a.png is not a folder here"):
        check_roots([str(place), str(place / "data/a.png")])


def test_descriptors_are_closed(place: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("a.png", "deep", "pipe.png"):
        try:
            read_regular(place / "data" / path)
        except ValueError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


PIECES = (
    "a.png", "deep", "..", ".", "", "/", "link.png", "out.png", "folder-out", "secret.png", "loop",
    "pipe.png", "beside", "data", "\0", "http:", "~", "\ud800", "x" * 300, "é", "%2e%2e", "\n",
)  # fmt: skip


@examples(100)
@given(path=st.lists(st.sampled_from(PIECES), max_size=8).map("/".join) | st.text())
def test_no_path_leads_out(place: Path, path: str) -> None:
    try:
        assert MediaFolder(place / "data").read(path, "image") == b"inside"
    except UnusableError as error:
        str(error).encode(errors="strict")
        assert "\n" not in str(error)
