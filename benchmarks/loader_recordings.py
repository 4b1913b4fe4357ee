"""Reading clips and videos for the language model: headers and packets only, against encoding."""

import io
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from benchlib.ranks import turns
from benchlib.report import Row, Size
from numpy.typing import NDArray

from megatron_mimo.data import ByteTokenizer, DataConfig, RawSample
from megatron_mimo.data.samples.sample import try_encode
from megatron_mimo.media.audio import AudioInput
from megatron_mimo.media.images import ImageInput
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.input import VideoInput

# Seconds of clips, as of speech; and of videos.
_CLIPS: dict[Size, tuple[float, ...]] = {"smoke": (3,), "quick": (4, 12), "full": (4, 12, 28)}
_VIDEOS: dict[Size, tuple[float, ...]] = {"smoke": (2,), "quick": (6,), "full": (6, 20)}
_ROUNDS: dict[Size, int] = {"smoke": 1, "quick": 5, "full": 15}
# Name, rate, and FFmpeg's names of container and codec.
_SOUNDS = (
    ("WAV of 16 kHz", 16_000, "wav", "pcm_s16le"),
    ("WAV of 44.1 kHz", 44_100, "wav", "pcm_s16le"),
    ("FLAC of 16 kHz", 16_000, "flac", "flac"),
    ("MP3 of 44.1 kHz", 44_100, "mp3", "libmp3lame"),
    ("Opus of 48 kHz", 48_000, "ogg", "libopus"),
)
_PICTURES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("H.264 in MP4", "mp4", "libx264", {}),
    ("VP9 in WebM", "webm", "libvpx-vp9", {"cpu-used": "8"}),
)
_WIDTH, _HEIGHT, _FPS = 480, 320, 25


def rows(size: Size) -> list[Row]:
    """Time of a sample on ranks of the language model.

    The peer does the same and encodes the item, as a reader does that knows no roles: mel features
    of a clip, or patches of two frames a second of a video.

    Args:
        size: Number of repetitions, and lengths.
    """
    videos = VideoConfig(fps=2, target_patches=256)
    config = DataConfig(
        seq_length=1 << 20,
        inputs={
            "encoder": ImageInput(),
            "video": VideoInput(config=videos, tags=("", "")),
            "audio": AudioInput(tags=("", "")),
        },
    )
    found = []
    for name, rate, container, codec in _SOUNDS:
        clips = [_clip(seconds, rate, container, codec) for seconds in _CLIPS[size]]
        found.append(_row(f"a sample with a {name} clip", "audio", clips, config, _ROUNDS[size]))
    for name, container, codec, options in _PICTURES:
        files = [_video(seconds, container, codec, options) for seconds in _VIDEOS[size]]
        found.append(_row(f"a sample with {name}", "video", files, config, _ROUNDS[size]))
    return found


def _row(line: str, kind: str, files: Sequence[bytes], config: DataConfig, rounds: int) -> Row:
    tokenizer = ByteTokenizer(tuple(config.hosts))
    samples = [
        RawSample.asking(
            key="k", question=f"<{kind}>What is it?", answer="a", items={kind: (file,)}
        )
        for file in files
    ]
    module = "encoder" if kind == "video" else kind
    milliseconds: dict[str, list[float]] = {"headers": [], "content": []}
    for repetition in range(rounds + 1):
        for way in turns(tuple(milliseconds), repetition):
            start = time.perf_counter()
            for sample in samples:
                try_encode(sample, config, tokenizer, content=(module,) if way == "content" else ())
            # The first round warms up.
            if repetition:
                spent = time.perf_counter() - start
                milliseconds[way].append(1e3 * spent / len(samples))
    return Row(
        table="Headers of clips and videos alone",
        line=line,
        column="by the same encoded",
        ours=tuple(milliseconds["headers"]),
        peer=tuple(milliseconds["content"]),
        target=1 / 3,
        unit="ms",
    )


def _clip(seconds: float, rate: int, container: str, codec: str) -> bytes:
    """Tones that change, and noise, in stereo."""
    random = np.random.default_rng(3)
    time_s = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 200 * time_s * (1 + 0.2 * np.sin(3 * time_s)))
    stereo = (wave + random.normal(0, 0.02, (2, len(wave)))).astype(np.float32)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as writer:
        track = writer.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(stereo, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        _encode(writer, track, [frame])
    return file.getvalue()


def _video(seconds: float, container: str, codec: str, options: dict[str, str]) -> bytes:
    """Soft shapes that drift, with a little noise."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as writer:
        track: Any = writer.add_stream(codec, rate=_FPS, options=options)
        track.width, track.height, track.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        _encode(writer, track, _frames(round(seconds * _FPS)))
    return file.getvalue()


def _frames(number: int) -> Iterator[av.VideoFrame]:
    random = np.random.default_rng(4)
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    for at in range(number):
        waves = [np.sin((x + 3 * at) / 40), np.sin((y - 2 * at) / 30), np.sin((x + y + at) / 60)]
        pixels: NDArray[Any] = 128 + 90 * np.stack(waves, axis=-1)
        noisy = pixels + random.normal(0, 4, pixels.shape)
        frame = av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8), format="rgb24")
        frame.pts, frame.time_base = at, Fraction(1, _FPS)
        yield frame


def _encode(writer: Any, track: Any, frames: Any) -> None:
    for frame in (*frames, None):
        for packet in track.encode(frame):
            writer.mux(packet)
