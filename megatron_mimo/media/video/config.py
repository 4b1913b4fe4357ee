"""How a video becomes frames, patches, texts and rows."""

from dataclasses import dataclass
from typing import Annotated

from megatron_mimo.media.images.config import CLIP_MEAN, CLIP_STD, PixelMean, PixelStd
from megatron_mimo.settings import Within, check_fields
from megatron_mimo.settings.ranges import MOST_PATCH, MOST_POSITIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """How a video becomes frames, patches, texts and rows.

    The rules, and the defaults where it has any, are those of transformers' video processor for
    Nemotron H Omni models.

    Attributes:
        fps: Frames a second that are sampled, evenly by their number; 0 for another rule.
        num_frames: Number of frames that are sampled, evenly; 0 for another rule. Without any rule
            every frame is used.
        max_frames: Largest number of frames, which are sampled evenly where a rule gives more; 0 is
            unbounded.
        temporal_patch: Number of frames that are embedded at once, F: a group.
        target_patches: Number of patches of a frame that its grid is chosen near.
        keep_aspect: Whether the grid has the shape of the frame; otherwise it is a square.
        patch_dim: Side of a square patch in pixels, P.
        merge: Number of patches along each side of the square that becomes one row.
        pixel_mean: Mean of each channel, in [0, 1], which is subtracted.
        pixel_std: Standard deviation of each channel, by which is divided.
    """

    fps: Annotated[float, Within(0, 1000)] = 0.0
    num_frames: Annotated[int, Within(0, MOST_POSITIONS)] = 0
    max_frames: Annotated[int, Within(0, MOST_POSITIONS)] = 0
    temporal_patch: Annotated[int, Within(1, 64)] = 2
    target_patches: Annotated[int, Within(1, MOST_POSITIONS)] = 1024
    keep_aspect: bool = True
    patch_dim: Annotated[int, Within(1, MOST_PATCH)] = 16
    merge: Annotated[int, Within(1, 16)] = 2
    pixel_mean: PixelMean = CLIP_MEAN
    pixel_std: PixelStd = CLIP_STD

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fps and self.num_frames:
            raise ValueError(
                f"fps is {self.fps} and num_frames {self.num_frames}: expected one of them, since "
                f"each decides how many frames of a video are sampled"
            )
