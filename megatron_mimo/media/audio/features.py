"""Mel features of a wave form, by the feature extractor of transformers' Parakeet."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.media.audio.config import AudioConfig


def mel_features(wave: NDArray[np.float32], config: AudioConfig) -> NDArray[np.float32]:
    """Log-mel features, each bin with mean 0 and standard deviation 1 over the clip.

    Args:
        wave: Wave form, float32 [n] of -1 to 1; at least `config.least_samples`.
        config: Rate, transform and number of bins.

    Returns:
        Features, float32 [config.num_frames(n), bins], of which the last frame is zero.
    """
    made = _extractor(config)(wave, sampling_rate=config.sampling_rate, return_tensors="np")
    features: NDArray[np.float32] = np.asarray(made["input_features"][0], np.float32)
    return features


@lru_cache(maxsize=8)
def _extractor(config: AudioConfig) -> Any:
    # Imported here: it loads torch, and the table of filters takes some time.
    from transformers import ParakeetFeatureExtractor

    return ParakeetFeatureExtractor(
        feature_size=config.num_mel_bins,
        sampling_rate=config.sampling_rate,
        hop_length=config.hop_length,
        n_fft=config.n_fft,
        win_length=config.win_length,
        preemphasis=config.preemphasis,
    )
