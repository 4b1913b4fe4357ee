"""One clip, as it travels from a reader to an encoder."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedClip:
    """One audio clip.

    Attributes:
        samples: Number of samples after resampling.
        rows: Number of rows that the encoder produces from it.
        features: Mel features, float32 [frames, bins], `AudioConfig.num_frames` of them; None where
            they are not needed.
    """

    samples: int
    rows: int
    features: NDArray[np.float32] | None
