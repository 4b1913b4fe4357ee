"""Mock videos of a square that moves, and the question where to."""

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.sampling import frame_grid, group_labels

_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
DIRECTIONS = tuple(_STEPS)
# Number of bytes of the longest texts around a video, end of sequence included.
_TEXTS = 34
_MOST_GROUPS = 3
_SIDE, _STRIDE = 48, 4  # pixels


def mock_video(
    rng: np.random.Generator, room: int, config: VideoConfig, tags: str
) -> tuple[NDArray[np.uint8], str]:
    """Frames, uint8 [n, H, W, 3], and the direction in which their square moves.

    Args:
        rng: Random generator of all choices.
        room: Number of positions that the video, its tags and the texts may take.
        config: Conversion to rows.
        tags: Texts around each group of frames.
    """
    direction = DIRECTIONS[rng.integers(len(DIRECTIONS))]
    least = _least_groups(config)
    most = max(
        (
            groups
            for groups in range(least, _MOST_GROUPS + 1)
            if _needed(groups, config, tags) <= room
        ),
        default=least,
    )
    groups = int(rng.integers(least, most + 1))
    frames = max(2, groups * config.temporal_patch - int(rng.integers(config.temporal_patch)))
    made = rng.normal(60, 10, (frames, _SIDE, _SIDE, 3)).clip(0, 255).astype(np.uint8)
    step = np.array(_STEPS[direction]) * _STRIDE
    start = rng.integers(_SIDE // 3, _SIDE // 2, size=2)
    for number, frame in enumerate(made):
        top, left = (start + number * step) % _SIDE
        frame[top : top + _SIDE // 4, left : left + _SIDE // 4] = 220
    return made, direction


def check_mock_video(room: int, config: VideoConfig, tags: str) -> None:
    """Refuse a sequence without room for the shortest video and its texts.

    Args:
        room: Number of positions that the video, its tags and the texts may take.
        config: Conversion to rows.
        tags: Texts around each group of frames.

    Raises:
        ValueError: There is no room.
    """
    if not has_room(room, config, tags):
        needed = _needed(_least_groups(config), config, tags)
        raise ValueError(
            f"a mock video and its question need {needed} positions at least, and --seq-length "
            f"leaves {room}: raise it"
        )


def has_room(room: int, config: VideoConfig, tags: str) -> bool:
    """Whether the shortest video and its texts fit; arguments are those of `check_mock_video`."""
    return room >= _needed(_least_groups(config), config, tags)


def _least_groups(config: VideoConfig) -> int:
    """Groups of the shortest video: two frames, since one does not move."""
    return -(-2 // config.temporal_patch)


def _needed(groups: int, config: VideoConfig, tags: str) -> int:
    """Largest number of positions of a video of so many groups, and of its texts, in bytes."""
    rows, columns = frame_grid(_SIDE, _SIDE, config)
    labels = group_labels(range(groups * config.temporal_patch), None, config.temporal_patch)
    texts = sum(len(label) + 1 + len(tags) for label in labels)
    return _TEXTS + texts + groups * rows * columns // config.merge**2
