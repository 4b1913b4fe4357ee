"""How an image becomes patches, tokens and rows."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_mimo.settings import MoreThan, Within, check_fields
from megatron_mimo.settings.ranges import (
    MOST_CLASS_TOKENS,
    MOST_PATCH,
    MOST_PIXELS,
    MOST_POSITIONS,
    MOST_TILES,
)

RowOrder = Literal["nemotron", "megatron"]
GridRule = Literal["nearest", "nemotron-omni"]
# One number for each of the three channels, of pixels in [0, 1].
PixelMean = Annotated[tuple[float, float, float], Within(0, 1)]
PixelStd = Annotated[tuple[float, float, float], MoreThan(0, 10)]

# Mean and standard deviation of the channels that CLIP, and RADIO after it, were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How an image becomes patches, tokens and rows.

    There are three modes: native resolution (`dynamic_resolution`), tiles (`use_tiling`), and
    otherwise one fixed resolution.

    Attributes:
        patch_dim: Side of a square patch in pixels, P.
        pixel_shuffle: Whether to merge four patches into one row.
        row_order: Choice of the four patches: "nemotron" merges each 2 x 2 square, so that a grid
            has even sides; "megatron" merges four in raster order, as megatron-core does with
            images of any shape.
        dynamic_resolution: Whether to keep an image near its native size and aspect ratio.
        grid_rule: Choice of the size near the native one: "nearest" rounds, "nemotron-omni" uses
            the grids of transformers' processor for Nemotron H Omni models, and resizes without
            rounding pixels to 8 bits, as it does.
        min_patches: Smallest number of patches; an image with fewer is enlarged (native
            resolution).
        max_patches: Largest number of patches; an image with more is shrunk; 0 is uncapped (native
            resolution).
        img_h: Height of an image or a tile in pixels (other modes).
        img_w: Width of an image or a tile in pixels (other modes).
        use_tiling: Whether to cut an image into tiles of `img_h` x `img_w`.
        max_num_tiles: Largest number of tiles of an image, without the thumbnail.
        use_thumbnail: Whether to add the whole image as one more tile, where there are several.
        class_token_len: Number of class tokens before an image's patches, c.
        position_grid: Number of rows, and of columns, of the encoder's table of position
            embeddings.
        position_crop: Whether to use a random part of that table, drawn again for each image and
            step: the augmentation that RADIO trains with.
        pixel_mean: Mean of each channel, in [0, 1], which is subtracted.
        pixel_std: Standard deviation of each channel, by which is divided.
    """

    patch_dim: Annotated[int, Within(1, MOST_PATCH)] = 8
    pixel_shuffle: bool = True
    row_order: RowOrder = "nemotron"
    dynamic_resolution: bool = True
    grid_rule: GridRule = "nearest"
    min_patches: Annotated[int, Within(1, MOST_POSITIONS)] = 4
    max_patches: Annotated[int, Within(0, MOST_POSITIONS)] = 256
    img_h: Annotated[int, Within(1, MOST_PIXELS)] = 32
    img_w: Annotated[int, Within(1, MOST_PIXELS)] = 32
    use_tiling: bool = False
    max_num_tiles: Annotated[int, Within(1, MOST_TILES)] = 1
    use_thumbnail: bool = False
    class_token_len: Annotated[int, Within(0, MOST_CLASS_TOKENS)] = 0
    position_grid: Annotated[int, Within(1, MOST_PIXELS)] = 16
    position_crop: bool = False
    pixel_mean: PixelMean = CLIP_MEAN
    pixel_std: PixelStd = CLIP_STD

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dynamic_resolution and self.use_tiling:
            raise ValueError(
                "--use-tiling with --dynamic-resolution: tiles have one fixed size; add "
                "--no-dynamic-resolution, or leave --use-tiling out"
            )
        if not self.use_tiling and (self.use_thumbnail or self.max_num_tiles > 1):
            flag = "--use-thumbnail" if self.use_thumbnail else "--max-num-tiles"
            raise ValueError(f"{flag} needs --use-tiling: an image is one tile without it")
        if self.dynamic_resolution:
            self._check_bounds()
        else:
            self._check_size()

    def _check_bounds(self) -> None:
        least = max(self.min_patches, self.grid_unit**2)
        if self.max_patches and self.max_patches < least:
            raise ValueError(
                f"--dynamic-resolution-max-patches is {self.max_patches}: expected at least "
                f"{least} (--dynamic-resolution-min-patches, and {self.grid_unit**2} patches a "
                f"row), or 0 for uncapped"
            )

    def _check_size(self) -> None:
        for flag, pixels in (("--img-h", self.img_h), ("--img-w", self.img_w)):
            if pixels % self.unit:
                raise ValueError(
                    f"{flag} is {pixels}: expected a multiple of {self.unit} pixels "
                    f"(--patch-dim {self.patch_dim}"
                    f"{', times 2 for --pixel-shuffle' if self.pixel_shuffle else ''})"
                )

    @property
    def grid_unit(self) -> int:
        """Number of patches that sides of a grid are multiples of: two with pixel shuffle."""
        return 2 if self.pixel_shuffle else 1

    @property
    def unit(self) -> int:
        """Number of pixels that sides of an image are multiples of."""
        return self.patch_dim * self.grid_unit

    @property
    def patches_per_row(self) -> int:
        """Number of patches of a row, k."""
        return 4 if self.pixel_shuffle else 1
