"""Audio files: their length from their packets, and their samples as one channel at one rate.

Channels are averaged. Resampling is FFmpeg's (libswresample: a windowed sinc of 32 taps at the
lower of both rates); a clip of n samples at rate a has ceil(n * b / a) samples at rate b.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.container import decoded, opened, scan
from megatron_mimo.media.items import BrokenItemError

if TYPE_CHECKING:
    from av import AudioFrame

AudioSource = bytes | NDArray[np.float32]
"""Contents of a file, or a wave form [n] at the rate of the settings."""

_WHAT = "clip"
# Rates that sound is stored with; what lies beyond is a damaged header.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
# A packet of no codec holds more samples, apart from those without compression.
_LARGEST_PACKET = 65_536
# Far above files whose samples are whole numbers, below what overflows in a spectrum.
_LOUDEST = 1e9
# A header states the length without what codecs add before and after; packets include it.
_CODEC_DELAY = 0.2  # seconds


class BrokenClipError(BrokenItemError):
    """An audio file that cannot be decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """How long a clip is.

    Attributes:
        samples: Number of samples after resampling.
        stored: Number of samples of a channel as the file holds them.
        rate: Number of stored samples a second.
    """

    samples: int
    stored: int
    rate: int


def examine_clip(source: AudioSource, config: AudioConfig) -> ClipShape:
    """Length of a clip that appears complete.

    The header and the packets of the file are read, nothing is decoded. Every reader checks this
    first, so that all agree on the number.

    Raises:
        BrokenItemError: The file is damaged, truncated or empty, has no audio track, or is shorter
            than the features need.
    """
    if isinstance(source, bytes):
        stored, rate = _examine(source)
    else:
        stored, rate = len(source), config.sampling_rate
    samples = _resampled(stored, rate, config.sampling_rate)
    if samples < config.least_samples:
        raise BrokenClipError(
            f"clip of {stored / rate:.4f} seconds is too short: expected at least "
            f"{config.least_samples} samples at {config.sampling_rate} Hz, two mel frames"
        )
    return ClipShape(samples=samples, stored=stored, rate=rate)


def decode_or_silence(
    source: AudioSource, shape: ClipShape, config: AudioConfig
) -> tuple[NDArray[np.float32], str | None]:
    """The wave form, float32 [samples], or silence of its length and the reason.

    A decoded wave form that is a little longer or shorter than the file's header says is cut, or
    filled with silence.

    Args:
        source: Contents of an audio file, or a wave form.
        shape: Length of the clip, from `examine_clip`.
        config: Rate of the wave form.
    """
    if not isinstance(source, bytes):
        return np.asarray(source, np.float32), None
    silence = np.zeros(shape.samples, np.float32)
    try:
        wave = _at_rate(_samples(source, shape.stored, shape.rate), shape.rate, config)
        wave = wave[: shape.samples]
        if not np.isfinite(wave).all():
            raise BrokenClipError(f"clip of {len(source)} bytes has samples that are not finite")
        if (loudest := np.abs(wave).max(initial=0.0)) > _LOUDEST:
            raise BrokenClipError(
                f"clip of {len(source)} bytes has samples of up to {loudest:.0e}: expected -1 to 1"
            )
    except BrokenItemError as error:
        return silence, f"{error}; silence stands in its place"
    silence[: len(wave)] = wave
    return silence, None


def decode_clip(source: bytes) -> tuple[NDArray[np.float32], int]:
    """All samples of a file, float32 [channels, n] of -1 to 1, and their number a second.

    Raises:
        BrokenItemError: The file is damaged, or has no audio track.
    """
    stored, rate = _examine(source)
    return _samples(source, stored, rate), rate


