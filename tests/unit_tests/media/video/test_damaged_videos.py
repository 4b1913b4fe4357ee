"""Damaged videos: a value that every reader agrees on, or a broken item, and nothing else."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
import numpy as np
import pytest

from megatron_mimo.media.items import BrokenItemError
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.decode import decode_or_black
from megatron_mimo.media.video.input import VideoInput
from tests.unit_tests.media.recorded import clip, frames_of, pictures, tones, video

INPUT = VideoInput(config=VideoConfig(num_frames=6, target_patches=16, patch_dim=4))
FRAMES = pictures(20, 48, 32)
MP4 = video(FRAMES)
MKV = video(FRAMES, "matroska")
AVI = video(FRAMES, "avi", "mpeg4")
MOV = video(FRAMES, "mov", "mjpeg", pixels="yuvj420p")
WEBM = video(FRAMES, "webm", "libvpx-vp9", options={"cpu-used": "8"})


def patched(file: bytes, mark: bytes, behind: int, kind: str, *values: int) -> bytes:
    """A file with other numbers at so many bytes behind the start of a mark."""
    changed = bytearray(file)
    struct.pack_into(kind, changed, file.index(mark) + behind, *values)
    return bytes(changed)


def with_sizes(file: bytes, height: int, width: int) -> bytes:
    """Motion JPEG whose frames and header have other sizes."""
    changed, at = bytearray(file), -1
    while (at := file.find(b"\xff\xc0\x00\x11", at + 1)) >= 0:
        struct.pack_into(">HH", changed, at + 5, height, width)
    return patched(bytes(changed), b"jpeg", 28, ">HH", width, height)


def cut_behind_index(lost: int) -> bytes:
    """A file whose index comes first, without its last bytes."""
    # FFmpeg writes such a file twice, and needs a path for that.
    with NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w", options={"movflags": "faststart"}) as writer:
            track = writer.add_stream("mpeg4", rate=10)
            track.width, track.height, track.pix_fmt = 48, 32, "yuv420p"
            for at, pixels in enumerate(FRAMES):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = at
                writer.mux(track.encode(frame))
            writer.mux(track.encode(None))
        whole = Path(file.name).read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    return whole[:-lost]


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no known format"),
    "text": (lambda: b"These are no pictures." * 99, "no known format"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "no known format"),
    "sound": (lambda: clip(tones(16_000, 16_000), 16_000, "ipod", "aac"), "no video track"),
    "half of an MP4 file": (lambda: MP4[: len(MP4) // 2], "no known format"),
    "an MP4 file without its end": (
        lambda: cut_behind_index(2000),
        "truncated within a packet|does not decode",
    ),
    "an MP4 file without its last bytes": (
        lambda: cut_behind_index(10),
        "truncated within a packet",
    ),
    "a part of an MKV file": (lambda: MKV[: len(MKV) * 3 // 4], "truncated: it holds 1"),
    "half of a WebM file": (lambda: WEBM[: len(WEBM) // 2], "truncated: it holds"),
    "half of an AVI file": (lambda: AVI[: len(AVI) // 2], "truncated|does not decode"),
    "an AVI header of 1e9 frames": (
        lambda: patched(AVI, b"strh", 40, "<I", 10**9),
        "truncated: it holds 2.00",
    ),
    "a table of 1e8 samples": (
        lambda: patched(patched(MP4, b"stsz", 8, ">I", 9), b"stsz", 12, ">I", 10**8),
        "promises 100000000 samples of 9 bytes",
    ),
    "1e9 times": (lambda: patched(MP4, b"stts", 8, ">I", 10**9), "does not decode"),
    "frames of 10,000 x 10,000": (lambda: with_sizes(MOV, 10_000, 10_000), "taken for an attack"),
    "frames of 0 x 0": (lambda: with_sizes(MOV, 0, 0), "without pixels|does not decode"),
    "an unknown codec": (
        lambda: patched(MP4, b"stsd", 16, ">I", int.from_bytes(b"none", "big")),
        "no known codec|does not decode|no video track",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_cannot_be_seen_is_a_broken_item(name: str) -> None:
    make, reason = BROKEN[name]
    with pytest.raises(BrokenItemError, match=reason) as caught:
        INPUT.examine(make())
    assert str(caught.value).startswith("video of ") and "\n" not in str(caught.value)


def test_no_frames_are_no_video() -> None:
    with pytest.raises(BrokenItemError, match="0 frames"):
        INPUT.examine(np.zeros((0, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(("width", "height"), [(48, 32), (63, 47), (1, 1), (300, 2), (2, 300)])
def test_frames_have_any_size(width: int, height: int) -> None:
    file = video(pictures(3, width, height), pixels="yuv444p")
    shape = INPUT.examine(file)
    assert (shape.width, shape.height, shape.total) == (width, height, 3)
    item, reason = INPUT.encode(file, shape, with_content=True)
    assert reason is None and item.patches is not None
    rows, columns = item.grid
    assert item.patches.shape == (2 * rows * columns, 2 * 3 * 4 * 4)
    assert item.rows == 2 * rows * columns // 4


def test_one_frame_is_a_video() -> None:
    file = video(FRAMES[:1])
    item, _ = INPUT.encode(file, INPUT.examine(file), with_content=True)
    assert item.labels == ("Frame 1 sampled at 0.00 seconds: ",)
    assert item.patches is not None
    first, second = np.split(item.patches, 2, axis=1)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_at_uneven_times_are_counted_by_their_order(container: str) -> None:
    times = [0, 40, 80, 500, 520, 900, 1500, 1540, 1580, 2000]
    file = video(FRAMES[:10], container, milliseconds=times)
    kind = VideoInput(config=VideoConfig(num_frames=5))
    shape = kind.examine(file)
    assert (shape.total, shape.indices) == (10, (0, 2, 4, 6, 8))
    made, reason = decode_or_black(file, shape)
    assert reason is None
    np.testing.assert_array_equal(made, frames_of(file)[::2])


def test_frames_that_an_edit_leaves_out_do_not_count() -> None:
    """A video that was cut without encoding it again begins with frames that are not shown."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as writer:
        track = writer.add_stream("mpeg4", rate=10)
        track.width, track.height, track.pix_fmt = 48, 32, "yuv420p"
        for at, pixels in enumerate(FRAMES):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = at - 4
            writer.mux(track.encode(frame))
        writer.mux(track.encode(None))
    shape = INPUT.examine(file.getvalue())
    whole = frames_of(file.getvalue())
    assert shape.total == len(whole) == 16
    made, reason = decode_or_black(file.getvalue(), shape)
    assert reason is None
    np.testing.assert_array_equal(made, whole[list(shape.indices)])


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, 3), (180, 2)])
def test_frames_are_turned_upright(degrees: int, turns: int) -> None:
    file = video(FRAMES, degrees=degrees)
    shape = INPUT.examine(file)
    assert (shape.width, shape.height) == ((48, 32) if degrees == 180 else (32, 48))
    made, _ = decode_or_black(file, shape)
    expected = np.rot90(frames_of(file)[list(shape.indices)], turns, axes=(1, 2))
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_sound_beside_pictures_does_not_count(container: str) -> None:
    file = video(FRAMES, container, sound=tones(48_000 * 3, 48_000))
    shape = INPUT.examine(file)
    assert (shape.total, shape.rate) == (20, 10.0)
    np.testing.assert_array_equal(
        decode_or_black(file, shape)[0], frames_of(file)[list(shape.indices)]
    )


