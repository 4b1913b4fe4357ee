"""Numbers as a telephone dials them: two tones at once for each digit, with noise.

Frequencies are those of DTMF, ITU-T recommendation Q.23.
"""

import io

import numpy as np
from numpy.typing import NDArray

SAMPLING_RATE = 16_000
"""Samples a second."""
LOW_TONES = (697, 770, 852, 941)
"""Frequency of each row of keys in hertz."""
HIGH_TONES = (1209, 1336, 1477)
"""Frequency of each column of keys in hertz."""
KEYS = ("123", "456", "789", "*0#")
"""The keys, row by row."""

_TONE_S = (0.10, 0.22)  # Shortest and longest.
_PAUSE_S = (0.08, 0.16)
_MARGIN_S = (0.02, 0.12)
_RAMP_S = 0.004  # A tone that begins at once has a click, in which all frequencies are.
_PEAK = 0.9
_FULL_SCALE = 32_767


def tones_of(digit: str) -> tuple[int, int]:
    """The low and the high frequency of a key, in hertz."""
    row = next(row for row, keys in enumerate(KEYS) if digit in keys)
    return LOW_TONES[row], HIGH_TONES[KEYS[row].index(digit)]


def dial(number: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """A number as it is dialled.

    Tones and pauses vary in length, the two tones of a digit in level (by up to 4 dB between them),
    and the noise is 15 to 30 dB below the tones.

    Args:
        number: The digits, at least one.
        rng: Random generator of all that varies.

    Returns:
        Samples between -1 and 1 at `SAMPLING_RATE`, [L].
    """
    pieces = [_silence(rng.uniform(*_MARGIN_S))]
    for index, digit in enumerate(number):
        if index:
            pieces.append(_silence(rng.uniform(*_PAUSE_S)))
        pieces.append(_two_tones(digit, rng))
    pieces.append(_silence(rng.uniform(*_MARGIN_S)))
    clean = np.concatenate(pieces)
    # Two tones of amplitude 1 have a power of 1 together.
    noise = 10 ** (-rng.uniform(15, 30) / 20)
    heard = clean + rng.normal(scale=noise, size=len(clean))
    level = _PEAK * rng.uniform(0.3, 1.0)
    scaled: NDArray[np.float64] = heard * (level / np.abs(heard).max())
    return scaled


def flac(samples: NDArray[np.float64]) -> bytes:
    """A FLAC file of 16 bits and one channel, which opens faster than WAV in FFmpeg.

    Args:
        samples: Samples between -1 and 1 at `SAMPLING_RATE`, [L].

    Returns:
        Contents of the file; the same samples give the same bytes with the same build of FFmpeg.
    """
    # Not needed by those who read datasets of pictures.
    import av

    file = io.BytesIO()
    whole = np.round(samples * _FULL_SCALE).astype(np.int16)
    # Without the version of the library.
    bare = {"fflags": "+bitexact"}
    with av.open(file, "w", format="flac", container_options=bare) as out:
        stream = out.add_stream(
            "flac", rate=SAMPLING_RATE, layout="mono", options={"flags": "+bitexact"}
        )
        frame = av.AudioFrame.from_ndarray(whole[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLING_RATE
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def _silence(seconds: float) -> NDArray[np.float64]:
    return np.zeros(round(seconds * SAMPLING_RATE))


def _two_tones(digit: str, rng: np.random.Generator) -> NDArray[np.float64]:
    time = np.arange(round(rng.uniform(*_TONE_S) * SAMPLING_RATE)) / SAMPLING_RATE
    twist = 10 ** (rng.uniform(-2, 2) / 20)
    low, high = tones_of(digit)
    phases = rng.uniform(0, 2 * np.pi, size=2)
    wave_form = twist * np.sin(2 * np.pi * low * time + phases[0])
    wave_form += np.sin(2 * np.pi * high * time + phases[1]) / twist
    ramp = np.minimum(1, np.minimum(time, time[::-1]) / _RAMP_S)
    shaped: NDArray[np.float64] = wave_form * ramp
    return shaped
