"""Mock clips of one noisy tone each, and the question how high it is."""

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.media.audio.config import AudioConfig

# Frequencies as fractions of the sampling rate: at 16 kHz, 320 to 4,800 Hz.
_TONES = {"low": 0.02, "middle": 0.06, "high": 0.15, "shrill": 0.3}
TONES = tuple(_TONES)
_MOST_ROWS = 6


def mock_tones(
    rng: np.random.Generator, room: int, config: AudioConfig
) -> tuple[NDArray[np.float32], str]:
    """A wave form, float32 [n], and the name of its tone.

    Args:
        rng: Random generator of all choices.
        room: Largest number of rows.
        config: Rate, and conversion to rows.
    """
    name = TONES[rng.integers(len(TONES))]
    least = max(_least_rows(config), 1)
    rows = int(rng.integers(least, max(least, min(_MOST_ROWS, room)) + 1))
    # Frames of so many rows, the masked one included: num_frames adds it.
    most = rows * config.subsampling_factor - 1
    frames = int(rng.integers(max(2, most - config.subsampling_factor + 1), most + 1))
    samples = frames * config.hop_length + int(rng.integers(config.hop_length))
    phase = rng.uniform(0, 2 * np.pi)
    wave = 0.3 * np.sin(2 * np.pi * _TONES[name] * np.arange(samples) + phase)
    return (wave + rng.normal(0, 0.02, samples)).astype(np.float32), name


def check_mock_tones(room: int, texts: int, config: AudioConfig) -> None:
    """Refuse a sequence without room for the shortest clip.

    Args:
        room: Number of positions for the rows of a clip.
        texts: Number of positions that its tags and texts may take.
        config: Conversion to rows.

    Raises:
        ValueError: There is no room.
    """
    least = _least_rows(config)
    if room < least:
        raise ValueError(
            f"a mock clip has {least} rows at least, its tags and question take {texts} positions, "
            f"and --seq-length leaves {room + texts}: raise it"
        )


def _least_rows(config: AudioConfig) -> int:
    return config.num_rows(config.num_frames(config.least_samples))
