"""Which frames of a video are used, what is written before them, and the grid that they get.

The functions follow transformers' `BaseVideoProcessor.sample_frames`, and the video processor and
`replace_video_token` of its Nemotron H Omni models, rounding included.
"""

import math
from collections.abc import Sequence

from megatron_mimo.media.video.config import VideoConfig


def sample_indices(total: int, rate: float | None, config: VideoConfig) -> tuple[int, ...]:
    """Indices of the frames that are used, ascending.

    Unlike transformers, which refuses it, a rule that asks for more frames than there are gives all
    of them.

    Args:
        total: Number of frames of the video, at least 1.
        rate: Frames a second on average; needed where frames are sampled by `fps`.
        config: Rule of sampling.

    Raises:
        ValueError: The rule needs the rate.
    """
    number = config.num_frames or total
    if config.fps:
        if not rate:
            raise ValueError(f"fps is {config.fps}, and the video has no frame rate")
        # At least one frame of a very short video.
        number = max(1, int(total / rate * config.fps))
    number = min(number, total, config.max_frames or total)
    return tuple(at * total // number for at in range(number))


def group_labels(
    indices: Sequence[int], rate: float | None, temporal_patch: int
) -> tuple[str, ...]:
    """Text before each group of frames: their numbers, and their times where there is a rate.

    Args:
        indices: Indices of the frames that are used.
        rate: Frames a second on average, or None.
        temporal_patch: Number of frames of a group; the last group may have fewer.
    """
    # Whole milliseconds of a frame, as transformers counts them.
    duration = int(1000.0 / rate) if rate else None
    labels = []
    for start in range(0, len(indices), temporal_patch):
        parts = []
        for offset, index in enumerate(indices[start : start + temporal_patch]):
            named = f"{'frame' if offset else 'Frame'} {start + offset + 1}"
            if duration is not None:
                named += f" sampled at {index * duration / 1000.0:.2f} seconds"
            parts.append(named)
        labels.append(f"{' and '.join(parts)}: ")
    return tuple(labels)


def frame_grid(width: int, height: int, config: VideoConfig) -> tuple[int, int]:
    """Numbers of patch rows and columns of a frame, multiples of `config.merge`.

    Args:
        width: Width in pixels, at least 1.
        height: Height in pixels, at least 1.
        config: Number of patches and shape.
    """
    target, unit = config.target_patches, config.merge
    if not config.keep_aspect:
        side = max(unit, math.isqrt(target) // unit * unit)
        return side, side
    shape = width / height
    rows = max(round(math.sqrt(target / shape)), 1)
    columns = max(round(math.sqrt(target * shape)), 1)
    above = -(-rows // unit) * unit, -(-columns // unit) * unit
    if above[0] * above[1] <= target:
        return above
    return max(unit, rows // unit * unit), max(unit, columns // unit * unit)
