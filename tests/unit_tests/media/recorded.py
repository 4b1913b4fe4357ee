"""Files of sound and moving pictures, made by FFmpeg's encoders."""

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]


def tones(samples: int, rate: int, channels: int = 1) -> Wave:
    """A tone of 440 Hz, and its multiples in further channels, float32 [channels, samples]."""
    time = np.arange(samples) / rate
    return np.stack(
        [0.5 * np.sin(2 * np.pi * 440 * (channel + 1) * time) for channel in range(channels)]
    ).astype(np.float32)


def clip(
    wave: Wave,
    rate: int,
    container: str = "wav",
    codec: str = "pcm_s16le",
    options: Mapping[str, str] | None = None,
) -> bytes:
    """A file of a wave form [channels, n]."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as writer:
        layout = {1: "mono", 2: "stereo"}[len(wave)]
        track = writer.add_stream(codec, rate=rate, layout=layout, options=dict(options or {}))
        _write_sound(writer, track, wave, rate)
    return file.getvalue()


def _write_sound(writer: Any, track: Any, wave: Wave, rate: int) -> None:
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout=track.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    for each in (frame, None):
        for packet in track.encode(each):
            writer.mux(packet)


def pictures(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """Frames of drifting colours, uint8 [n, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([x * 4 + 9 * at, y * 4 + 5 * at, np.full_like(x, 20 * at)], axis=-1) % 256
        for at in range(number)
    ]
    return np.array(frames, dtype=np.uint8).reshape(number, height, width, 3)


def video(
    frames: NDArray[np.uint8],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    rate: int = 10,
    gop: int = 5,
    pixels: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    milliseconds: Sequence[int] = (),
    degrees: int = 0,
    sound: Wave | None = None,
) -> bytes:
    """A file of frames [n, H, W, 3], evenly or at given times, with sound of 48 kHz or without."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as writer:
        track = writer.add_stream(codec, rate=rate, options=dict(options or {}))
        track.height, track.width = frames.shape[1:3]
        track.pix_fmt, track.gop_size = pixels, gop
        if milliseconds:
            track.time_base = track.codec_context.time_base = Fraction(1, 1000)
        if degrees:
            track.set_display_rotation(degrees)
        heard = None
        if sound is not None:
            codec = "aac" if container == "mp4" else "libopus"
            heard = writer.add_stream(codec, rate=48_000, layout="mono")
        for at, pixels_of in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of, format="rgb24")
            frame.pts = milliseconds[at] if milliseconds else at
            frame.time_base = Fraction(1, 1000 if milliseconds else rate)
            for packet in track.encode(frame):
                writer.mux(packet)
        for packet in track.encode(None):
            writer.mux(packet)
        if heard is not None:
            _write_sound(writer, heard, sound, 48_000)
    return file.getvalue()


def frames_of(file: bytes) -> NDArray[np.uint8]:
    """Every frame of a file as FFmpeg decodes it from first to last, uint8 [n, H, W, 3]."""
    with av.open(io.BytesIO(file)) as reader:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in reader.decode(video=0)])


def wave_of(file: bytes) -> NDArray[Any]:
    """Every sample of a file as FFmpeg decodes it, [channels, n] or [1, n * channels]."""
    with av.open(io.BytesIO(file)) as reader:
        return np.concatenate([frame.to_ndarray() for frame in reader.decode(audio=0)], axis=1)
