"""Intervals that hold the mean of a metric over all such questions, with 95 % confidence."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_RESAMPLES = 2000
_SEED = 0


def wilson(right: int, number: int) -> tuple[float, float]:
    """Wilson's score interval of a fraction of right answers.

    Unlike the normal interval it is not empty where all answers are right, or none. Wilson 1927,
    https://doi.org/10.1080/01621459.1927.10502953.

    Args:
        right: Number of right answers.
        number: Number of all answers, 1 or more.

    Returns:
        Its two ends, 0 to 1.
    """
    fraction, scale = right / number, 1 + _Z**2 / number
    middle = (fraction + _Z**2 / (2 * number)) / scale
    spread = fraction * (1 - fraction) / number + _Z**2 / (4 * number**2)
    half = _Z / scale * math.sqrt(spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the mean of graded scores over 2,000 samples with replacement.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13. The draws are the same
    each time. It is too narrow for a handful of scores, and empty where all of them are equal.

    Args:
        scores: Scores, one or more.

    Returns:
        Its two ends.
    """
    values, random = np.array(scores), np.random.default_rng(_SEED)
    means = [
        values[random.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)
    ]
    low, high = np.percentile(means, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)
