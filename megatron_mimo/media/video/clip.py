"""One video, as it travels from a reader to an encoder."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVideo:
    """One video: groups of F frames, each of which an encoder takes like one image.

    Attributes:
        grid: Numbers of patch rows and columns of a frame.
        labels: Text before each of the G groups, such as "Frame 1 sampled at 0.00 seconds and
            frame 2 sampled at 0.50 seconds: ".
        rows: Number of rows that the encoder produces from all groups.
        patches: Patches of the resized frames, float32 [G * grid rows * grid columns, F*3*P*P] of 0
            to 255 (not clipped, not rounded), group after group, in raster order, each
            (frame, channel, y, x); None where the pixels are not needed. The last frame is repeated
            where F does not divide the number of frames.
    """

    grid: tuple[int, int]
    labels: tuple[str, ...]
    rows: int
    patches: NDArray[np.float32] | None