def packets_of(file: bytes) -> list[tuple[int, int]]:
    """Position and size of each packet."""
    with av.open(io.BytesIO(file)) as reader:
        return [(packet.pos, packet.size) for packet in reader.demux(video=0) if packet.size]


def hollow(file: bytes, start: int) -> bytes:
    """A file whose packets from a number on are where its table says, and hold no picture."""
    made = bytearray(file)
    for at, size in packets_of(file)[start:]:
        made[at : at + size] = b"\xff" * size
    return bytes(made)


def test_a_black_video_stands_for_what_does_not_decode() -> None:
    file = hollow(MP4, 0)
    shape = INPUT.examine(file)
    item, reason = INPUT.encode(file, shape, with_content=True)
    assert reason == (
        f"video of {len(file)} bytes has no frame that decodes; a blank stands in its place"
    )
    assert item.patches is not None and not item.patches.any()
    without, _ = INPUT.encode(file, shape, with_content=False)
    assert (without.rows, without.labels) == (item.rows, item.labels)
    sound, _ = INPUT.encode(MP4, INPUT.examine(MP4), with_content=True)
    assert sound.rows == item.rows and sound.labels == item.labels


def test_missing_frames_repeat_the_last_one() -> None:
    file = hollow(MOV, 10)
    shape = INPUT.examine(file)
    assert shape.indices == (0, 3, 6, 10, 13, 16)
    made, reason = decode_or_black(file, shape)
    assert reason is None
    np.testing.assert_array_equal(made, frames_of(MOV)[[0, 3, 6, 6, 6, 6]])
    # And those before the first one that decodes are that one.
    turned = bytearray(MOV)
    for at, size in packets_of(MOV)[:5]:
        turned[at : at + size] = b"\xff" * size
    made, _ = decode_or_black(bytes(turned), shape)
    np.testing.assert_array_equal(made, frames_of(MOV)[[6, 6, 6, 10, 13, 16]])


