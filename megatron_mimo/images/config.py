"""How an image becomes patches, tokens and rows."""

from dataclasses import dataclass
from typing import Literal

RowOrder = Literal["nemotron", "megatron"]
GridRule = Literal["nearest", "nemotron-omni"]

# Mean and standard deviation of the channels that CLIP, and RADIO after it, were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How an image becomes patches, tokens and rows.

    There are three modes: native resolution (`dynamic_resolution`), tiles (`use_tiling`), and
    otherwise one fixed resolution.

    Attributes:
        patch_dim: P, side of a square patch in pixels.
        pixel_shuffle: Merge four patches into one row.
        row_order: Which four: "nemotron" takes each 2 x 2 square, so that a grid has even sides;
            "megatron" takes four in raster order, as megatron-core does with images of any shape.
        dynamic_resolution: Keep an image near its native size and aspect ratio.
        grid_rule: Which size near the native one: "nearest" rounds, "nemotron-omni" takes the grids
            that transformers' processor of Nemotron H Omni models takes.
        min_patches: An image with fewer patches is enlarged (native resolution).
        max_patches: An image with more patches is shrunk; 0 is uncapped (native resolution).
        img_h: Height of an image or a tile in pixels (other modes).
        img_w: Width of an image or a tile in pixels (other modes).
        use_tiling: Cut an image into tiles of `img_h` x `img_w`.
        max_num_tiles: Tiles of an image, at most; the thumbnail not counted.
        use_thumbnail: Add the whole image as one more tile, where there are several.
        class_token_len: c, class tokens in front of an image's patches.
        position_grid: Rows and columns of the encoder's table of position embeddings.
        position_crop: Look at a random part of that table, drawn anew for each image and step: the
            augmentation that RADIO trains with.
        pixel_mean: Of the channels, in [0, 1]; subtracted.
        pixel_std: Of the channels; divided by.
    """

    patch_dim: int = 8
    pixel_shuffle: bool = True
    row_order: RowOrder = "nemotron"
    dynamic_resolution: bool = True
    grid_rule: GridRule = "nearest"
    min_patches: int = 4
    max_patches: int = 256
    img_h: int = 32
    img_w: int = 32
    use_tiling: bool = False
    max_num_tiles: int = 1
    use_thumbnail: bool = False
    class_token_len: int = 0
    position_grid: int = 16
    position_crop: bool = False
    pixel_mean: tuple[float, float, float] = CLIP_MEAN
    pixel_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        least = {
            "--patch-dim": (self.patch_dim, 1),
            "--max-num-tiles": (self.max_num_tiles, 1),
            "--class-token-len": (self.class_token_len, 0),
            "position_grid": (self.position_grid, 1),
        }
        if self.row_order not in ("nemotron", "megatron"):
            raise ValueError(f"row_order {self.row_order!r}: expected nemotron or megatron")
        if self.grid_rule not in ("nearest", "nemotron-omni"):
            raise ValueError(f"grid_rule {self.grid_rule!r}: expected nearest or nemotron-omni")
        for flag, (value, lowest) in least.items():
            if value < lowest:
                raise ValueError(f"{flag} is {value}: expected at least {lowest}")
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
        if self.min_patches < 1:
            raise ValueError(
                f"--dynamic-resolution-min-patches is {self.min_patches}: expected at least 1"
            )
        least = max(self.min_patches, self.grid_unit**2)
        if self.max_patches and self.max_patches < least:
            raise ValueError(
                f"--dynamic-resolution-max-patches is {self.max_patches}: expected at least "
                f"{least} (--dynamic-resolution-min-patches, and {self.grid_unit**2} patches a "
                f"row), or 0 for uncapped"
            )

    def _check_size(self) -> None:
        for flag, pixels in (("--img-h", self.img_h), ("--img-w", self.img_w)):
            if pixels < 1 or pixels % self.unit:
                raise ValueError(
                    f"{flag} is {pixels}: expected a multiple of {self.unit} pixels "
                    f"(--patch-dim {self.patch_dim}"
                    f"{', times 2 for --pixel-shuffle' if self.pixel_shuffle else ''})"
                )

    @property
    def grid_unit(self) -> int:
        """Patches by which a side of a grid grows: two with pixel shuffle."""
        return 2 if self.pixel_shuffle else 1

    @property
    def unit(self) -> int:
        """Pixels by which a side grows."""
        return self.patch_dim * self.grid_unit

    @property
    def patches_per_row(self) -> int:
        """k, the patches that make a row."""
        return 4 if self.pixel_shuffle else 1
