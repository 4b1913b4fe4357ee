"""Damaged audio files: a value that every reader agrees on, or a broken item, and nothing else."""

import io
import struct
from collections.abc import Callable

import av
import numpy as np
import pytest

from megatron_mimo.media.audio import AudioInput
from megatron_mimo.media.audio.decode import decode_or_silence
from megatron_mimo.media.items import BrokenItemError
from tests.unit_tests.media.recorded import clip, pictures, tones, video

INPUT = AudioInput()
RATE = INPUT.config.sampling_rate
SECOND = tones(RATE, RATE)
WAV = clip(SECOND, RATE)
FLAC = clip(SECOND, RATE, "flac", "flac")
MP3 = clip(SECOND, RATE, "mp3", "libmp3lame")
M4A = clip(SECOND, RATE, "ipod", "aac")
OPUS = clip(tones(48_000 * 4, 48_000), 48_000, "ogg", "libopus")


def patched(file: bytes, at: int, kind: str, value: int) -> bytes:
    changed = bytearray(file)
    struct.pack_into(kind, changed, at, value)
    return bytes(changed)


def wav_of(size: int) -> bytes:
    """A WAV file whose header says that its samples have so many bytes."""
    return patched(WAV, WAV.index(b"data") + 4, "<I", size)


def flac_of(samples: int) -> bytes:
    """A FLAC file whose header says that it has so many samples: a field of 36 bits."""
    held = int.from_bytes(FLAC[18:26], "big") >> 36 << 36
    return FLAC[:18] + (held | samples).to_bytes(8, "big") + FLAC[26:]


def mp3_without_header() -> bytes:
    """An MP3 file without the frame that says how many frames follow, silent at first.

    Frames of silence are small, so that FFmpeg's guess of its length is far too large.
    """
    wave = np.concatenate([np.zeros(2 * RATE), np.random.default_rng(0).normal(0, 0.2, 4 * RATE)])
    varied = {"flags": "+qscale", "global_quality": "590"}
    file = clip(wave.astype(np.float32)[None], RATE, "mp3", "libmp3lame", varied)
    return file[file.index(b"\xff\xf3", file.index(b"Xing")) :]


def with_junk(file: bytes) -> bytes:
    """A file with other bytes in the middle of its sound."""
    middle = len(file) // 2
    junk = np.random.default_rng(0).integers(0, 256, 60, dtype=np.uint8).tobytes()
    return file[:middle] + junk + file[middle + 60 :]


NOT_FINITE = np.where(np.arange(RATE) == 99, np.nan, SECOND).astype(np.float32)

BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no known format"),
    "text": (lambda: b"This is no sound." * 99, "no known format"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "no known format"),
    "a video without sound": (lambda: video(pictures(5, 32, 32)), "no audio track"),
    "the head of a WAV file": (lambda: WAV[: WAV.index(b"data") + 8], "truncated"),
    "a WAV file without samples": (lambda: wav_of(0)[: WAV.index(b"data") + 8], "empty track"),
    "half of a WAV file": (lambda: WAV[: len(WAV) // 2], "truncated"),
    "a WAV header of 2 GB": (lambda: wav_of(2_000_000_000), "truncated"),
    "a WAV header of no channel": (lambda: patched(WAV, 22, "<H", 0), "too short|no known format"),
    "a WAV header of a rate of 0": (lambda: patched(WAV, 24, "<I", 0), "no known format"),
    "a WAV header of a huge rate": (lambda: patched(WAV, 24, "<I", 2**31 - 1), "a second"),
    "half of a FLAC file": (lambda: FLAC[: len(FLAC) // 2], "truncated|too early"),
    "a FLAC header of 1e9 samples": (lambda: flac_of(10**9), "truncated: it holds 1.00"),
    "half of an MP3 file": (lambda: MP3[: len(MP3) // 2], "truncated"),
    "an MP3 file without some frames": (lambda: with_junk(MP3), "truncated"),
    "half of an M4A file": (lambda: M4A[: len(M4A) // 2], "no known format"),
    "an M4A header of 1e8 samples": (
        lambda: patched(M4A, M4A.index(b"stts") + 16, ">I", 10**8),
        "more than they can hold",
    ),
    "one page of an Opus file": (lambda: OPUS[:2000], "too early|empty|truncated|no known"),
    "319 samples": (lambda: clip(SECOND[:, :319], RATE), "0.0199 seconds is too short"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_cannot_be_heard_is_a_broken_item(name: str) -> None:
    make, reason = BROKEN[name]
    with pytest.raises(BrokenItemError, match=reason) as caught:
        INPUT.examine(make())
    assert str(caught.value).startswith("clip of ") and "\n" not in str(caught.value)


# Samples after resampling.
TAKEN: dict[str, tuple[Callable[[], bytes], int]] = {
    "320 samples": (lambda: clip(SECOND[:, :320], RATE), 320),
    "8 kHz": (lambda: clip(tones(8_000, 8_000), 8_000), RATE),
    "a WAV header of half of its samples": (lambda: wav_of(RATE), RATE // 2),
    "a FLAC header without a length": (lambda: flac_of(0), RATE),
    "a FLAC header of fewer samples": (lambda: flac_of(4_000), RATE),
    "an MP3 file without a header": (mp3_without_header, 6 * RATE + 1_344),
    "an MP3 file after a tag": (lambda: b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + MP3, RATE),
    "junk within FLAC": (lambda: with_junk(FLAC), RATE),
    "junk within M4A": (lambda: with_junk(M4A), RATE),
    "junk within WAV": (lambda: with_junk(WAV), RATE),
    "junk behind WAV": (lambda: WAV + bytes(999), RATE),
}


@pytest.mark.parametrize("name", list(TAKEN))
def test_what_can_be_heard_has_one_length(name: str) -> None:
    make, samples = TAKEN[name]
    file = make()
    shape = INPUT.examine(file)
    assert shape.samples == samples
    item, reason = INPUT.encode(file, shape, with_content=True)
    assert reason is None and item.features is not None
    assert np.isfinite(item.features).all() and item.features.any()
    assert len(item.features) == INPUT.config.num_frames(samples)
    assert INPUT.encode(file, shape, with_content=False)[0].rows == item.rows


def hollow(file: bytes, numbers: slice = slice(None)) -> bytes:
    """A file of which some packets are where its table says, and hold no sound."""
    made = bytearray(file)
    with av.open(io.BytesIO(file)) as reader:
        for packet in [*reader.demux()][numbers]:
            if packet.size:
                made[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    return bytes(made)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: clip(NOT_FINITE, RATE, "wav", "pcm_f32le"), "has samples that are not finite"),
        (
            lambda: clip(SECOND * 1e30, RATE, "wav", "pcm_f32le"),
            "has samples of up to 5e+29: expected -1 to 1",
        ),
        (lambda: hollow(M4A), "decodes to nothing"),
    ],
)
def test_silence_stands_for_what_does_not_decode(make: Callable[[], bytes], reason: str) -> None:
    file = make()
    shape = INPUT.examine(file)
    assert shape.samples == RATE
    item, said = INPUT.encode(file, shape, with_content=True)
    assert said == f"clip of {len(file)} bytes {reason}; silence stands in its place"
    assert item.rows == INPUT.encode(file, shape, with_content=False)[0].rows
    assert item.features is not None and np.isfinite(item.features).all()
    # The last frame is zero, as that of every clip.
    assert not np.ptp(item.features[:-1], axis=0).any()


def test_a_lost_packet_is_silence_of_its_duration() -> None:
    whole, _ = decode_or_silence(M4A, INPUT.examine(M4A), INPUT.config)
    file = hollow(M4A, slice(7, 9))
    made, reason = decode_or_silence(file, INPUT.examine(file), INPUT.config)
    assert reason is None and len(made) == len(whole)
    different = np.flatnonzero(np.abs(made - whole) > 0.05)
    # Two packets of 1,024 samples, and what overlaps with them; all behind is in its place.
    assert 1_500 < different[-1] - different[0] < 4_100
    middle = (different[0] + different[-1]) // 2
    assert np.abs(made[middle - 400 : middle + 400]).max() < 0.01


def test_random_damage_never_escapes() -> None:
    rng = np.random.default_rng(21)
    outcomes = {"broken": 0, "taken": 0, "blank": 0}
    for number in range(300):
        file = bytearray((WAV, FLAC, MP3, M4A, OPUS)[number % 5])
        if number % 2:
            del file[rng.integers(len(file)) :]
        else:
            # Heads of files are where damage leads furthest.
            reach = len(file) if number % 4 else 400
            for at in rng.integers(0, reach, size=rng.integers(1, 12)):
                file[at] = rng.integers(256)
        try:
            shape = INPUT.examine(bytes(file))
        except BrokenItemError:
            outcomes["broken"] += 1
            continue
        assert shape.samples < 100 * RATE
        item, reason = INPUT.encode(bytes(file), shape, with_content=True)
        outcomes["taken" if reason is None else "blank"] += 1
        assert item.features is not None and np.isfinite(item.features).all()
        assert len(item.features) == INPUT.config.num_frames(shape.samples)
    assert outcomes["broken"] > 50 and outcomes["taken"] > 50
