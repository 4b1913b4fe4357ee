"""The patch grids that an image is resized to, computed from its size.

A *grid* is (patch rows, patch columns) of a resized image, or of one of its tiles.
"""

import math

from megatron_mimo.media.images.config import ImageConfig

Grid = tuple[int, int]


def image_grids(width: int, height: int, config: ImageConfig) -> tuple[Grid, ...]:
    """Grids of an image's pieces: its tiles and thumbnail, or the whole image.

    Args:
        width: Width in pixels, at least 1.
        height: Height in pixels, at least 1.
        config: Mode, bounds and patch size.
    """
    if config.dynamic_resolution:
        native = native_grid if config.grid_rule == "nearest" else nemotron_omni_grid
        return (native(width, height, config),)
    fixed = (config.img_h // config.patch_dim, config.img_w // config.patch_dim)
    if not config.use_tiling:
        return (fixed,)
    rows, columns = tile_layout(width, height, config)
    tiles = rows * columns
    return (fixed,) * (tiles + (config.use_thumbnail and tiles > 1))


def rows_for(width: int, height: int, config: ImageConfig) -> int:
    """Number of rows of an image of `width` x `height` pixels."""
    return rows_of(image_grids(width, height, config), config)


def rows_of(grids: tuple[Grid, ...], config: ImageConfig) -> int:
    """Number of rows of an image with pieces of these grids."""
    return sum(rows * columns for rows, columns in grids) // config.patches_per_row


def native_grid(width: int, height: int, config: ImageConfig) -> Grid:
    """The grid nearest to an image's own size and shape.

    Each side is its native length rounded to whole units (a patch, or two with pixel shuffle), then
    scaled by one factor into the bounds on the number of patches: up and rounded up to reach the
    minimum, down and rounded down to keep the maximum. Where both are impossible, the maximum is
    kept.
    """
    side = config.grid_unit
    native_h, native_w = height / config.unit, width / config.unit
    grid_h, grid_w = max(1, round(native_h)), max(1, round(native_w))
    least = math.ceil(config.min_patches / side**2)
    if grid_h * grid_w < least:
        factor = math.sqrt(least / (native_h * native_w))
        grid_h, grid_w = math.ceil(native_h * factor), math.ceil(native_w * factor)
    if config.max_patches:
        grid_h, grid_w = _shrink(grid_h, grid_w, config.max_patches // side**2)
    return grid_h * side, grid_w * side


def nemotron_omni_grid(width: int, height: int, config: ImageConfig) -> Grid:
    """The grid that transformers' processor for Nemotron H Omni models chooses, in the same steps.

    Sides are counted in patches, partial ones as whole, plus one for an odd number of whole ones;
    then scaled down to the maximum, then up to the minimum; then rounded up to pairs of patches
    where that keeps the maximum, and down to pairs otherwise, rows first. The order of these steps
    decides the grid: the maximum may be exceeded again between them.
    """
    # Halves are rounded to even numbers, so that odd ones increase.
    grid_h, grid_w = (round(side / config.patch_dim + 0.5) for side in (height, width))
    most = config.max_patches or math.inf
    factor = min(math.sqrt(most / (grid_h * grid_w)), 1.0)
    grid_h, grid_w = math.floor(factor * grid_h), math.floor(factor * grid_w)
    if not grid_h * grid_w:
        # So elongated that these steps would reduce the shorter side to zero.
        return native_grid(width, height, config)
    if grid_h * grid_w < config.min_patches < most:
        factor = math.sqrt(config.min_patches / (grid_h * grid_w))
        grid_h, grid_w = math.ceil(factor * grid_h), math.ceil(factor * grid_w)
    grid_h = _to_units(grid_h, grid_w, config.grid_unit, most)
    return grid_h, _to_units(grid_w, grid_h, config.grid_unit, most)


def _to_units(side: int, other: int, unit: int, most: float) -> int:
    """Round a side to a multiple of the unit: up if the grid then keeps its maximum."""
    above = -(-side // unit) * unit
    return above if above == side or above * other <= most else max(unit, side // unit * unit)


def _shrink(grid_h: int, grid_w: int, most: int) -> Grid:
    """Scale both sides by one factor until at most `most` cells are left, one at least per side."""
    if grid_h * grid_w <= most:
        return grid_h, grid_w
    factor = math.sqrt(most / (grid_h * grid_w))
    small_h, small_w = max(1, int(grid_h * factor)), max(1, int(grid_w * factor))
    # A side that is kept at one leaves less to the other than the common factor gives it.
    return min(small_h, max(1, most // small_w)), min(small_w, max(1, most // small_h))


def tile_layout(width: int, height: int, config: ImageConfig) -> Grid:
    """Numbers of rows and columns of tiles whose joint shape is nearest to the image's.

    Of several equally near, the largest of which the image fills at least half (InternVL 1.5, Chen
    et al. 2024, section 3.3).
    """
    shape = width / height
    best, nearest = (1, 1), math.inf
    layouts = (
        (rows, tiles // rows)
        for tiles in range(1, config.max_num_tiles + 1)
        for rows in range(1, tiles + 1)
        if tiles % rows == 0
    )
    for rows, columns in layouts:
        pixels = rows * columns * config.img_h * config.img_w
        distance = abs(shape - columns * config.img_w / (rows * config.img_h))
        if distance < nearest or (distance == nearest and 2 * width * height > pixels):
            best, nearest = (rows, columns), distance
    return best