def test_frames_of_another_size_than_the_header_are_scaled() -> None:
    larger = video(pictures(20, 96, 64), "mov", "mjpeg", pixels="yuvj420p")
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as writer:
        with av.open(io.BytesIO(MOV)) as first, av.open(io.BytesIO(larger)) as second:
            track = writer.add_stream_from_template(first.streams.video[0])
            packets = [*first.demux(video=0)][:10] + [*second.demux(video=0)][10:]
            for packet in packets:
                if packet.size:
                    packet.stream = track
                    writer.mux(packet)
    shape = INPUT.examine(file.getvalue())
    assert (shape.width, shape.height, shape.total) == (48, 32, 20)
    made, reason = decode_or_black(file.getvalue(), shape)
    assert reason is None and made.shape == (6, 32, 48, 3)
    np.testing.assert_array_equal(made[:3], frames_of(MOV)[[0, 3, 6]])
    # Every second pixel of the larger ones is near what the scaled ones have.
    rest = frames_of(larger)[[10, 13, 16], ::2, ::2].astype(int)
    assert np.abs(made[3:] - rest).mean() < 25


def test_random_damage_never_escapes() -> None:
    rng = np.random.default_rng(21)
    outcomes = {"broken": 0, "taken": 0, "blank": 0}
    for number in range(250):
        file = bytearray((MP4, MKV, AVI, MOV, WEBM)[number % 5])
        if number % 2:
            del file[rng.integers(len(file)) :]
        else:
            reach = len(file) if number % 4 else 600
            for at in rng.integers(0, reach, size=rng.integers(1, 12)):
                file[at] = rng.integers(256)
        try:
            shape = INPUT.examine(bytes(file))
        except BrokenItemError:
            outcomes["broken"] += 1
            continue
        item, reason = INPUT.encode(bytes(file), shape, with_content=True)
        outcomes["taken" if reason is None else "blank"] += 1
        without, _ = INPUT.encode(bytes(file), shape, with_content=False)
        assert item.patches is not None
        assert (item.rows, item.labels, item.grid) == (without.rows, without.labels, without.grid)
        assert len(item.patches) == item.rows * 4
    assert outcomes["broken"] > 50 and outcomes["taken"] > 50
