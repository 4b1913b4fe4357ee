"""Resizing the frames of a video to their grid, and cutting groups of them into patches."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray

from megatron_mimo.media.video.clip import EncodedVideo
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.decode import VideoShape
from megatron_mimo.media.video.sampling import frame_grid, group_labels


def encode_video(
    frames: NDArray[np.uint8] | None, shape: VideoShape, config: VideoConfig
) -> EncodedVideo:
    """Grid, texts and rows of a video, and its patches where frames are given.

    Args:
        frames: The frames that are used, uint8 [n, H, W, 3]; None where patches are not needed.
        shape: Shape of the video.
        config: Conversion of a video.
    """
    rows, columns = frame_grid(shape.width, shape.height, config)
    labels = group_labels(shape.indices, shape.rate, config.temporal_patch)
    return EncodedVideo(
        grid=(rows, columns),
        labels=labels,
        rows=len(labels) * rows * columns // config.merge**2,
        patches=None if frames is None else _patches(frames, (rows, columns), config),
    )


def _patches(
    frames: NDArray[np.uint8], grid: tuple[int, int], config: VideoConfig
) -> NDArray[np.float32]:
    """Patches of all groups, float32 [G * rows * columns, F*3*P*P], each (frame, channel, y, x)."""
    missing = -len(frames) % config.temporal_patch
    resized = [_resized(frame, grid, config) for frame in frames]
    resized += [resized[-1]] * missing
    patches: NDArray[np.float32] = rearrange(
        np.stack(resized),
        "(group frame) c (row y) (column x) -> (group row column) (frame c y x)",
        frame=config.temporal_patch,
        y=config.patch_dim,
        x=config.patch_dim,
    )
    return patches


def _resized(
    frame: NDArray[np.uint8], grid: tuple[int, int], config: VideoConfig
) -> NDArray[np.float32]:
    """Planes of a frame, float32 [3, H, W] of 0 to 255, not rounded and not clipped."""
    size = (grid[0] * config.patch_dim, grid[1] * config.patch_dim)
    planes = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    if planes.shape[-2:] != size:
        planes = F.interpolate(
            planes, size=size, mode="bicubic", antialias=True, align_corners=False
        )
    resized: NDArray[np.float32] = planes[0].numpy()
    return resized