def _examine(source: bytes) -> tuple[int, int]:
    """Numbers of samples of a channel, and of samples a second, as a file holds them."""
    with opened(source, "audio", _WHAT) as (container, track):
        rate = track.codec_context.sample_rate
        if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
            raise BrokenClipError(
                f"clip of {len(source)} bytes has {rate} samples a second: expected "
                f"{_LOWEST_RATE} to {_HIGHEST_RATE}"
            )
        found = scan(container, track, source, _WHAT)
        to_samples = track.time_base * rate
    samples = found.end * to_samples
    if samples > len(source) + _LARGEST_PACKET * len(found.packets):
        raise BrokenClipError(
            f"clip of {len(source)} bytes is damaged: its header promises {float(samples):.0f} "
            f"samples, more than they can hold"
        )
    if found.promised is not None:
        promised = found.promised * to_samples
        # Packets that end much later than the header says are right, and it is not.
        if samples - promised <= _CODEC_DELAY * rate:
            samples = min(samples, promised)
    return round(samples), rate


def _at_rate(
    channels: NDArray[np.float32], stored: int, config: AudioConfig
) -> NDArray[np.float32]:
    """The mean of channels [c, n] at the rate of the settings, float32."""
    wave: NDArray[np.float32] = channels.mean(axis=0) if len(channels) > 1 else channels[0]
    rate = config.sampling_rate
    return wave if stored == rate else _resample(wave, stored, rate)


def _samples(source: bytes, most: int, rate: int) -> NDArray[np.float32]:
    """The samples of a file as it stores them, float32 [channels, at most `most`].

    A packet that does not decode is silence of its duration.
    """
    pieces: list[NDArray[np.float32]] = []
    left, decodes = most, False
    with opened(source, "audio", _WHAT) as (container, track):
        track.codec_context.thread_count = 1
        for packet in container.demux(track):
            frames = decoded(packet)
            found = [_to_float(frame) for frame in frames or ()]
            if frames is None:
                lost = round((packet.duration or 0) * packet.time_base * rate)
                found = [np.zeros((1, min(lost, left)), np.float32)]
            elif any(frame.sample_rate != rate for frame in frames):
                raise BrokenClipError(f"clip of {len(source)} bytes changes its rate on its way")
            decodes |= bool(frames)
            # However much more there is: the length has been decided.
            pieces += [piece[:, :left] for piece in found]
            left -= sum(piece.shape[1] for piece in found)
            if left <= 0:
                break
    if not decodes:
        raise BrokenClipError(f"clip of {len(source)} bytes decodes to nothing")
    return _joined(pieces, source)


def _joined(pieces: Sequence[NDArray[np.float32]], source: bytes) -> NDArray[np.float32]:
    """Pieces [channels, n] end to end; those of lost packets have one channel."""
    channels = max(len(piece) for piece in pieces)
    if any(len(piece) not in (1, channels) for piece in pieces):
        raise BrokenClipError(f"clip of {len(source)} bytes changes its channels on its way")
    return np.concatenate(
        [np.broadcast_to(piece, (channels, piece.shape[1])) for piece in pieces], axis=1
    )


def _to_float(frame: "AudioFrame") -> NDArray[np.float32]:
    """Samples of a frame, float32 [channels, n]; integers of b bits are divided by 2^(b - 1)."""
    held: NDArray[Any] = frame.to_ndarray()
    if frame.format.is_packed:
        held = held.reshape(-1, frame.layout.nb_channels).T
    if held.dtype == np.uint8:
        return np.asarray((held.astype(np.float32) - 128) / 128, np.float32)
    if np.issubdtype(held.dtype, np.integer):
        # A power of two: the quotient is exact.
        return np.asarray(np.ldexp(held, 1 - 8 * held.dtype.itemsize), np.float32)
    return held.astype(np.float32)


def _resample(wave: NDArray[np.float32], stored: int, rate: int) -> NDArray[np.float32]:
    """A wave form [n] at another rate, float32 [ceil(n * rate / stored)]."""
    from av import AudioFrame, AudioResampler

    frame = AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="fltp", layout="mono")
    frame.sample_rate = stored
    resampler = AudioResampler(format="fltp", layout="mono", rate=rate)
    made = [*resampler.resample(frame), *resampler.resample(None)]
    whole = np.concatenate([piece.to_ndarray()[0] for piece in made])
    expected = _resampled(len(wave), stored, rate)
    filled = np.zeros(expected, np.float32)
    filled[: len(whole)] = whole[:expected]
    return filled


def _resampled(samples: int, stored: int, rate: int) -> int:
    return -(-samples * rate // stored)
