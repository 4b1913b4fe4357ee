"""Video files: their shape from their packets, and the pixels of some of their frames."""

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.media.container import opened, scan
from megatron_mimo.media.items import BrokenItemError
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.frames import AstrayError, Frames
from megatron_mimo.media.video.sampling import sample_indices

if TYPE_CHECKING:
    from av import VideoFrame

VideoSource = bytes | NDArray[np.uint8]
"""Contents of a file, or frames, uint8 [n, H, W, 3], without a rate."""

_WHAT = "video"


class BrokenVideoError(BrokenItemError):
    """A video file that cannot be decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoShape:
    """What is known of a video before it is decoded.

    Attributes:
        width: Width of a frame in pixels, upright.
        height: Height of a frame in pixels, upright.
        total: Number of frames of the file.
        rate: Frames a second on average; None if unknown.
        indices: Indices of the frames that are used, ascending.
    """

    width: int
    height: int
    total: int
    rate: float | None
    indices: tuple[int, ...]


def examine_video(source: VideoSource, config: VideoConfig) -> VideoShape:
    """Shape of a video that appears complete, and the frames of it that are used.

    The header and the packets of the file are read, nothing is decoded. Every reader checks this
    first.

    Raises:
        BrokenItemError: The file is damaged, truncated or empty, has no video track, or has no
            frame rate although frames are sampled by it.
    """
    if isinstance(source, bytes):
        with opened(source, "video", _WHAT) as (container, track):
            width, height = _size(track, source)
            packets = scan(container, track, source, _WHAT).packets
            rate = float(track.average_rate) if track.average_rate else None
        total = len(packets)
    else:
        total, height, width, _ = source.shape
        # Frames by themselves are those that the rule would have sampled.
        rate = config.fps or None
    if not total * width * height:
        raise BrokenVideoError(f"video of {total} frames of {width} x {height} pixels is empty")
    try:
        indices = sample_indices(total, rate, config)
    except ValueError as error:
        raise BrokenVideoError(f"video of {total} frames cannot be sampled: {error}") from error
    return VideoShape(width=width, height=height, total=total, rate=rate, indices=indices)


def decode_or_black(source: VideoSource, shape: VideoShape) -> tuple[NDArray[np.uint8], str | None]:
    """The frames that are used, uint8 [n, H, W, 3], or black ones of their shape and the reason.

    A frame that cannot be decoded repeats the one before it.

    Args:
        source: Contents of a video file, or frames.
        shape: Shape of the video, from `examine_video`.
    """
    if not isinstance(source, bytes):
        return source[list(shape.indices)], None
    try:
        return _decode(source, shape), None
    except BrokenItemError as error:
        black = np.zeros((len(shape.indices), shape.height, shape.width, 3), np.uint8)
        return black, f"{error}; a blank stands in its place"


def _size(track: Any, source: bytes) -> tuple[int, int]:
    """Width and height in pixels, upright."""
    width, height = track.codec_context.width, track.codec_context.height
    most = Image.MAX_IMAGE_PIXELS
    if not width * height:
        raise BrokenVideoError(f"video of {len(source)} bytes has frames without pixels")
    if most is not None and width * height > most:
        raise BrokenVideoError(
            f"video of {len(source)} bytes has frames of {width} x {height} pixels: more than "
            f"{most} are taken for an attack"
        )
    return (height, width) if _quarter_turns(track) % 2 else (width, height)


def _quarter_turns(track: Any) -> int:
    """How many times the frames of a track are turned by 90 degrees, counter-clockwise, 0 to 3."""
    matrix = track.codec_context.coded_side_data.get("display_matrix")
    if matrix is None or len(matrix) != struct.calcsize("9i"):
        return 0
    cosine, sine, *_ = struct.unpack("9i", matrix)
    return round(-math.degrees(math.atan2(sine, cosine)) / 90) % 4


def _decode(source: bytes, shape: VideoShape) -> NDArray[np.uint8]:
    """The frames that are used, uint8 [n, H, W, 3]."""
    try:
        return _read(source, shape, may_seek=True)
    except AstrayError:
        return _read(source, shape, may_seek=False)


def _read(source: bytes, shape: VideoShape, *, may_seek: bool) -> NDArray[np.uint8]:
    with opened(source, "video", _WHAT) as (container, track):
        packets = scan(container, track, source, _WHAT).packets
        turns = _quarter_turns(track)
    size = (shape.height, shape.width) if turns % 2 else (shape.width, shape.height)
    made: list[NDArray[np.uint8]] = []
    with opened(source, "video", _WHAT) as (container, track):
        # Readers are many processes; a decoder's threads would only compete with them.
        track.codec_context.thread_count = 1
        track.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS or 2**31 - 1)}
        frames = Frames(container, track, packets, may_seek=may_seek)
        for index in shape.indices:
            frame = frames.at(index)
            if frame is not None:
                made.append(np.rot90(_pixels(frame, size), turns))
            elif made:
                made.append(made[-1])
    if not made:
        raise BrokenVideoError(f"video of {len(source)} bytes has no frame that decodes")
    # What is missing before the first frame that decodes is that frame too.
    missing = len(shape.indices) - len(made)
    return np.stack([made[0]] * missing + made)


def _pixels(frame: "VideoFrame", size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels of a frame, uint8 [H, W, 3]; one of another size than the header's is scaled to it."""
    # Without sizes the frame is converted as it is, which is faster.
    width, height = (None, None) if (frame.width, frame.height) == size else size
    return np.asarray(frame.to_ndarray(format="rgb24", width=width, height=height), np.uint8)
