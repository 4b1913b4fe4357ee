"""Short videos of handwritten digits that move over a dark field."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.data.samples.handwriting import ink

Direction = Literal["left", "right", "up", "down"]

DIRECTIONS: Mapping[Direction, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
"""The step of each direction in columns and rows."""
OPPOSITE: Mapping[Direction, Direction] = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
}
SIDE = 32
"""Width and height of a video in pixels."""
NUM_FRAMES = 8
"""Number of frames of a video."""
FRAME_RATE = 4
"""Frames a second."""

_SMALLEST, _LARGEST = 12, 15  # Pixels; two of the largest fit beside each other.
_LEAST_TRAVEL = 13  # Pixels in the whole video.
# Of MPEG-4's quantiser, 1 to 31: digits are as sharp as in the pictures.
_QUALITY = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Mover:
    """A digit that moves.

    Attributes:
        glyph: Image of the digit, [8, 8], 0 (paper) to 16 (ink).
        towards: Direction of its way.
    """

    glyph: NDArray[np.float64]
    towards: Direction


def film(movers: Sequence[Mover], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Frames of one digit, or of two that move in opposite directions on separate lanes.

    Args:
        movers: One digit, or two; a lane lies along its digit's way.
        rng: Random generator of sizes, brightness, lanes and ways.

    Returns:
        Frames [`NUM_FRAMES`, `SIDE`, `SIDE`], light on dark.
    """
    frames = [Image.new("L", (SIDE, SIDE)) for _ in range(NUM_FRAMES)]
    lane_width = SIDE // len(movers)
    lanes = rng.permutation(len(movers)).tolist()
    for mover, lane in zip(movers, lanes, strict=True):
        size = int(rng.integers(_SMALLEST, _LARGEST + 1))
        picture = ink(mover.glyph, (size, size), rng.uniform(0.7, 1.0))
        across = lane * lane_width + int(rng.integers(0, lane_width - size + 1))
        travel = int(rng.integers(_LEAST_TRAVEL, SIDE - size + 1))
        start = int(rng.integers(0, SIDE - size - travel + 1))
        step = sum(DIRECTIONS[mover.towards])
        for index, frame in enumerate(frames):
            done = round(travel * index / (NUM_FRAMES - 1))
            along = start + (done if step > 0 else travel - done)
            is_level = DIRECTIONS[mover.towards][1] == 0
            frame.paste(picture, (along, across) if is_level else (across, along))
    return np.stack([np.asarray(frame) for frame in frames])


def mp4(frames: NDArray[np.uint8]) -> bytes:
    """An MP4 file with MPEG-4 video, which every build of FFmpeg writes and reads.

    Args:
        frames: Grey frames at `FRAME_RATE`, [N, height, width], both even.

    Returns:
        Contents of the file; the same frames give the same bytes with the same build.
    """
    # Not needed by those who read datasets of pictures.
    import av

    file = io.BytesIO()
    # Without the version of the library, and one thread: bytes depend on the frames alone.
    bare = {"fflags": "+bitexact"}
    with av.open(file, "w", format="mp4", container_options=bare) as out:
        stream = out.add_stream("mpeg4", rate=FRAME_RATE, options={"flags": "+bitexact"})
        context = stream.codec_context
        context.height, context.width = frames.shape[1:]
        context.pix_fmt = "yuv420p"
        context.time_base = Fraction(1, FRAME_RATE)
        context.qmin = context.qmax = _QUALITY
        context.thread_count = 1
        for grey in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(grey), format="gray")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()
